"""The pipeline against a fake group and a fake store: offsets never pass a hint that is neither done nor deferred."""

import asyncio
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from consumer import pipeline as pipeline_module
from consumer.errors import OwnershipLost
from consumer.generation import Passed, Work
from consumer.outcome import Outcome
from consumer.pipeline import CAUGHT_UP, CHUNKS_AT_ONCE, FAR_BEHIND, Pipeline
from tests.unit.builders import (
    Batch,
    hint_event,
    structured,
)
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


async def play_and_check(world: World, kinds: Sequence[str], script: Sequence[tuple[str, int]]) -> None:
    """Deliver, revoke and wait as the script says, then let everything succeed: all must come to its end."""
    position = {0: 0, 1: 0}
    furthest = {0: 0, 1: 0}

    def deliver(run: Run, partition: int, count: int) -> None:
        first = position[partition]
        chosen = [kinds[(offset + partition) % len(kinds)] for offset in range(first, first + count)]
        run.source.deliver([batch(world, partition, first, chosen)])
        position[partition] += count
        furthest[partition] = max(furthest[partition], position[partition])

    async def rebalance(run: Run) -> None:
        run.source.pending.clear()  # the client hands nothing out while a rebalance is under way
        letting_go = asyncio.create_task(run.pipeline.let_go())
        await run.until(letting_go.done)
        for partition in position:
            position[partition] = world.committed.get((TOPIC, partition), 0)
        run.pipeline.take_over([(TOPIC, 0), (TOPIC, 1)])

    async with running(world) as run:
        for action, number in script:
            match action:
                case "deliver":
                    deliver(run, number % 2, 1 + number // 2)
                    await run.steps(number % 7)
                case "rebalance":
                    await rebalance(run)
                case "behind":
                    run.source.behind = number
                case _:
                    await run.steps(number)
        await run.steps(100)  # most of what was planned happens before the end
        world.store_plan, world.commit_plan, world.letter_plan = [], [], []
        run.source.behind = 0
        await rebalance(run)
        for partition in position:
            if missing := furthest[partition] - position[partition]:
                deliver(run, partition, missing)
        await run.until(lambda: all(world.committed.get((TOPIC, p), 0) == furthest[p] for p in furthest))
    assert all(world.is_done(record) for record in world.delivered)


kinds_of = st.lists(
    st.sampled_from(("own", "own", "own", "shared", "request", "bad", "tombstone")), min_size=1, max_size=9
)
scripts = st.lists(
    st.tuples(st.just("deliver"), st.integers(0, 20))
    | st.tuples(st.just("wait"), st.integers(1, 25))
    | st.tuples(st.just("behind"), st.sampled_from((0, CAUGHT_UP, FAR_BEHIND)))
    | st.tuples(st.just("rebalance"), st.just(0)),
    max_size=14,
)
STORE_FATES = ("ok", "ok", "away at begin", "away", "away at commit", "error", "error at save", "full")


@given(
    kinds=kinds_of,
    script=scripts,
    store_plan=st.lists(st.sampled_from(STORE_FATES), max_size=14),
    commit_plan=st.lists(st.sampled_from(("ok", "away", "refused")), max_size=8),
    letter_plan=st.lists(st.sampled_from(("ok", "away")), max_size=6),
)
def test_offsets_never_pass_a_hint_that_is_neither_done_nor_deferred(
    kinds: list[str],
    script: list[tuple[str, int]],
    store_plan: list[str],
    commit_plan: list[str],
    letter_plan: list[str],
) -> None:
    asyncio.run(play_and_check(World(store_plan, commit_plan, letter_plan), kinds, script))


def test_the_property_above_can_fail() -> None:
    """The control: a store that says it committed but forgot."""
    with pytest.raises(AssertionError, match=r"offset 1 of .* passes 0, which is not done"):
        asyncio.run(play_and_check(World(is_forgetful=True), ["own"], [("deliver", 0), ("wait", 25)]))


async def test_the_next_generation_is_flushed_while_offsets_are_committed() -> None:
    world = World(hold_commits=asyncio.Event())
    async with running(world) as run:
        for offset in range(3):
            run.source.deliver([batch(world, 0, offset, ["own"])])
            await run.until(lambda: len(world.outcomes) == offset + 1)  # noqa: B023
        assert world.committed == {}
        assert world.hold_commits is not None
        world.hold_commits.set()
        await run.until(lambda: world.committed == {(TOPIC, 0): 3})
    assert world.log.count("commit") == 2, "what was flushed meanwhile is committed together"


async def test_offsets_are_committed_at_most_so_often_and_at_once_when_partitions_go() -> None:
    world = World()
    async with running(world, commit_every_s=600.0) as run:
        run.source.deliver([batch(world, 0, 0, ["own"])])
        await run.until(lambda: world.committed == {(TOPIC, 0): 1})
        run.source.deliver([batch(world, 0, 1, ["own"])])
        await run.until(lambda: len(world.outcomes) == 2)
        await run.steps(100)
        assert world.committed == {(TOPIC, 0): 1}
        await asyncio.wait_for(run.pipeline.let_go(), 5)
        assert world.committed == {(TOPIC, 0): 2}


async def test_offsets_that_cannot_be_committed_do_not_hold_up_a_revocation_nor_survive_it() -> None:
    world = World(commit_plan=["away"] * 2)
    async with running(world) as run:
        run.source.deliver([batch(world, 0, 0, ["own"])])
        await run.until(lambda: len(world.commit_plan) == 1)
        await asyncio.wait_for(run.pipeline.let_go(), 5)
        run.pipeline.take_over([(TOPIC, 0)])
        await run.steps(100)
        assert run.value("commits_refused_total") == 1
    assert (world.commit_plan, world.committed) == ([], {})


async def test_a_commit_that_hangs_does_not_hold_up_a_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline_module, "LAST_COMMIT_S", 0.05)
    world = World(hold_commits=asyncio.Event())
    async with running(world) as run:
        run.source.deliver([batch(world, 0, 0, ["own"])])
        await run.until(lambda: len(world.outcomes) == 1)
        await asyncio.wait_for(run.pipeline.let_go(), 5)
        assert world.hold_commits is not None
        world.hold_commits.set()
        await run.steps(100)
        assert run.value("commits_refused_total") == 1
    assert world.committed == {}


