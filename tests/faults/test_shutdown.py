"""SIGTERM and SIGINT at any moment: within the deadline, exit 0, or 3 with what was left undone."""

import asyncio
import signal
import time
from collections.abc import Callable

import asyncpg
import pytest

from consumer.demo.servers import Postgres
from tests.conftest import RunningService, eventually
from tests.faults.stage import SLACK, Grid, Stage, has_begun, stage
from tests.world import hint

pytestmark = pytest.mark.apache_kafka

DEADLINE_S = 3.0  # SHUTDOWN_DEADLINE_S in these tests
MARGIN_S = 3.0  # leaving the group, closing clients, ending the interpreter, on a busy machine

Record = Callable[[str, object], None]


async def ended(replica: RunningService, *signals: int) -> tuple[int, float]:
    """Its exit code after these signals, a moment apart, and how long it took; SIGKILL after that is far too long."""
    begun = time.monotonic()
    for number in signals:
        if replica.process.returncode is None:
            replica.process.send_signal(number)
        await asyncio.sleep(0.05)
    replica.expected_exit = None
    try:
        return await replica.wait(5 * DEADLINE_S), time.monotonic() - begun
    except TimeoutError:
        replica.kill()
        return await replica.wait(), time.monotonic() - begun


@pytest.mark.parametrize(
    ("signals", "moments"),
    [
        pytest.param((signal.SIGTERM,), 12, id="SIGTERM"),
        pytest.param((signal.SIGINT,), 6, id="SIGINT", marks=pytest.mark.faults),
        pytest.param((signal.SIGTERM, signal.SIGTERM), 4, id="SIGTERM twice", marks=pytest.mark.faults),
        pytest.param((signal.SIGINT, signal.SIGTERM, signal.SIGINT), 4, id="three signals", marks=pytest.mark.faults),
    ],
)
async def test_a_stop_at_any_moment(
    grid: Grid, postgres: Postgres, signals: tuple[int, ...], moments: int, record_property: Record
) -> None:
    """Stopped while starting (at several moments), idle, and under full load"""
    async with stage(grid, postgres) as one:
        campaigns = await one.upstream.campaigns(300, {"pending": 5})
        topic = one.topics.of("prospect.status_changed.v1")
        took = []
        for step in range(moments):  # from our first line to after the first poll
            starting = await one.replica(ready=False, shutdown_deadline_s=DEADLINE_S)
            await has_begun(starting)
            await asyncio.sleep(1.8 / moments * step)
            code, seconds = await ended(starting, *signals)
            assert code == 0, starting.raw[-5:]
            took.append(seconds)
        idle = await one.replica(shutdown_deadline_s=DEADLINE_S)
        code, seconds = await ended(idle, *signals)
        assert code == 0
        took.append(seconds)
        for _ in range(3):
            await one.upstream.change(campaigns, "sent")
            loaded = await one.replica(shutdown_deadline_s=DEADLINE_S)
            hints = [(topic, str(campaign), hint(campaign)) for campaign in campaigns for _ in range(20)]
            async with asyncio.TaskGroup() as load:
                load.create_task(one.upstream.publish(hints))
                await asyncio.sleep(0.2)
                code, seconds = await ended(loaded, *signals)
            assert code == 0, loaded.raw[-5:]
            took.append(seconds)
        assert max(took) < DEADLINE_S + MARGIN_S * SLACK
        record_property("measured", f"at most {max(took):.1f} s")
        await one.replica()
        assert (await one.settled_and_checked()).problems == []


