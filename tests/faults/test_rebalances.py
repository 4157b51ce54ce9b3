"""Members come, go, freeze and come back: no late commit and no late write of theirs harms anybody."""

import asyncio
import json
import signal
import time
from collections.abc import Callable
from datetime import UTC, datetime
from itertools import cycle, islice

import asyncpg
import pytest

from consumer.demo.servers import Postgres
from tests.benchmarks import workload
from tests.conftest import RunningService, eventually
from tests.faults import checker
from tests.faults.stage import SEED, SLACK, Grid, Stage, backlog, held_by_the_product, is_still, stage
from tests.world import hint

pytestmark = pytest.mark.apache_kafka

SILENCE_GOAL_S = 1.5
MANY_HINTS = 2_000_000  # five seconds of work or more; a process takes one and a half until it has joined
DEAD_JOIN_S = 25.0  # a join that is never answered is given up after the revocation's deadline and 10 s
FROZEN_S = 40.0  # the server ends a session that stands still in a transaction after 20
WAITS = """CREATE FUNCTION waits() RETURNS trigger LANGUAGE plpgsql SET lock_timeout = 0 AS $$
           BEGIN PERFORM pg_advisory_xact_lock(7); RETURN NEW; END $$;
           CREATE TRIGGER waits BEFORE UPDATE OF last_synced_at ON campaigns FOR EACH ROW
           WHEN (NEW.name = 'slow') EXECUTE FUNCTION waits()"""

Record = Callable[[str, object], None]