async def test_after_a_deadline_that_passed_nothing_more_of_the_old_assignment_is_committed() -> None:
    world = World(hold=asyncio.Event(), hold_commits=asyncio.Event())
    assert world.hold is not None
    assert world.hold_commits is not None
    world.hold.set()
    async with running(world) as run:
        for offset in range(2):  # the first one's commit is on its way, the second one waits for it
            run.source.deliver([batch(world, 0, offset, ["own"])])
            await run.until(lambda: len(world.outcomes) == offset + 1)  # noqa: B023
        world.hold.clear()
        run.source.deliver([batch(world, 0, 2, ["own"])])  # and the third one is being flushed
        await run.steps(20)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(run.pipeline.let_go(), 0.05)
        world.hold.set()
        await run.until(lambda: len(world.outcomes) == 3)
        run.pipeline.take_over([(TOPIC, 0)])
        world.hold_commits.set()
        await run.steps(100)
        assert world.committed == {}
        run.source.deliver([batch(world, 0, 3, ["own"])])  # and the committer goes on
        await run.until(lambda: world.committed == {(TOPIC, 0): 4})


@pytest.mark.parametrize("stops_first", [True, False])
async def test_a_stop_that_began_before_partitions_were_given_out_drops_nothing_of_them(stops_first: bool) -> None:
    world = World(hold=asyncio.Event())
    assert world.hold is not None
    async with running(world) as run:
        run.source.deliver([batch(world, 0, 0, ["own"])])
        await run.steps(20)
        stopping: list[asyncio.Task[None]] = []
        for is_stop in (stops_first, not stops_first):
            if is_stop:
                stopping.append(asyncio.create_task(run.pipeline.let_go()))  # waits for the chunk
                await run.steps(5)
            else:
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(run.pipeline.let_go(), 0.05)  # a revocation that does not
        run.pipeline.take_over([(TOPIC, 1)])
        run.source.deliver([batch(world, 1, 0, ["own"])])
        await run.steps(20)
        assert not stopping[0].done()
        world.hold.set()
        await run.until(lambda: stopping[0].done() and world.committed == {(TOPIC, 1): 1})


