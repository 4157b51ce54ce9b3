"""Collecting: every hint and request lands in exactly one generation and one work; requests first; duplicates once."""

from datetime import timedelta
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from consumer.deferred import merged
from consumer.envelope import DeadLetter, StatusHint, SyncRequest
from consumer.generation import Generation, Seen, Work
from schemas.events import DeadLetterReason, Trigger
from tests.unit.builders import (
    CAMPAIGN,
    EARLIER,
    NOW,
    STRANGER,
    Bytes,
    campaign_id,
    cause,
    changed,
    hint,
    hint_event,
    request,
    structured,
    work,
)

hints = st.builds(hint, st.integers(0, 5), st.sampled_from(("hint-1", "hint-2", "hint-3")))
requests = st.builds(
    lambda number, name, source: request(campaign_id=campaign_id(number), cause=cause(name), source=source),
    st.integers(0, 5),
    st.sampled_from(("request-1", "request-2")),
    st.sampled_from(("product", "another")),
)
collected = st.lists(hints | requests, max_size=40)


def filled(events: list[StatusHint | SyncRequest]) -> Generation:
    generation = Generation()
    for event in events:
        if isinstance(event, StatusHint):
            generation.hints.keep_last(event)
        else:
            generation.add_request(event)
    return generation


@given(collected)
def test_every_hint_and_request_lands_in_exactly_one_work(events: list[StatusHint | SyncRequest]) -> None:
    generation = filled(events)
    works = list(generation.works())
    assert len({one.campaign_id for one in works}) == len(works) == generation.campaigns
    assert {one.campaign_id for one in works} == {event.campaign_id for event in events}
    for one in works:
        mine = [event for event in events if event.campaign_id == one.campaign_id]
        asked = {event for event in mine if isinstance(event, SyncRequest)}
        told = [event.cause for event in mine if isinstance(event, StatusHint)]
        assert (len(one.requests), set(one.requests)) == (len(asked), asked)
        assert one.hint == (told[-1] if told else None)
        assert one.trigger == (Trigger.SYNC_REQUESTED if asked else Trigger.STATUS_CHANGED)
        assert (one.reason, one.tries, one.seen, one.first_written) == (None, 0, None, None)


@given(collected)
def test_campaigns_with_requests_come_first(events: list[StatusHint | SyncRequest]) -> None:
    triggers = [one.trigger for one in filled(events).works()]
    assert triggers == sorted(triggers, key=(Trigger.SYNC_REQUESTED, Trigger.STATUS_CHANGED).index)


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans(), st.integers(0, 3)), max_size=30))
def test_what_is_taken_off_is_in_there_no_more_and_all_else_still_is(told: list[tuple[int, bool, int]]) -> None:
    generation = Generation()
    last, found = dict[UUID, str](), dict[UUID, str]()
    for place, (number, is_plain, most) in enumerate(told):
        name = f"hint-{place}"
        generation.hints.collect([structured(hint_event(number, id=name, **({} if is_plain else {"more": "text"})))])
        last[campaign_id(number)] = name
        taken = generation.take_first(most)
        assert len(taken) <= most
        assert all((one.trigger, one.requests) == (Trigger.STATUS_CHANGED, ()) for one in taken)
        found.update((one.campaign_id, one.hint.id) for one in taken if one.hint is not None)
    found.update((one.campaign_id, one.hint.id) for one in generation.works() if one.hint is not None)
    assert found == last


def test_the_oldest_are_taken_first_and_each_once() -> None:
    generation = Generation()
    generation.hints.collect([structured(hint_event(number, id=f"hint-{number}")) for number in (3, 1, 2, 3)])
    assert [one.campaign_id for one in generation.take_first(2)] == [campaign_id(3), campaign_id(1)]
    assert [one.campaign_id for one in generation.take_first(2)] == [campaign_id(2)]
    assert generation.take_first(2) == []
    assert not list(generation.works())


@given(st.lists(collected, max_size=5))
def test_generations_share_nothing(generations: list[list[StatusHint | SyncRequest]]) -> None:
    filled_ones = [filled(events) for events in generations]
    for generation, events in zip(filled_ones, generations, strict=True):
        assert {one.campaign_id for one in generation.works()} == {event.campaign_id for event in events}


def test_the_same_request_twice_is_one() -> None:
    again = changed(request(), user_id=None)
    [one] = filled([request(), again, request()]).works()
    assert len(one.requests) == 1