async def stopped_in_an_outage(one: Stage, breakage: str = "") -> tuple[int, float, list[object]]:
    """Stopped while its chunk waits for a row of our own tables and Kafka is silent."""
    replica = await one.replica(shutdown_deadline_s=DEADLINE_S, breakage=breakage)
    campaigns = await one.upstream.campaigns(5, {"pending": 5})
    holder = await asyncpg.connect(one.url)
    try:
        await holder.execute(
            """CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS $$
               BEGIN PERFORM pg_sleep(12); RETURN NEW; END $$;
               CREATE TRIGGER slow BEFORE UPDATE OF last_synced_at ON campaigns FOR EACH ROW EXECUTE FUNCTION slow()"""
        )
        await one.upstream.change(campaigns, "sent")
        sleeping = "SELECT count(*) > 0 FROM pg_stat_activity WHERE wait_event = 'PgSleep'"
        await eventually(lambda: holder.fetchval(sleeping), "the chunk is under way", replica)
        for proxy in one.grid.proxies.values():
            proxy.silence()
        code, seconds = await ended(replica, signal.SIGTERM, signal.SIGINT)
        undone = [line["undone"] for line in replica.messages("stopped")]
        return code, seconds, undone
    finally:
        for proxy in one.grid.proxies.values():
            proxy.heal()
        await holder.execute("DROP TRIGGER slow ON campaigns")
        await holder.close()


@pytest.mark.faults
async def test_a_stop_in_an_outage(grid: Grid, postgres: Postgres, record_property: Record) -> None:
    """Stopped twice in the middle of a chunk that hangs while no broker answers: 3, and what was left undone"""
    async with stage(grid, postgres) as one:
        code, seconds, undone = await stopped_in_an_outage(one)
        record_property("measured", f"after {seconds:.1f} s")
        assert (code, undone) == (3, [["running chunk"]])
        assert seconds < DEADLINE_S + MARGIN_S * SLACK
        await one.replica()
        assert (await one.settled_and_checked()).problems == []


@pytest.mark.faults
async def test_the_same_stop_finds_a_service_without_a_deadline(grid: Grid, postgres: Postgres) -> None:
    """Breakage found by a stop in an outage [deaf_to_signals]"""
    async with stage(grid, postgres) as one:
        _, seconds, _ = await stopped_in_an_outage(one, "deaf_to_signals")
        assert seconds > DEADLINE_S + MARGIN_S


async def test_another_one_takes_over_after_a_clean_stop(
    grid: Grid, postgres: Postgres, record_property: Record
) -> None:
    """After a clean stop the other replica has everything within 3 s"""
    async with stage(grid, postgres, partitions=6) as one:
        campaigns = await one.upstream.campaigns(60, {"pending": 9})
        took = []
        leaving = await one.replica(real_patience=True)
        for _ in range(3):
            staying = await one.replica(real_patience=True)
            leaving.terminate()
            await leaving.wait()
            begun = time.monotonic()
            await one.upstream.change(campaigns, "sent")
            await one.settled()
            took.append(one.quiet_at - begun)
            leaving = staying
        record_property("measured", f"{sorted(took)[1]:.1f} s [{min(took):.1f}-{max(took):.1f}]")
        assert max(took) < 3 * SLACK
        assert (await one.check()).problems == []


@pytest.mark.faults
async def test_who_is_stopped_while_joining_leaves_no_ghost(
    grid: Grid, postgres: Postgres, record_property: Record
) -> None:
    """Stopped while it joins the group: the others have everything within 3 s, not after its session"""
    async with stage(grid, postgres, partitions=6) as one:
        campaigns = await one.upstream.campaigns(60, {"pending": 20})
        await one.replica(real_patience=True)
        took = []
        for step in range(8):
            joining = await one.replica(ready=False, real_patience=True)
            await has_begun(joining)
            await asyncio.sleep(0.25 * step)
            joining.terminate()
            assert await joining.wait() == 0
            begun = time.monotonic()
            await one.upstream.change(campaigns, "sent")
            await one.settled()
            took.append(one.quiet_at - begun)
        record_property("measured", f"{sorted(took)[4]:.1f} s [{min(took):.1f}-{max(took):.1f}]")
        assert max(took) < 3 * SLACK
        assert (await one.check()).problems == []