async def test_an_offset_is_not_committed_while_an_older_generation_is_pending() -> None:
    world = World(hold=asyncio.Event())
    async with running(world) as run:
        run.source.deliver([batch(world, 0, 0, ["own"])])
        await run.steps(20)
        run.source.deliver([batch(world, 0, 1, ["own"]), batch(world, 1, 0, ["bad", "tombstone"])])
        await run.steps(50)
        assert (world.committed, world.log) == ({}, [])
        assert world.hold is not None
        world.hold.set()
        await run.until(lambda: world.committed == {(TOPIC, 0): 2, (TOPIC, 1): 2})
    assert [entry for entry in world.log if entry in ("transaction", "commit")] == ["transaction", "commit"] * 2


async def test_what_comes_while_the_database_is_busy_becomes_one_generation() -> None:
    world = World(hold=asyncio.Event())
    async with running(world) as run:
        for offset in range(5):
            run.source.deliver([batch(world, 0, offset, ["shared"])])
            await run.steps(10)
        assert world.hold is not None
        world.hold.set()
        await run.until(lambda: world.committed == {(TOPIC, 0): 5})
        assert run.value("generations_total") == 2
    assert len(world.outcomes) == 2


async def test_dead_letters_are_acknowledged_before_their_offset_passes() -> None:
    world = World(letter_plan=["away", "away"])
    async with running(world) as run:
        run.source.deliver([batch(world, 0, 0, ["bad", "own", "bad"])])
        await run.until(lambda: world.committed == {(TOPIC, 0): 3})
        assert run.value("dead_letters_total", reason="not_json") == 2
    assert world.log.index("2 dead letters") < world.log.index("commit")


async def test_an_offset_waits_for_a_dead_letter_topic_that_is_away() -> None:
    world = World(letter_plan=["away"] * 1_000_000)
    async with running(world) as run:
        run.source.deliver([batch(world, 0, 0, ["bad"])])
        await run.steps(200)
        assert world.committed == {}
        assert run.value("dead_letters_total", reason="not_json") == 0


async def test_what_cannot_be_handed_out_leaves_a_stub_before_its_offset_passes() -> None:
    world = World()
    async with running(world) as run:
        passed = [
            Passed((TOPIC, 0), 0, 2, "CorruptRecordException"),
            Passed((TOPIC, 1), 4, 4, "RecordTooLargeError", too_large=True),
        ]
        run.source.deliver([Batch((TOPIC, 0), (), 3)], passed)
        await run.until(lambda: world.committed == {(TOPIC, 0): 3})
        assert run.value("dead_letters_total", reason="unreadable") == 1
        assert run.value("dead_letters_total", reason="too_large") == 1
    assert world.log == ["stub 0-2", "stub 4-4", "0 dead letters", "commit"]


async def test_an_outage_repeats_the_chunk_and_defers_nothing() -> None:
    world = World(store_plan=["away at begin", "away", "away at commit"])
    async with running(world) as run:
        run.source.deliver([batch(world, 0, 0, ["shared"])])
        await run.until(lambda: world.committed == {(TOPIC, 0): 1})
        assert run.value("chunks_failed_total") == 0
        assert run.value("recounts_total", caller="chunk") == 1
    [outcome] = world.outcomes
    assert outcome.deferrals == []


@pytest.mark.parametrize("fate", ["error", "error at save"])
async def test_any_other_error_defers_the_whole_chunk_one_by_one_and_the_other_chunk_goes_on(fate: str) -> None:
    world = World(store_plan=[fate])
    async with running(world) as run:
        run.source.deliver([batch(world, 0, 0, ["own"] * (CHUNK + 1) + ["request"])])
        await run.until(lambda: world.committed == {(TOPIC, 0): CHUNK + 2})
        assert run.value("chunks_failed_total") == 1
    deferred, other = sorted(world.outcomes, key=lambda outcome: outcome.recounted)
    assert [(deferral.reason, deferral.delay_s) for deferral in deferred.deferrals] == [("alone", 0.0)] * CHUNK
    assert deferred.recounted == 0
    requests = [request for deferral in deferred.deferrals for request in deferral.work.requests]
    assert [request.cause.id for request in requests] == [f"0-{CHUNK + 1}"]
    assert len(other.deferrals) + other.recounted + other.missing == 2
    assert "deferred woken" in world.log


async def test_a_deferral_that_met_an_outage_is_tried_again_with_its_chunk() -> None:
    world = World(store_plan=["error", "away at commit"])
    async with running(world) as run:
        run.source.deliver([batch(world, 0, 0, ["shared"])])
        await run.until(lambda: world.committed == {(TOPIC, 0): 1})
    [outcome] = world.outcomes
    assert outcome.recounted == 1


