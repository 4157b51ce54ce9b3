"""Operators' hands: every command twice, several at once, killed in the middle, beside a product and a service at work.

Promised: whatever was done by halves is done by the next run, and what is done twice harms nobody. What a killed
`dead-letters redrive` had sent but not marked is sent once more by the next one: at least once. Everything else that is
told leaves once.
"""

import asyncio
import io
import json
import random
import shutil
import subprocess
import tarfile
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final
from uuid import UUID

import asyncpg
import pytest
from aiokafka import TopicPartition
from aiokafka.admin import AIOKafkaAdminClient

from consumer import migrations
from consumer.database import statement
from consumer.demo.servers import Postgres
from tests.conftest import RunningService, command, eventually, start_service
from tests.faults.checker import read_all
from tests.faults.rigged import SMALL_PAGE
from tests.faults.stage import SEED, Grid, Stage, stage
from tests.servers import REPOSITORY

pytestmark = pytest.mark.apache_kafka

KILLED: Final = -9
CAMPAIGNS: Final = 2 * SMALL_PAGE + 4  # three pages, the last one not full
AT_ONCE: Final = 3
PATIENCE_S: Final = 60.0
RELEASED: Final = "db45665"
"""The commit of release 0.1.0."""
OLD_VERSION: Final = "c66118a"
"""A commit whose service must stand beside the present one while `migrate` brings the database forward."""


@asynccontextmanager
async def work_goes_on(one: Stage, campaigns: Sequence[UUID]) -> AsyncIterator[None]:
    """The product changes campaigns, publishes and asks until the block ends."""
    ended = asyncio.Event()
    choice = random.Random(SEED)

    async def work() -> None:
        for number in range(10_000):
            some = choice.sample(list(campaigns), min(3, len(campaigns)))
            await one.upstream.change(some, "sent")
            if number % 5 == 0:
                await one.upstream.request(some[:1])
            with suppress(TimeoutError):
                await asyncio.wait_for(ended.wait(), 0.1)
            if ended.is_set():
                return

    task = asyncio.create_task(work())
    try:
        yield
    finally:
        ended.set()
        await task


@asynccontextmanager
async def session(one: Stage) -> AsyncIterator[asyncpg.Connection]:
    """Past the service and past the upstream."""
    db = await asyncpg.connect(one.url)
    try:
        yield db
    finally:
        await db.close()


async def killed_in_its_statement(one: Stage, name: str, rows: str, *arguments: str) -> None:
    """SIGKILL while the command waits for `rows` inside its statement `name`: nobody knows whether it took effect."""
    async with session(one) as holder, session(one) as watcher:
        async with holder.transaction():
            await holder.execute(rows)
            job = asyncio.create_task(one.command(*arguments))
            pid = await eventually(
                lambda: watcher.fetchval(
                    "SELECT pid FROM pg_stat_activity WHERE query = $1 AND wait_event_type = 'Lock'", statement(name)
                ),
                f"{arguments} waits",
                timeout_s=PATIENCE_S,
            )
            job.cancel()  # SIGKILL
            with suppress(asyncio.CancelledError):
                await job
        # The server knows nothing of it: it goes on until it has an answer to give.
        gone = "SELECT count(*) = 0 FROM pg_stat_activity WHERE pid = $1"
        await eventually(lambda: watcher.fetchval(gone, pid), "its session ends", timeout_s=PATIENCE_S)


async def at_once(one: Stage, *arguments: str) -> list[Any]:
    """Several of the same command side by side: what each says with --json; all must end well."""
    results = await asyncio.gather(*(one.command(*arguments, "--json") for _ in range(AT_ONCE)))
    assert [(code, err) for code, _, err in results] == [(0, "")] * AT_ONCE
    return [json.loads(out) for _, out, _ in results]


