"""Members come, go, freeze and come back: no late commit and no late write of theirs harms anybody."""

import asyncio
import json
import signal
import time
from collections.abc import Callable

import asyncpg
import pytest

from consumer.demo.servers import Postgres
from tests.conftest import RunningService, eventually
from tests.faults import checker
from tests.faults.stage import Grid, Stage, stage
from tests.world import hint

pytestmark = pytest.mark.apache_kafka

SILENCE_GOAL_S = 1.5
SLEEP = """CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS $$
           BEGIN PERFORM pg_sleep({seconds}); RETURN NEW; END $$;
           CREATE TRIGGER slow BEFORE UPDATE OF last_synced_at ON campaigns FOR EACH ROW
           WHEN (NEW.name = 'slow') EXECUTE FUNCTION slow()"""

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

    async def _look(self) -> None:
        last, since = None, time.monotonic()
        while not self._stop.is_set():
            latest = await self._db.fetchval("SELECT max(touched_at) FROM campaign_stats.campaign_state")
            now = time.monotonic()
            if latest != last:
                self.gaps.append((now, now - since))
                last, since = latest, now
            await asyncio.sleep(0.01)

    def longest(self, begin: float, end: float) -> float:
        """The longest one that overlaps this time."""
        return max((length for until, length in self.gaps if until > begin and until - length < end), default=0.0)


async def backlog(one: Stage, hints: int, campaigns: int) -> None:
    """Hints that wait already, each campaign in turn."""
    ids = await one.upstream.campaigns(campaigns, {"pending": 10, "sent": 5})
    topic = one.topics.of("prospect.status_changed.v1")
    said = [(topic, str(campaign), json.dumps(hint(campaign)).encode()) for campaign in ids]
    for begin in range(0, hints, campaigns):
        await one.upstream.publish(said[: hints - begin])


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
        await backlog(one, hints, campaigns)
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
    """Silence of the group while a replica joins under a backlog of 500 000 hints, three times"""
    measured = []
    for _ in range(3):
        async with stage(grid, postgres, partitions=6) as one:
            await backlog(one, 500_000, 10_000)
            await one.replica(real_patience=True)
            async with Silence(one.url) as silence:
                await eventually(lambda: silence.gaps, "the backlog is being worked off")
                begin = time.monotonic()
                await one.replica(real_patience=True)
                joined = time.monotonic()
                left = await checker.lag(grid.cluster.bootstrap, one.group, one.topics.read)
            measured.append(silence.longest(begin, joined))
            assert left > 0, "the backlog was over before the other one joined: nothing was measured"
    median = sorted(measured)[1]
    record_property("measured", f"silent for {median:.2f} s [{min(measured):.2f}-{max(measured):.2f}]")
    assert median <= SILENCE_GOAL_S


async def test_a_revocation_in_the_middle_of_a_chunk(grid: Grid, postgres: Postgres) -> None:
    """A rebalance in the middle of a chunk that takes 3 s"""
    async with stage(grid, postgres) as one:
        db = await asyncpg.connect(one.url)
        await db.execute(SLEEP.format(seconds=3))
        first = await one.replica()
        campaigns = await one.upstream.campaigns(20, {"pending": 5})
        await db.execute("UPDATE campaigns SET name = 'slow' WHERE id = $1", campaigns[7])
        await one.upstream.change(campaigns, "sent")
        sleeping = "SELECT count(*) > 0 FROM pg_stat_activity WHERE wait_event = 'PgSleep'"
        await eventually(lambda: db.fetchval(sleeping), "the chunk is under way", first)
        await one.replica()
        await one.upstream.change(campaigns, "sent")
        await db.execute("DROP TRIGGER slow ON campaigns")
        await db.close()
        assert (await one.settled_and_checked()).problems == []


async def frozen(
    one: Stage, point: str, *, frozen_s: float, breakage: str = "", real_patience: bool = False
) -> tuple[RunningService, float]:
    """One replica stops at the point, is missed, and is thawed; how long the others needed meanwhile."""
    zombie = await one.replica(point=point, number=signal.SIGSTOP, breakage=breakage, real_patience=real_patience)
    campaigns = await one.upstream.campaigns(30, {"pending": 20})
    bouncing = await one.upstream.campaigns(3, {"pending": 5, "sent": 200, "bounced": 20})
    await one.upstream.change([*campaigns, *bouncing], "sent")
    await one.upstream.request(campaigns[:3])
    await eventually(lambda: is_stopped(zombie.process.pid), f"frozen at `{point}`", timeout_s=30)
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


def is_stopped(pid: int) -> bool:
    """Whether the process stands still by a signal."""
    with open(f"/proc/{pid}/stat") as stat:
        return stat.read().rpartition(")")[2].split()[0] == "T"


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
            zombie, waited_s = await frozen(one, point, frozen_s=30)
            await zombie.ready(30)
            problems = (await one.settled_and_checked()).problems
            return point, problems, waited_s

    results = await asyncio.gather(*(one_of(point) for point in points))
    record_property("measured", "the others were done after " + ", ".join(f"{waited:.0f} s" for *_, waited in results))
    assert [result for result in results if result[1]] == []
    assert all(waited_s < 30 for *_, waited_s in results)


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
        zombie, waited_s = await frozen(one, point, frozen_s=30, breakage=breakage)
        await zombie.ready(30)
        problems = (await one.settled_and_checked()).problems
        if waited_s >= 30:
            problems.append("waited for the frozen one")
    assert any(due in problem for problem in problems), problems