class Silence:
    """How long nobody recounted anything, seen from the database every few milliseconds."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._stop = asyncio.Event()
        self.gaps: list[tuple[float, float]] = []  # (when it ended, how long), monotonic seconds

    async def __aenter__(self) -> "Silence":
        self._db = await asyncpg.connect(self._url)
        self._task = asyncio.create_task(self._look())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._stop.set()
        await self._task
        await self._db.close()

    def saw(self, since: float) -> bool:
        """Whether anything was recounted after that moment."""
        return any(until > since for until, _ in self.gaps)

    async def _look(self) -> None:
        query = "SELECT max(last_synced_at) FROM campaigns"
        last, since = await self._db.fetchval(query), time.monotonic()
        while not self._stop.is_set():
            latest = await self._db.fetchval(query)
            now = time.monotonic()
            if latest != last:
                self.gaps.append((now, now - since))
                last, since = latest, now
            await asyncio.sleep(0.01)

    def longest(self, begin: float, end: float) -> float:
        """The longest one that overlaps this time."""
        return max((length for until, length in self.gaps if until > begin and until - length < end), default=0.0)


@pytest.mark.parametrize(
    ("hints", "campaigns"),
    [
        pytest.param(20_000, 500, id="20 000 hints", marks=pytest.mark.short),
        pytest.param(200_000, 3_000, id="200 000 hints", marks=pytest.mark.faults),
    ],
)
async def test_members_join_and_leave_under_a_backlog(
    grid: Grid, postgres: Postgres, hints: int, campaigns: int, record_property: Record
) -> None:
    """Replicas join, leave and are killed while a backlog is worked off"""
    async with stage(grid, postgres, partitions=6) as one:
        await backlog(one, await one.upstream.campaigns(campaigns, {"pending": 10, "sent": 5}), hints)
        await one.replica()
        async with Silence(one.url) as silence:
            await eventually(lambda: silence.gaps, "the backlog is being worked off")
            begin = time.monotonic()
            second = await one.replica()
            joined = time.monotonic()
            third = await one.replica()
            second.terminate()
            assert await second.wait() == 0
            third.kill()
            await one.replica()
            await one.settled(120)
        findings = await one.check()
        assert findings.problems == []
        record_property("measured", f"silent for {silence.longest(begin, joined):.2f} s while one joined")


@pytest.mark.faults
async def test_silence_of_the_group_while_one_joins_under_a_backlog(
    grid: Grid, postgres: Postgres, record_property: Record
) -> None:
    """Silence of the group while a replica joins under a backlog of 2 million hints, three times"""
    measured = []
    async with stage(grid, postgres, partitions=workload.PARTITIONS) as one:
        before = datetime.now(UTC)
        campaigns = await one.upstream.campaigns(3_000, {"pending": 10, "sent": 5})
        said, topic = islice(cycle(campaigns), MANY_HINTS), one.topics.of("prospect.status_changed.v1")
        await workload.write_hints(grid.cluster.bootstrap, topic, list(said), SEED)
        for _ in range(3):
            first = await one.replica(real_patience=True)
            async with Silence(one.url) as silence:
                await eventually(lambda: silence.gaps, "the backlog is being worked off", timeout_s=30)
                begin = time.monotonic()
                second = await one.replica(real_patience=True)
                joined = time.monotonic()
                await eventually(lambda: silence.saw(joined), "recounts go on")  # noqa: B023
                left = await checker.lag(grid.cluster.bootstrap, one.group, one.topics.read)
            measured.append(silence.longest(begin, joined))
            assert left > 0, "the backlog was over before the other one joined: nothing was measured"
            for member in (first, second):
                member.terminate()
                assert await member.wait() == 0
            code, _, err = await one.command("replay", "--since", before.isoformat())  # the same backlog once more
            assert code == 0, err
    median = sorted(measured)[1]
    record_property("measured", f"silent for {median:.2f} s [{min(measured):.2f}-{max(measured):.2f}]")
    assert median <= SILENCE_GOAL_S


async def revoked_in_a_chunk(grid: Grid, postgres: Postgres, breakage: str = "") -> list[str]:
    """What does not hold when partitions are taken away from one whose chunk is under way."""
    async with stage(grid, postgres) as one:
        db = await asyncpg.connect(one.url)
        await db.execute(WAITS)
        first = await one.replica(shutdown_deadline_s=60, breakage=breakage)  # which is the revocation's, too
        campaigns = await one.upstream.campaigns(20, {"pending": 5})
        await db.execute("UPDATE campaigns SET name = 'slow' WHERE id = $1", campaigns[7])
        await db.execute("SELECT pg_advisory_lock(7)")
        await one.upstream.change_quietly(campaigns, "sent")
        topic = one.topics.of("prospect.status_changed.v1")
        await one.upstream.publish([(topic, str(campaign), hint(campaign)) for campaign in campaigns])
        waiting = "SELECT count(*) > 0 FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
        await eventually(lambda: db.fetchval(waiting), "the chunk is under way", first)
        second = await one.replica(ready=False)

        async def lost_them() -> bool:
            return not any(name.startswith("campaign_stats_lag_records{") for name in await first.metrics())

        await eventually(lost_them, "the first one's partitions are being taken away", first, timeout_s=30)
        assert await db.fetchval(waiting), "the chunk was over before"
        await asyncio.sleep(2)  # long enough for a join that waits for nobody
        did_wait = (await second.get("/readyz"))[0] == 503
        await db.execute("SELECT pg_advisory_unlock(7)")
        await second.ready(30)
        await db.execute("DROP TRIGGER waits ON campaigns")
        await db.close()
        findings = await one.settled_and_checked()
        findings.must(did_wait, "who joined did not wait until the running chunk was finished")
        return findings.problems


async def test_a_revocation_in_the_middle_of_a_chunk(grid: Grid, postgres: Postgres) -> None:
    """A rebalance while a chunk is under way: it is finished first, what was not begun is left to its new owner"""
    assert await revoked_in_a_chunk(grid, postgres) == []


@pytest.mark.faults
async def test_the_same_revocation_finds_a_service_that_is_broken(grid: Grid, postgres: Postgres) -> None:
    """Breakage found by a rebalance in the middle of a chunk [revocation_waits_for_nobody]"""
    problems = await revoked_in_a_chunk(grid, postgres, "revocation_waits_for_nobody")
    assert any(problem.startswith("who joined did not wait") for problem in problems), problems


async def frozen(
    one: Stage, point: str, *, frozen_s: float, breakage: str = "", real_patience: bool = False
) -> tuple[RunningService, float]:
    """One replica stops at the point, is missed, and is thawed; how long the others needed meanwhile."""
    zombie = await one.replica(point=point, number=signal.SIGSTOP, breakage=breakage, real_patience=real_patience)
    campaigns = await one.upstream.campaigns(30, {"pending": 20})
    bouncing = await one.upstream.campaigns(3, {"pending": 5, "sent": 200, "bounced": 20})
    [locked] = await one.upstream.campaigns(1, {"pending": 20})
    async with held_by_the_product(one, locked, zombie):
        await one.upstream.change_quietly([*campaigns, *bouncing], "sent")  # no word yet: a frozen one would hold us up
        topic = one.topics.of("prospect.status_changed.v1")
        await one.upstream.publish([(topic, str(some), hint(some)) for some in (*campaigns, *bouncing)])
        await one.upstream.request(campaigns[:3])
    await eventually(lambda: is_still(zombie), f"frozen at `{point}`", timeout_s=30)
    begun = time.monotonic()
    await one.replica(breakage=breakage, real_patience=real_patience)
    # The truth moves on behind its back; the product, too, waits for rows that it holds.
    moving = asyncio.create_task(one.upstream.change(campaigns, "replied", of="sent"))
    try:
        async with asyncio.timeout(frozen_s):
            await asyncio.shield(moving)
        await one.settled(frozen_s)
        waited_s = time.monotonic() - begun
        await asyncio.sleep(max(0.0, frozen_s - waited_s))
    except (AssertionError, TimeoutError):
        waited_s = frozen_s
    zombie.process.send_signal(signal.SIGCONT)
    await moving
    return zombie, waited_s


POINTS = (
    "after poll",
    "in chunk",
    "after chunk",
    "before offsets",
    "before send",
    "after acknowledgement",
    "in deferred",
)


@pytest.mark.parametrize(
    "points",
    [
        pytest.param(("in chunk", "before offsets"), id="two points", marks=pytest.mark.short),
        pytest.param(POINTS, id="seven points", marks=pytest.mark.faults),
    ],
)
async def test_a_frozen_member_comes_back(
    grid: Grid, postgres: Postgres, points: tuple[str, ...], record_property: Record
) -> None:
    """A replica frozen beyond its session and thawed: its late commits and writes harm nothing"""

    async def one_of(point: str) -> tuple[str, list[str], float]:
        async with stage(grid, postgres) as one:
            zombie, waited_s = await frozen(one, point, frozen_s=FROZEN_S)
            await zombie.ready(30)
            problems = (await one.settled_and_checked()).problems
            return point, problems, waited_s

    results = await asyncio.gather(*(one_of(point) for point in points))
    record_property("measured", "the others were done after " + ", ".join(f"{waited:.0f} s" for *_, waited in results))
    assert [result for result in results if result[1]] == []
    assert all(waited_s < FROZEN_S for *_, waited_s in results)


@pytest.mark.faults
@pytest.mark.parametrize(
    ("breakage", "point", "due"),
    [("zombies_keep_their_locks", "in chunk", "waited")],
)
async def test_the_same_freezing_finds_a_service_that_is_broken(
    grid: Grid, postgres: Postgres, breakage: str, point: str, due: str
) -> None:
    """Breakage found by a frozen replica"""
    async with stage(grid, postgres) as one:
        zombie, waited_s = await frozen(one, point, frozen_s=FROZEN_S, breakage=breakage)
        await zombie.ready(30)
        problems = (await one.settled_and_checked()).problems
        if waited_s >= FROZEN_S:
            problems.append("waited for the frozen one")
    assert any(due in problem for problem in problems), problems


@pytest.mark.faults
async def test_a_member_without_partitions_hears_of_an_outage_too(
    grid: Grid, postgres: Postgres, record_property: Record
) -> None:
    """Three replicas for two partitions, brokers silent just as the last one joins: all say so, and all recover"""
    async with stage(grid, postgres, partitions=1) as one:
        replicas = [await one.replica() for _ in range(3)]

        async def all_say(degraded: list[str]) -> bool:
            said = [json.loads((await replica.get("/readyz"))[1]).get("degraded") for replica in replicas]
            return all(some == degraded for some in said)

        for proxy in grid.proxies.values():
            proxy.silence()
        try:
            await eventually(lambda: all_say(["kafka"]), "all three say that Kafka is away", timeout_s=30)
        finally:
            for proxy in grid.proxies.values():
                proxy.heal()
        healed = time.monotonic()
        await eventually(lambda: all_say([]), "all three have recovered", timeout_s=60)
        recovery_s = time.monotonic() - healed
        record_property("measured", f"recovered in {recovery_s:.1f} s")
        said = [[line for line in replica.raw if '"dependency' in line] for replica in replicas]
        assert recovery_s < DEAD_JOIN_S * SLACK, said
        campaigns = await one.upstream.campaigns(10, {"pending": 5})
        await one.upstream.change(campaigns, "sent")
        assert (await one.settled_and_checked()).problems == []