async def redriven_in_every_way(grid: Grid, postgres: Postgres, breakage: str = "") -> list[str]:
    """What does not hold after `dead-letters redrive` was killed twice, run three times at once, and once more."""
    garbage = CAMPAIGNS
    async with stage(grid, postgres) as one:
        campaigns = await one.upstream.campaigns(8, {"pending": 400})
        await one.replica()
        await one.upstream.babble(garbage)

        async def buried() -> bool:
            letters = await read_all(grid.cluster.bootstrap, [one.topics.dead_letters])
            return len({letter.value for letter in letters}) == garbage

        await eventually(buried, "all garbage is kept", timeout_s=PATIENCE_S)
        async with work_goes_on(one, campaigns):
            redrive = ("dead-letters", "redrive", "--all")
            for point in ("published", "unlocking"):
                assert (await one.command(*redrive, point=point, breakage=breakage))[0] == KILLED
            results = await asyncio.gather(
                *(one.command(*redrive, "--json", breakage=breakage) for _ in range(AT_ONCE))
            )
            assert [(code, err) for code, _, err in results] == [(0, "")] * AT_ONCE
            sent = [json.loads(out)["sent"] for _, out, _ in results]
            last = json.loads((await one.command(*redrive, "--json"))[1])
        findings = await one.settled_and_checked()
        findings.must(sum(sent) == garbage, f"three at once sent {sent}, not {garbage} together")
        findings.must(last["sent"] == 0, f"one more sent {last['sent']}")
        copies = Counter(
            record.value
            for record in await read_all(grid.cluster.bootstrap, [one.topics.of("prospect.status_changed.v1")])
            if "dead-letter-redriven" in dict(record.headers)
        )
        for _, value in one.upstream.garbage:
            # Once for each kill between sending and marking, and once marked.
            findings.must(1 <= copies[value] <= 1 + 2, f"{value!r} was sent back {copies[value]} times")
        due = garbage + 2 * SMALL_PAGE
        findings.must(garbage < copies.total() <= due, f"{copies.total()} copies: each kill repeats a batch at most")
        return findings.problems


async def test_redrive_twice_at_once_and_killed_sends_everything_back_at_least_once(
    grid: Grid, postgres: Postgres
) -> None:
    """`dead-letters redrive` killed between sending and marking, three at once, once more."""
    assert await redriven_in_every_way(grid, postgres) == []


@pytest.mark.faults
async def test_requeue_twice_at_once_and_killed_sends_each_event_once(grid: Grid, postgres: Postgres) -> None:
    """`outbox requeue` killed between two pages and in its statement, three at once, once more."""
    async with stage(grid, postgres) as one, session(one) as db:
        campaigns = await one.upstream.campaigns(CAMPAIGNS, {"pending": 400})
        await one.replica()
        async with db.transaction():
            await db.execute("SELECT FROM campaign_stats.outbox_shards FOR UPDATE")  # the relay has nothing to do
            await one.upstream.change(campaigns, "sent")

            async def written() -> bool:
                return bool(await db.fetchval("SELECT count(*) = $1 FROM campaign_stats.outbox", CAMPAIGNS))

            await eventually(written, "all are to be told", timeout_s=PATIENCE_S)
            events = await db.fetch(
                "UPDATE campaign_stats.outbox SET set_aside_at = now(), error = 'MessageSizeTooLarge' RETURNING event"
            )
        aside = "SELECT count(*) FROM campaign_stats.outbox WHERE set_aside_at IS NOT NULL"
        async with work_goes_on(one, campaigns):
            requeue = ("outbox", "requeue", "--all")
            assert (await one.command(*requeue, point="after page"))[0] == KILLED
            assert await db.fetchval(aside) == CAMPAIGNS - SMALL_PAGE
            await killed_in_its_statement(
                one,
                "requeue_outbox",
                "SELECT FROM campaign_stats.outbox WHERE id ="
                " (SELECT min(id) FROM campaign_stats.outbox WHERE set_aside_at IS NOT NULL) FOR UPDATE",
                *requeue,
            )
            left = await db.fetchval(aside)
            assert left in (CAMPAIGNS - SMALL_PAGE, CAMPAIGNS - 2 * SMALL_PAGE)
            assert sum(said["requeued"] for said in await at_once(one, *requeue)) == left
            assert await one.command(*requeue) == (0, "0\n", "")
        findings = await one.settled_and_checked()
        # What was set aside let younger ones pass: it comes out of order, and a follower drops it by its version.
        assert [problem for problem in findings.problems if not problem.startswith("order: ")] == []
        told = Counter(event.id for event in findings.told)
        assert [told[json.loads(row["event"])["id"]] for row in events] == [1] * CAMPAIGNS