async def test_a_full_chunk_leaves_the_rest_to_the_next_one() -> None:
    world = World(store_plan=["full", "full"])
    async with running(world) as run:
        run.source.deliver([batch(world, 0, 0, ["own"] * 3)])
        await run.until(lambda: world.committed == {(TOPIC, 0): 3})
    assert [len(outcome.later) for outcome in world.outcomes] == [2, 1, 0]


async def test_what_full_chunks_leave_side_by_side_is_done_too() -> None:
    world = World(store_plan=["full", "full", "full"])
    async with running(world) as run:
        run.source.deliver([batch(world, 0, 0, ["own"] * (2 * CHUNK))])
        await run.until(lambda: world.committed == {(TOPIC, 0): 2 * CHUNK})
    assert [len(outcome.later) for outcome in world.outcomes] == [CHUNK - 1] * 3 + [0, 0]


async def test_a_chunk_begins_as_soon_as_one_of_two_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[int] = []
    first = asyncio.Event()

    async def chunk(_: Pipeline, works: Sequence[Work], epoch: int) -> Outcome:
        begun.append(len(works))
        if len(begun) == 1:
            await first.wait()
        return Outcome()

    monkeypatch.setattr(Pipeline, "_chunk", chunk)
    world = World()
    async with running(world) as run:
        run.source.deliver([batch(world, 0, 0, ["own"] * (4 * CHUNK))])
        await run.until(lambda: len(begun) == 4)
        assert begun == [CHUNK] * 4
        assert not first.is_set(), "the first one is still under way"


async def test_after_a_failure_no_chunk_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[Sequence[Work]] = []

    async def chunk(_: Pipeline, works: Sequence[Work], epoch: int) -> Outcome:
        begun.append(works)
        if len(begun) == 1:
            raise OwnershipLost("a rebalance")
        await asyncio.sleep(0.01)
        return Outcome(later=list(works[1:]))

    monkeypatch.setattr(Pipeline, "_chunk", chunk)
    world = World()
    async with running(world) as run:
        run.source.deliver([batch(world, 0, 0, ["own"] * (4 * CHUNK))])
        async with asyncio.timeout(20):
            while run.value("commits_refused_total") == 0:
                await asyncio.sleep(0.01)
    assert len(begun) == CHUNKS_AT_ONCE
    assert world.committed == {}


async def test_a_flush_that_is_called_off_leaves_no_chunk_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[str] = []

    async def chunk(_: Pipeline, works: Sequence[Work], epoch: int) -> Outcome:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            ended.append("chunk")
        raise AssertionError

    monkeypatch.setattr(Pipeline, "_chunk", chunk)
    world = World()
    async with running(world) as run:
        run.source.deliver([batch(world, 0, 0, ["own"] * (2 * CHUNK))])
        await run.steps(20)
        for task in run.tasks:
            task.cancel()
        await asyncio.gather(*run.tasks, return_exceptions=True)
        assert ended == ["chunk"] * CHUNKS_AT_ONCE


async def test_a_bug_is_not_hidden_by_what_else_fails_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    failures = [OwnershipLost("a rebalance"), ValueError("a bug")]

    async def chunk(*_: object) -> Outcome:
        await asyncio.sleep(0)  # so that both have begun
        raise failures.pop(0)

    monkeypatch.setattr(Pipeline, "_chunk", chunk)
    world = World()
    async with running(world) as run:
        run.source.deliver([batch(world, 0, 0, ["own"] * (2 * CHUNK))])
        with pytest.raises(ValueError, match="a bug"):
            await run.until(lambda: False)


async def test_a_revocation_lets_the_running_chunks_finish_and_drops_the_rest() -> None:
    world = World(hold=asyncio.Event())
    async with running(world) as run:
        run.source.deliver([batch(world, 0, 0, ["own"] * (3 * CHUNK))])
        await run.steps(20)
        await let_go_waits(world, run)
        await run.steps(20)
        assert run.value("commits_refused_total") == 1
        assert run.pipeline.assigned == frozenset()
    assert len(world.outcomes) == CHUNKS_AT_ONCE
    assert world.committed == {}