@given(
    st.lists(
        st.tuples(st.sampled_from((("a", 0), ("a", 1), ("b", 0))), st.integers(1, 9), st.integers(0, 9)), max_size=20
    )
)
def test_offsets_are_those_after_the_last_batch_of_each_partition(
    batches: list[tuple[tuple[str, int], int, int]],
) -> None:
    generation = Generation()
    following: dict[tuple[str, int], int] = {}
    for partition, forward, records in batches:
        following[partition] = following.get(partition, 0) + forward
        generation.read_up_to(partition, following[partition], records)
    assert generation.offsets == following
    assert generation.records == sum(records for _, _, records in batches)
    assert bool(generation) is bool(batches)


def test_offsets_alone_are_worth_a_commit() -> None:
    generation = Generation()
    generation.read_up_to(("a", 0), 5, 0)  # only what cannot be handed out
    assert generation
    assert not list(generation.works())


def test_dead_letters_keep_their_order_and_make_nobody_dirty() -> None:
    generation = Generation()
    letters = [
        (Bytes(str(place).encode()), DeadLetter(DeadLetterReason.NOT_JSON, f"line {place}")) for place in range(3)
    ]
    for record, letter in letters:
        generation.add_dead_letter(record, letter)
    assert generation.dead_letters == letters
    assert generation.campaigns == 0


# --- deferred rows that are taken together ---------------------------------------------------------------------------


def test_rows_that_go_back_together_become_one_with_everything_they_knew() -> None:
    first, second = request(), request(user_id=STRANGER, cause=cause("request-2"))
    seen = Seen(EARLIER, drift=True)
    rows = [
        Work(CAMPAIGN, Trigger.RECONCILIATION, seen=seen, reason="sweep", first_written=NOW),
        work(hint=cause("hint-1"), reason="locked", tries=3, first_written=EARLIER),
        Work(CAMPAIGN, Trigger.SYNC_REQUESTED, requests=(first, second), reason="alone"),
        Work(CAMPAIGN, Trigger.SYNC_REQUESTED, requests=(first,), reason="alone"),
        work(hint=cause("hint-2"), reason="alone", first_written=NOW + timedelta(1)),
    ]
    assert merged(rows) == Work(
        CAMPAIGN,
        Trigger.SYNC_REQUESTED,
        hint=cause("hint-2"),
        requests=(first, second),
        seen=seen,
        reason="locked",
        tries=3,
        first_written=EARLIER,
    )


@pytest.mark.parametrize(
    ("triggers", "first"),
    [
        (("reconciliation", "status_changed"), "status_changed"),
        (("status_changed", "reconciliation"), "status_changed"),
        (("reconciliation", "sync_requested", "status_changed"), "sync_requested"),
        (("reconciliation",), "reconciliation"),
    ],
)
def test_the_first_trigger_that_applies_wins_whatever_the_order_of_rows(triggers: tuple[str, ...], first: str) -> None:
    assert merged([work(trigger=Trigger(trigger)) for trigger in triggers]).trigger == first


deferred_rows = st.lists(
    st.builds(
        Work,
        st.just(CAMPAIGN),
        st.sampled_from(Trigger),
        hint=st.none() | st.builds(cause, st.sampled_from(("hint-1", "hint-2"))),
        requests=st.lists(requests, max_size=3).map(tuple),
        tries=st.integers(0, 9),
        first_written=st.none() | st.sampled_from((EARLIER, NOW)),
    ),
    min_size=1,
    max_size=6,
)


@given(deferred_rows, st.integers(0, 6))
def test_no_request_is_lost_or_doubled_however_often_rows_are_merged(rows: list[Work], place: int) -> None:
    asked = {(r.source, r.cause.id) for row in rows for r in row.requests}
    once = merged(rows)
    in_two_steps = merged([merged(rows[: place + 1]), *rows[place + 1 :]])
    for one in (once, in_two_steps):
        assert sorted((r.source, r.cause.id) for r in one.requests) == sorted(asked)
    assert (once.trigger, once.first_written, once.hint, once.tries) == (
        in_two_steps.trigger,
        in_two_steps.first_written,
        in_two_steps.hint,
        in_two_steps.tries,
    )


def test_one_row_alone_stays_as_it_is() -> None:
    row = work(reason="huge", tries=4, first_written=EARLIER, requests=(request(),))
    assert merged([row]) == row