@pytest.mark.faults
async def test_retry_twice_at_once_and_killed_has_every_campaign_tried(grid: Grid, postgres: Postgres) -> None:
    """`deferred retry` killed between two pages, three at once, once more."""
    async with stage(grid, postgres) as one, session(one) as db:
        campaigns = await one.upstream.campaigns(8, {"pending": 400})
        waiting = await one.upstream.campaigns(CAMPAIGNS, {"pending": 5})
        await one.replica()
        assert (await one.command("reconcile", *map(str, waiting), drift_grace_s=3600))[1] == f"{CAMPAIGNS}\n"
        await one.upstream.change_quietly(waiting, "sent")
        later = "SELECT count(*) FROM campaign_stats.deferred WHERE not_before > now() + interval '1 minute'"
        async with work_goes_on(one, campaigns):
            retry = ("deferred", "retry", "--all")
            assert await db.fetchval(later) == CAMPAIGNS
            assert (await one.command(*retry, point="after page"))[0] == KILLED
            assert CAMPAIGNS - SMALL_PAGE <= await db.fetchval(later) < CAMPAIGNS
            await at_once(one, *retry)
            assert await db.fetchval(later) == 0
            assert (await one.command(*retry))[0] == 0
        findings = await one.settled_and_checked()
        assert findings.problems == []
        news = Counter(event.subject for event in findings.told)
        assert [news[str(one)] for one in waiting] == [1] * CAMPAIGNS


async def replayed_in_every_way(grid: Grid, postgres: Postgres, breakage: str = "") -> list[str]:
    """What does not hold after `replay` was refused, killed before and after its commit, and run several at once."""
    long_ago = datetime.now(UTC) - timedelta(hours=1)
    async with stage(grid, postgres) as one:
        campaigns = await one.upstream.campaigns(8, {"pending": 400})
        bouncing = await one.upstream.campaigns(2, {"sent": 200, "bounced": 20, "pending": 5})
        running = await one.replica()
        await one.upstream.change([*campaigns, *bouncing], "sent")
        await one.upstream.babble(2)
        await one.settled()
        soon = datetime.now(UTC)
        async with work_goes_on(one, campaigns):
            code, _, err = await one.command("replay", "--since", long_ago.isoformat())
            assert (code, "stop every replica" in err) == (1, True)
            running.terminate()
            assert await running.wait() == 0
        at_end = await committed(one)
        assert sum(at_end.values()) > 0
        async with work_goes_on(one, campaigns):

            async def replay(since: datetime, point: str = "") -> tuple[int, str, str]:
                return await one.command(
                    "replay", "--since", since.isoformat(), "--json", point=point, breakage=breakage
                )

            assert (await replay(long_ago, "locked"))[0] == KILLED
            assert await committed(one) == at_end
            assert (await replay(soon, "unlocking"))[0] == KILLED
            halfway = await committed(one)
            assert 0 < sum(halfway.values()) < sum(at_end.values())
            results = await asyncio.gather(*(replay(since) for since in (soon, long_ago, datetime.now(UTC))))
            assert [(code, err) for code, _, err in results] == [(0, "")] * AT_ONCE
            results = [await replay(long_ago), await replay(soon)]
            moved = [sum(abs(row["records"]) for row in json.loads(out)) for _, out, _ in results]
            back = await committed(one)
            await one.replica()
            await one.replica()
        findings = await one.settled_and_checked(paused=bouncing)
        findings.must(moved == [0, 0], f"replays behind the others moved {moved} records")
        findings.must(set(back.values()) == {0}, f"the group stands at {back}, not at the beginning")
        return findings.problems


async def committed(one: Stage) -> dict[TopicPartition, int]:
    """The group's offsets where it has any."""
    admin = AIOKafkaAdminClient(bootstrap_servers=one.grid.cluster.bootstrap)
    await admin.start()
    try:
        found = await admin.list_consumer_group_offsets(one.group)
        return {partition: state.offset for partition, state in found.items() if state.offset >= 0}
    finally:
        await admin.close()


@pytest.mark.faults
async def test_replay_twice_at_once_and_killed_ends_at_the_oldest_time_and_pauses_nobody_twice(
    grid: Grid, postgres: Postgres
) -> None:
    """`replay --since` refused beside a member, killed before and after its commit, three at once to other times."""
    assert await replayed_in_every_way(grid, postgres) == []


@pytest.mark.faults
async def test_the_same_steps_find_commands_that_are_broken(grid: Grid, postgres: Postgres) -> None:
    """A redrive that notes nothing and a replay that moves forward are found by the same steps."""
    redriven, replayed = await asyncio.gather(
        redriven_in_every_way(grid, postgres, "sent_back_without_a_mark"),
        replayed_in_every_way(grid, postgres, "replay_goes_where_it_is_told"),
    )
    assert any(problem.startswith("three at once sent") for problem in redriven), redriven
    assert any("not at the beginning" in problem for problem in replayed), replayed