async def test_one_of_two_chunks_that_meets_an_outage_is_repeated_and_the_other_one_is_not() -> None:
    world = World(store_plan=["ok", "away at commit"])
    async with running(world) as run:
        run.source.deliver([batch(world, 0, 0, ["own"] * (2 * CHUNK))])
        await run.until(lambda: world.committed == {(TOPIC, 0): 2 * CHUNK})
    assert len(world.outcomes) == 2


async def test_what_was_collected_does_not_survive_into_a_new_assignment() -> None:
    world = World(hold=asyncio.Event())
    async with running(world) as run:
        run.source.deliver([batch(world, 0, 0, ["own"])])
        await run.steps(20)
        run.source.deliver([batch(world, 0, 1, ["own", "bad"])], [Passed((TOPIC, 0), 3, 3, "CorruptRecordException")])
        await run.steps(20)
        letting_go = asyncio.create_task(run.pipeline.let_go())
        assert world.hold is not None
        world.hold.set()
        await run.until(letting_go.done)
        run.pipeline.take_over([(TOPIC, 1)])
        run.source.deliver([batch(world, 1, 0, ["own"])])
        await run.until(lambda: world.committed == {(TOPIC, 0): 1, (TOPIC, 1): 1})
    assert "0 dead letters" not in world.log
    assert "1 dead letters" not in world.log


async def test_a_refused_commit_is_normal_and_the_next_generation_goes_on() -> None:
    world = World(commit_plan=["refused"])
    async with running(world) as run:
        run.source.deliver([batch(world, 0, 0, ["own"])])
        await run.until(lambda: run.value("commits_refused_total") == 1)
        run.source.deliver([batch(world, 0, 1, ["own"])])
        await run.until(lambda: world.committed == {(TOPIC, 0): 2})
        assert run.value("generations_total") == 1


async def test_a_flush_that_is_behind_pauses_fetching_and_polling_goes_on() -> None:
    world = World(hold=asyncio.Event())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline_module, "COLLECT_AT_MOST", 5)
        async with running(world) as run:
            run.source.deliver([batch(world, 0, 0, ["own"])])
            await run.steps(20)
            run.source.deliver([batch(world, 0, 1, ["own"] * 4)])
            await run.steps(20)
            assert not run.source.paused
            run.source.deliver([batch(world, 0, 5, ["own"])])
            await run.until(lambda: run.source.paused)
            await run.until(lambda: run.value("fetch_paused") == 1)
            before = run.source.polls
            for _ in range(3):
                run.source.deliver([])
            await run.steps(50)
            assert run.source.polls >= before + 3
            assert world.log.count("pause") == 1
            assert world.hold is not None
            world.hold.set()
            await run.until(lambda: world.committed == {(TOPIC, 0): 6})
            assert not run.source.paused
            assert world.log.count("resume") == 1


async def test_records_are_counted_by_what_they_are() -> None:
    world = World()
    newer = structured(hint_event(type="prospect.status_changed.v2"), topic=TOPIC, offset=9)
    async with running(world) as run:
        run.source.deliver([batch(world, 0, 0, ["own", "shared", "request", "bad", "tombstone"])])
        run.source.deliver([Batch((TOPIC, 0), [newer], 10)])
        await run.until(lambda: world.committed == {(TOPIC, 0): 10})
        run.source.deliver([])
        await run.until(lambda: run.source.polls == 4)
        kinds = ("status_hint", "sync_request", "newer_version", "tombstone", "dead_letter")
        assert [run.value("records_total", kind=kind) for kind in kinds] == [2, 1, 1, 1, 1]
        assert run.value("generations_total") >= 1
        assert run.value("collecting_records") == 0


async def test_while_stopping_no_offset_passes_what_was_dropped() -> None:
    world = World(hold=asyncio.Event())
    async with running(world) as run:
        run.source.deliver([batch(world, 0, 0, ["own"])])
        await run.steps(20)
        run.source.deliver([batch(world, 0, 1, ["request"])])  # collected, not begun
        await run.steps(20)
        letting_go = asyncio.create_task(run.pipeline.let_go())
        await run.steps(5)
        run.source.deliver([batch(world, 0, 2, ["own"])])  # polling goes on until the process ends
        await run.steps(5)
        assert world.hold is not None
        world.hold.set()
        await run.until(letting_go.done)
        await run.steps(100)
    assert world.committed == {(TOPIC, 0): 1}
