"""The pipeline far behind: a backlog is read before it is flushed as a whole, and what may not wait for that."""

import asyncio
from collections.abc import Sequence

import pytest

from consumer import pipeline as pipeline_module
from consumer.generation import Work
from consumer.outcome import Outcome
from consumer.pipeline import CAUGHT_UP, FAR_BEHIND, Pipeline
from tests.unit.world import (
    CHUNK,
    TOPIC,
    Run,
    World,
    batch,
    let_go_waits,
    running,
)

pytestmark = pytest.mark.usefixtures("small_and_impatient")


async def in_a_backlog(world: World, run: Run) -> None:
    """Campaigns for three chunks, of which the oldest were recounted ahead, and no end of hints behind them."""
    run.source.behind = FAR_BEHIND
    run.source.deliver([batch(world, 0, 0, ["own"] * (3 * CHUNK))])
    await run.until(lambda: len(world.outcomes) == 1)
    await run.steps(100)
    assert len(world.outcomes) == 1
    assert world.committed == {}


@pytest.fixture
def once_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as a chunk, and so rarely that no test sees a second time."""
    monkeypatch.setattr(pipeline_module, "AHEAD_CAMPAIGNS", CHUNK)
    monkeypatch.setattr(pipeline_module, "AHEAD_EVERY_S", 600.0)


@pytest.mark.parametrize("end", ["read", "full"])
async def test_once_nothing_more_is_read_of_a_backlog_two_chunks_are_under_way(
    monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    monkeypatch.setattr(pipeline_module, "AHEAD_AT_MOST_S", 0.0)
    begun, one_may_end = [0], asyncio.Semaphore(0)

    async def chunk(_: Pipeline, works: Sequence[Work], epoch: int) -> Outcome:
        begun[0] += 1
        await one_may_end.acquire()
        return Outcome()

    monkeypatch.setattr(Pipeline, "_chunk", chunk)
    world = World()
    async with running(world) as run:
        run.source.behind = FAR_BEHIND
        run.source.deliver([batch(world, 0, 0, ["own"] * (4 * CHUNK))])
        await run.steps(20)
        assert begun == [1]
        if end == "full":
            monkeypatch.setattr(pipeline_module, "COLLECT_AT_MOST", CHUNK)
            run.source.deliver([batch(world, 0, 4 * CHUNK, ["own"] * CHUNK)])
        else:
            run.source.behind = 0
            run.source.deliver([])
        await run.steps(20)
        one_may_end.release()
        await run.until(lambda: begun == [3])


@pytest.mark.usefixtures("once_ahead")
async def test_a_backlog_is_read_before_it_is_flushed_as_a_whole() -> None:
    world = World()
    async with running(world) as run:
        await in_a_backlog(world, run)
        run.source.behind = CAUGHT_UP
        run.source.deliver([batch(world, 0, 3 * CHUNK, ["own"])])
        await run.steps(100)
        assert len(world.outcomes) == 1
        run.source.behind = CAUGHT_UP - 1
        run.source.deliver([batch(world, 0, 3 * CHUNK + 1, ["own"])])
        await run.until(lambda: world.committed == {(TOPIC, 0): 3 * CHUNK + 2})
    assert len(world.outcomes) == 4


@pytest.mark.usefixtures("once_ahead")
async def test_what_is_told_of_a_generation_includes_what_was_recounted_ahead_of_its_end() -> None:
    world = World()
    async with running(world) as run:
        await in_a_backlog(world, run)
        await asyncio.sleep(0.2)
        run.source.behind = 0
        run.source.deliver([])
        await run.until(lambda: world.committed == {(TOPIC, 0): 3 * CHUNK})
        assert run.value("generation_campaigns_sum") == 3 * CHUNK
        assert run.value("generation_seconds_sum") >= 0.2


@pytest.mark.usefixtures("once_ahead")
async def test_what_comes_again_while_a_backlog_is_read_is_recounted_once_more_and_not_each_time() -> None:
    world = World()
    async with running(world) as run:
        run.source.behind = FAR_BEHIND
        run.source.deliver([batch(world, 0, 0, ["shared"] * 3)])
        await run.until(lambda: len(world.outcomes) == 1)
        for place in range(3):
            run.source.deliver([batch(world, 0, 3 + place, ["shared"])])
            await run.steps(50)
        run.source.behind = 0
        run.source.deliver([])
        await run.until(lambda: world.committed == {(TOPIC, 0): 6})
        assert run.value("recounts_total", caller="chunk") == 2


@pytest.mark.usefixtures("once_ahead")
async def test_a_stream_that_is_a_little_behind_is_no_backlog() -> None:
    world = World()
    async with running(world) as run:
        run.source.behind = FAR_BEHIND - 1
        run.source.deliver([batch(world, 0, 0, ["own"] * (3 * CHUNK))])
        await run.until(lambda: world.committed == {(TOPIC, 0): 3 * CHUNK})
    assert len(world.outcomes) == 3, "nothing was recounted ahead"


@pytest.mark.usefixtures("once_ahead")
async def test_a_request_does_not_wait_for_a_backlog() -> None:
    world = World()
    async with running(world) as run:
        await in_a_backlog(world, run)
        assert run.source.behind >= FAR_BEHIND
        run.source.deliver([batch(world, 0, 3 * CHUNK, ["request"])])
        await run.until(lambda: world.committed == {(TOPIC, 0): 3 * CHUNK + 1})
    assert len(world.outcomes) == 4


@pytest.mark.usefixtures("once_ahead")
async def test_a_backlog_holds_up_offsets_for_so_long_and_no_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline_module, "AHEAD_AT_MOST_S", 0.0)
    world = World()
    async with running(world) as run:
        run.source.behind = FAR_BEHIND
        run.source.deliver([batch(world, 0, 0, ["own"] * (3 * CHUNK))])
        await run.until(lambda: world.committed == {(TOPIC, 0): 3 * CHUNK})
    assert len(world.outcomes) == 3


@pytest.mark.usefixtures("once_ahead")
async def test_a_revocation_does_not_wait_for_a_backlog_and_the_next_assignment_begins_without_one() -> None:
    world = World()
    async with running(world) as run:
        await in_a_backlog(world, run)
        await asyncio.wait_for(run.pipeline.let_go(), 5)
        run.pipeline.take_over([(TOPIC, 1)])
        run.source.behind = FAR_BEHIND - 1
        run.source.deliver([batch(world, 1, 0, ["own"])])
        await run.until(lambda: world.committed == {(TOPIC, 1): 1})
    assert len(world.outcomes) == 2


async def test_a_revocation_waits_for_what_is_recounted_ahead() -> None:
    world = World(hold=asyncio.Event())
    async with running(world) as run:
        run.source.behind = FAR_BEHIND
        run.source.deliver([batch(world, 0, 0, ["own"] * CHUNK)])
        await run.steps(20)
        await let_go_waits(world, run)
    assert len(world.outcomes) == 1
    assert world.committed == {}


@pytest.mark.usefixtures("once_ahead")
async def test_when_no_more_is_collected_a_backlog_is_flushed(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World()
    async with running(world) as run:
        await in_a_backlog(world, run)
        monkeypatch.setattr(pipeline_module, "COLLECT_AT_MOST", CHUNK)
        run.source.deliver([batch(world, 0, 3 * CHUNK, ["own"] * CHUNK)])
        await run.until(lambda: world.committed == {(TOPIC, 0): 4 * CHUNK})
    assert len(world.outcomes) == 4


@pytest.mark.usefixtures("once_ahead")
async def test_a_few_are_recounted_again_and_again_until_a_backlog_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline_module, "AHEAD_EVERY_S", 0.01)
    world = World()
    async with running(world) as run:
        run.source.behind = FAR_BEHIND
        run.source.deliver([batch(world, 0, 0, ["own"] * (3 * CHUNK))])
        async with asyncio.timeout(20):
            while len(world.outcomes) < 3:
                await asyncio.sleep(0.01)
        await run.steps(20)
        assert world.committed == {}
        run.source.behind = 0
        run.source.deliver([])
        await run.until(lambda: world.committed == {(TOPIC, 0): 3 * CHUNK})
    assert len(world.outcomes) == 3


@pytest.mark.usefixtures("once_ahead")
async def test_what_a_full_chunk_left_ahead_is_done_before_anything_else() -> None:
    world = World(store_plan=["full", "full"])
    async with running(world) as run:
        run.source.behind = FAR_BEHIND
        run.source.deliver([batch(world, 0, 0, ["own"] * (2 * CHUNK))])
        await run.until(lambda: len(world.outcomes) == 3)
        await run.steps(100)
        assert [len(outcome.later) for outcome in world.outcomes] == [3, 2, 0]