@pytest.mark.faults
async def test_reconcile_twice_at_once_and_killed_tells_every_campaign_anew(grid: Grid, postgres: Postgres) -> None:
    """`reconcile --all --now` killed between two pages and in its statement, three at once, once more."""
    async with stage(grid, postgres) as one:
        campaigns = await one.upstream.campaigns(CAMPAIGNS, {"pending": 400})
        await one.replica()
        await one.upstream.change(campaigns, "sent")
        await one.settled()
        before = {event.id for event in (await one.check()).told}
        async with work_goes_on(one, campaigns[:4]):
            reconcile = ("reconcile", "--all", "--now")
            assert (await one.command(*reconcile, point="after page", passes=2))[0] == KILLED
            await killed_in_its_statement(
                one,
                "reconcile",
                f"SELECT FROM campaign_stats.campaign_state WHERE campaign_id = '{max(campaigns)}' FOR UPDATE",
                *reconcile,
            )
            results = await asyncio.gather(*(one.command(*reconcile) for _ in range(AT_ONCE)))
            assert results == [(0, f"{CAMPAIGNS}\n", "")] * AT_ONCE
            assert await one.command(*reconcile) == (0, f"{CAMPAIGNS}\n", "")
        findings = await one.settled_and_checked()
        assert findings.problems == []
        anew = {event.subject for event in findings.told if event.id not in before}
        assert anew == {str(campaign_id) for campaign_id in campaigns}


@pytest.mark.faults
async def test_migrate_killed_at_every_file_and_at_once_beside_a_product_at_work(
    grid: Grid, postgres: Postgres
) -> None:
    """`migrate` killed in each file's transaction and behind each index, three at once, once more."""
    async with stage(grid, postgres, template="template0") as one:
        files = migrations.released()
        first = await one.command("migrate", "--reference-schema", point=f"migration {files[0].number:04d}")
        assert first[0] == KILLED
        campaigns = await one.upstream.campaigns(8, {"pending": 400})
        async with work_goes_on(one, campaigns):
            for file in files[1:]:
                assert (await one.command("migrate", point=f"migration {file.number:04d}"))[0] == KILLED
            results = await asyncio.gather(*(one.command("migrate") for _ in range(AT_ONCE)))
            assert [(code, err) for code, _, err in results] == [(0, "")] * AT_ONCE
            assert sum(out.count("applied") for _, out, _ in results) == 1  # the last file: the kills left the others
            assert (await one.command("migrate"))[1] == "nothing to do: the database is up to date\n"
            await one.replica()
        assert (await one.settled_and_checked()).problems == []
        async with session(one) as db:
            assert await db.fetchval("SELECT bool_and(indisvalid) FROM pg_index")
            assert await db.fetchval("SELECT count(*) FROM campaign_stats.migrations") == len(files)


INVENTED: Final = {
    "9001_invented.sql": "ALTER TABLE campaign_stats.campaign_state ADD COLUMN invented integer;\n",
    "9002_invented_index.sql": "-- concurrently: invented\n"
    "CREATE INDEX CONCURRENTLY IF NOT EXISTS invented ON public.campaign_prospects (updated_at);\n",
}
"""What a newer version might bring, so that its database is newer than the old code, whatever we have released."""


def older_version(directory: Path, commit: str = OLD_VERSION) -> Path:
    """The service as it was at this commit."""
    archive = subprocess.run(
        ["git", "-C", REPOSITORY, "archive", "--format=tar", commit, "consumer", "schemas"],
        capture_output=True,
        check=False,
    )
    if archive.returncode != 0:
        pytest.fail(
            f"commit {commit} is not in this clone, so no older version can run beside this one: fetch the whole"
            f" history (git fetch --unshallow); git says: {archive.stderr.decode().strip()}"
        )
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as files:
        files.extractall(directory, filter="data")
    return directory


def newer_version(directory: Path) -> Path:
    """The service as it is, and migrations that it does not have yet."""
    for package in ("consumer", "schemas", "tests"):
        shutil.copytree(REPOSITORY / package, directory / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name, sql in INVENTED.items():
        (directory / "consumer" / "migrations" / name).write_text(sql)
    return directory


async def replica_of(one: Stage, directory: Path) -> RunningService:
    """A replica of the version in `directory`; it is ready."""
    running = await start_service({**one.environment, "PYTHONPATH": str(directory)}, directory=directory)
    one.replicas.append(running)
    await running.ready(60)
    return running


async def test_a_rolling_upgrade_from_the_release_and_back_and_forth_again_loses_nothing(
    grid: Grid, postgres: Postgres, tmp_path: Path
) -> None:
    """Release 0.1.0 gives way to this version replica by replica, takes over again, and leaves for good."""
    old = older_version(tmp_path / "old", RELEASED)
    async with stage(grid, postgres, template="template0") as one, session(one) as db:
        before = {**one.environment, "PYTHONPATH": str(old)}
        assert (await command(before, "migrate", "--reference-schema", directory=old))[0] == 0
        campaigns = await one.upstream.campaigns(12, {"pending": 400})
        bouncing = await one.upstream.campaigns(3, {"sent": 200, "bounced": 20, "pending": 5})

        async def rolled(leaving: Sequence[RunningService], coming: Path, who: str) -> list[RunningService]:
            """Every replica is replaced by one of the other version, one after the other, while work goes on."""
            new = []
            for number, each in enumerate(leaving):
                new.append(await replica_of(one, coming))
                await recounts_go_on(db, f"{who}, {number} and {len(leaving) - number}, are")
                each.terminate()
                assert await each.wait() == 0
            await one.upstream.change([bouncing.pop()], "sent")
            await recounts_go_on(db, f"{who} alone is")
            return new

        paused = list(bouncing)
        replicas = [await replica_of(one, old), await replica_of(one, old)]
        async with work_goes_on(one, campaigns):
            assert (await one.command("migrate"))[0] == 0
            replicas = await rolled(replicas, REPOSITORY, "this version")
            code, out, _ = await one.command("migrate", "--back-to", "0.1.0")
            assert (code, out.splitlines()[-1]) == (0, "release 0.1.0 can start on this database")
            replicas = await rolled(replicas, old, "the release")
            assert (await one.command("migrate"))[0] == 0
            replicas = await rolled(replicas, REPOSITORY, "this version again")
        findings = await one.settled_and_checked(paused=paused)
        assert findings.problems == []


@pytest.mark.faults
async def test_migrate_of_a_live_service_while_an_older_version_works_beside_the_newer_one(
    grid: Grid, postgres: Postgres, tmp_path: Path
) -> None:
    """`migrate` killed, then three at once beside an older version at work; the newer joins, the older one leaves."""
    old, new = older_version(tmp_path / "old"), newer_version(tmp_path / "new")
    async with stage(grid, postgres, template="template0") as one, session(one) as db:
        before = {**one.environment, "PYTHONPATH": str(old)}
        assert (await command(before, "migrate", "--reference-schema", directory=old))[0] == 0
        campaigns = await one.upstream.campaigns(12, {"pending": 400})
        bouncing = await one.upstream.campaigns(2, {"sent": 200, "bounced": 20, "pending": 5})
        older = await replica_of(one, old)
        async with work_goes_on(one, campaigns):
            for name in INVENTED:
                assert (await one.command("migrate", point=f"migration {name[:4]}", directory=new))[0] == KILLED
            results = await asyncio.gather(*(one.command("migrate", directory=new) for _ in range(AT_ONCE)))
            assert [(code, err) for code, _, err in results] == [(0, "")] * AT_ONCE
            await recounts_go_on(db, "the older version is")
            assert older.process.returncode is None
            newer = await replica_of(one, new)
            await one.upstream.change(bouncing, "sent")
            await recounts_go_on(db, "both are")
            code, _, err = await command(before, "run", directory=old)
            assert (code, "the database is newer than this code" in err) == (2, True)
            older.terminate()
            assert await older.wait() == 0
            await recounts_go_on(db, "the newer one alone is")
        findings = await one.settled_and_checked(paused=bouncing)
        assert findings.problems == []
        assert newer.process.returncode is None


async def recounts_go_on(db: asyncpg.Connection, who: str) -> None:
    """Wait until a campaign is recounted that was not before."""
    since = await db.fetchval("SELECT clock_timestamp()")
    again = "SELECT count(*) > 0 FROM campaigns WHERE last_synced_at > $1"
    await eventually(lambda: db.fetchval(again, since), f"{who} at work", timeout_s=PATIENCE_S)
