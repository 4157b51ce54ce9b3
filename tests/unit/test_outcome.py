"""What follows from a recount: what is told, to whom, under which id and version, and what is put off."""

import json
from datetime import datetime, timedelta
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from consumer.envelope import StatusHint, SyncRequest, decode
from consumer.generation import Seen, Work
from consumer.guard import Limits, Mode, Verdict, Window
from consumer.outcome import (
    Held,
    Judgement,
    OutboxRow,
    Outcome,
    Recount,
    after_failure,
    decide,
    next_version,
    ordered_counts,
    ordered_stats,
)
from schemas import events
from schemas.events import Trigger
from tests.unit.builders import (
    CAMPAIGN,
    EARLIER,
    NOW,
    NOW_MICROSECONDS,
    OWNER,
    REFERENCE_COUNTS,
    STRANGER,
    Bytes,
    campaign,
    campaign_id,
    cause,
    data_of,
    event_of,
    held,
    judgement,
    pause,
    recount,
    request,
    work,
)

STATS, PAUSED, REJECTED = events.STATS_UPDATED, events.PAUSED, events.SYNC_REJECTED
NEVER_PUBLISHED = {"published_counts": None, "published_status": None, "version": 0}


def decided(
    done: Work | None = None,
    counted: Recount | None = None,
    judged: Judgement | None = None,
    hold: Held | None = None,
    *,
    unjudged: bool = False,
    recount_s: float = 0.0,
) -> Outcome:
    """What follows for CAMPAIGN alone."""
    return decide(
        [done or work()],
        {CAMPAIGN: counted} if counted is not None else {},
        {CAMPAIGN: hold} if hold is not None else {},
        {CAMPAIGN: judged} if judged is not None else {},
        [CAMPAIGN] if unjudged else [],
        recount_s=recount_s,
        now=NOW,
    )


def asked(*requests: SyncRequest, **fields: object) -> Work:
    """CAMPAIGN was asked for, and nothing else happened."""
    return work(**{"trigger": Trigger.SYNC_REQUESTED, "hint": None, "requests": requests or (request(),), **fields})


def types(outcome: Outcome) -> list[str]:
    return [row.type for row in outcome.outbox]


def only(outcome: Outcome, type_: str) -> OutboxRow:
    [row] = [row for row in outcome.outbox if row.type == type_]
    return row


# --- the shape of the numbers ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stats", "ordered"),
    [
        ({}, [("total", 0), ("sent", 0), ("replied", 0), ("bounced", 0)]),
        (
            {"bounced": 1, "total": 9, "sent": 0, "replied": 3, "completed": 0},
            [("total", 9), ("sent", 0), ("replied", 3), ("bounced", 1)],
        ),
        (
            {"message_sent": 5, "connected": 4, "connection_sent": 3, "timed_out": 2, "completed": 1, "total": 15},
            [
                *(("total", 15), ("sent", 0), ("replied", 0), ("bounced", 0)),
                *(("completed", 1), ("timed_out", 2), ("connection_sent", 3), ("connected", 4), ("message_sent", 5)),
            ],
        ),
        ({"total": 2, "pending": 2, "clicked": 7}, [("total", 2), ("sent", 0), ("replied", 0), ("bounced", 0)]),
    ],
)
def test_stats_have_one_order_and_extra_keys_only_when_not_zero(
    stats: dict[str, int], ordered: list[tuple[str, int]]
) -> None:
    assert list(ordered_stats(stats).items()) == ordered


@given(
    st.dictionaries(st.sampled_from(("zebra", "apple", "bounced", "sent", "pending", "cancelled")), st.integers(0, 3))
)
def test_prospects_by_status_leaves_zeros_out_and_does_not_depend_on_the_order_read(counts: dict[str, int]) -> None:
    ordered = ordered_counts(counts)
    assert ordered == {status: count for status, count in counts.items() if count}
    expected = [s for s in ("pending", "sent", "bounced", "cancelled", "apple", "zebra") if s in ordered]
    assert list(ordered) == expected


def test_the_reference_case_is_written_exactly_so() -> None:
    outcome = decided(counted=recount(**NEVER_PUBLISHED))
    [row] = outcome.outbox
    assert row.event.decode() == (
        '{"specversion":"1.0","id":"0251d31b-bf27-56e4-afe0-f509fce73600","source":"campaign-stats",'
        '"type":"campaign.stats_updated.v1","time":"2026-04-22T11:30:00.250000Z",'
        '"subject":"8c2b2d4e-e29b-41d4-a716-446655440000","datacontenttype":"application/json",'
        '"causationid":"hint-1","correlationid":"correlation-hint-1",'
        '"traceparent":"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01","data":{"campaign":'
        '{"id":"8c2b2d4e-e29b-41d4-a716-446655440000","user_id":"11111111-1111-1111-1111-111111111111",'
        '"type":"email","name":"Q2 Enterprise Outreach","status":"active","daily_limit":50,"stop_on_reply":true,'
        '"open_tracking":true,"skip_other_campaigns":null,'
        '"stats":{"total":120,"sent":34,"replied":4,"bounced":1},'
        '"last_synced_at":"2026-04-22T11:30:00.250000Z","pause_reason":null,'
        '"created_at":"2026-04-18T15:12:00Z","updated_at":"2026-04-22T11:30:00Z"},'
        '"prospects_by_status":{"pending":81,"sent":34,"replied":4,"bounced":1},'
        '"version":1776857400250000,"trigger":"status_changed"}}'
    )


def test_a_campaign_without_prospects_has_no_prospects_by_status() -> None:
    empty = recount(counts={}, campaign=campaign(stats={}), **NEVER_PUBLISHED)
    data = data_of(only(decided(counted=empty), STATS))
    assert list(data) == ["campaign", "version", "trigger"]


@pytest.mark.parametrize("field", ["daily_limit", "stop_on_reply", "open_tracking", "created_at", "updated_at"])
def test_a_null_in_the_row_stays_a_null_in_the_event(field: str) -> None:
    row = only(decided(counted=recount(campaign=campaign(**{field: None}), **NEVER_PUBLISHED)), STATS)
    told = data_of(row)["campaign"]
    assert isinstance(told, dict)
    assert told[field] is None


# --- versions and ids --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("previous", "expected"),
    [
        (0, NOW_MICROSECONDS),
        (NOW_MICROSECONDS - 1, NOW_MICROSECONDS),
        (NOW_MICROSECONDS, NOW_MICROSECONDS + 1),
        (NOW_MICROSECONDS + 5_000_000, NOW_MICROSECONDS + 5_000_001),  # the clock went backwards
    ],
)
def test_a_version_is_the_clock_in_microseconds_or_one_more_than_the_previous(previous: int, expected: int) -> None:
    assert next_version(previous, NOW) == expected


@given(st.datetimes(datetime(1970, 1, 2), datetime(2200, 1, 1)))
def test_the_microseconds_of_the_clock_are_exact(moment: datetime) -> None:
    since_1970 = (moment - datetime(1970, 1, 1)) // timedelta(microseconds=1)
    assert next_version(0, moment.replace(tzinfo=NOW.tzinfo)) == since_1970


def test_all_events_of_one_recount_share_one_version_and_one_trigger() -> None:
    done = work(trigger=Trigger.SYNC_REQUESTED, requests=(request(), request(cause=cause("request-2"))))
    outcome = decided(done, recount(version=NOW_MICROSECONDS + 9), pause())
    assert types(outcome) == [PAUSED, STATS, STATS, STATS]
    assert {data_of(row)["version"] for row in outcome.outbox} == {NOW_MICROSECONDS + 10}
    assert {data_of(row).get("trigger", "sync_requested") for row in outcome.outbox} == {"sync_requested"}
    assert [state.version for state in outcome.states] == [NOW_MICROSECONDS + 10]


def test_ids_are_uuid5_of_the_fact_under_the_campaign() -> None:
    outcome = decided(work(requests=(request(),)), recount(), pause())
    assert [event_of(row)["id"] for row in outcome.outbox] == [
        "e0fb6eee-ee32-5af5-ba96-dc214bd21089",
        "0251d31b-bf27-56e4-afe0-f509fce73600",
        "f3d9a091-cd18-514a-8a14-a3613e455d19",
    ]
    assert {event_of(row)["subject"] for row in outcome.outbox} == {str(CAMPAIGN)}


def test_an_answer_has_the_same_id_whenever_and_however_it_is_given() -> None:
    later = recount(counted_at=NOW + timedelta(hours=1), version=NOW_MICROSECONDS)
    outcomes = [
        decided(asked(), recount()),
        decided(asked(), later),
        decided(asked()),
        decided(asked(), hold=held(reason="failing", failures=5)),
    ]
    assert {event_of(row)["id"] for outcome in outcomes for row in outcome.outbox} == {
        "f3d9a091-cd18-514a-8a14-a3613e455d19"
    }


@pytest.mark.parametrize(
    "other", [request(source="another"), request(cause=cause("request-2")), request(campaign_id=campaign_id(1))]
)
def test_answers_to_different_requests_have_different_ids(other: SyncRequest) -> None:
    first, second = (
        event_of(decide([Work(r.campaign_id, Trigger.SYNC_REQUESTED, requests=(r,))], {}, {}, {}, now=NOW).outbox[0])
        for r in (request(), other)
    )
    assert first["id"] != second["id"]


@pytest.mark.parametrize(
    ("campaign_of", "shard"),
    [  # crc32 by a bitwise implementation checked with crc32("123456789") = cbf43926, not with zlib
        ("8c2b2d4e-e29b-41d4-a716-446655440000", 0xB7D6B827 % 32),
        ("00000000-0000-0000-0000-000000000000", 0xECBB4B55 % 32),
        ("ffffffff-ffff-ffff-ffff-ffffffffffff", 0x3FB3C61A % 32),
        ("11111111-1111-1111-1111-111111111111", 0x68C93758 % 32),
        ("018f3c2a-0b1c-7def-8123-456789abcdef", 0x7D4628A5 % 32),
    ],
)
def test_the_shard_of_a_campaign_is_fixed_for_ever(campaign_of: str, shard: int) -> None:
    assert OutboxRow(UUID(campaign_of), STATS, b"").shard == shard


# --- news --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "told"),
    [
        ({}, []),
        ({"published_counts": dict(reversed(REFERENCE_COUNTS.items()))}, []),
        ({"drift": {"sent": 2}}, []),  # the stored numbers were wrong, what was published was not
        (NEVER_PUBLISHED, [STATS]),
        ({"published_counts": {**REFERENCE_COUNTS, "sent": 33}}, [STATS]),
        ({"published_counts": {**REFERENCE_COUNTS, "opened": 1}}, [STATS]),
        ({"published_status": "paused"}, [STATS]),
    ],
)
def test_news_is_what_differs_from_what_was_last_published(before: dict[str, object], told: list[str]) -> None:
    outcome = decided(counted=recount(**before))
    assert types(outcome) == told
    assert [state.published for state in outcome.states] == [(REFERENCE_COUNTS, "active")] * len(told)
    assert outcome.recounted == 1


def test_nothing_is_saved_for_a_recount_that_found_nothing_new() -> None:
    outcome = decided(counted=recount())
    saved = (outcome.states, outcome.outbox, outcome.decisions, outcome.deferrals, outcome.hurried)
    assert not any(saved)


@pytest.mark.parametrize("before", [{"last_total": None}, {"last_total": 119}, {"failures": 3}])
def test_what_must_be_remembered_is_saved_also_without_news(before: dict[str, object]) -> None:
    [state] = decided(counted=recount(**before)).states
    assert (state.version, state.published, state.last_total) == (7, None, 120)


def test_news_carries_the_ids_of_the_hint_and_an_answer_those_of_its_request() -> None:
    done = work(requests=(request(),), trigger=Trigger.SYNC_REQUESTED)
    news, answer = decided(done, recount(**NEVER_PUBLISHED)).outbox
    assert (event_of(news)["causationid"], event_of(news)["correlationid"]) == ("hint-1", "correlation-hint-1")
    assert (event_of(answer)["causationid"], event_of(answer)["correlationid"]) == (
        "request-1",
        "correlation-request-1",
    )
    assert data_of(news) == data_of(answer)


def test_the_id_of_a_request_never_stands_as_the_cause_of_news() -> None:
    outcome = decided(asked(), recount(**NEVER_PUBLISHED), pause())
    causes = [event_of(row).get("causationid") for row in outcome.outbox]
    assert types(outcome) == [PAUSED, STATS, STATS]
    assert causes == [None, None, "request-1"]
    assert not {"correlationid", "traceparent"} & event_of(outcome.outbox[1]).keys()


def test_a_trace_that_is_absent_is_left_out() -> None:
    row = only(decided(work(hint=cause(traceparent=None)), recount(**NEVER_PUBLISHED)), STATS)
    assert "traceparent" not in event_of(row)


# --- answers -----------------------------------------------------------------------------------------------------


def test_every_request_is_answered_also_when_there_is_no_news() -> None:
    requests = (request(), request(user_id=None, cause=cause("request-2")), request(source="another"))
    outcome = decided(asked(*requests), recount())
    assert types(outcome) == [STATS] * 3
    assert [event_of(row)["causationid"] for row in outcome.outbox] == ["request-1", "request-2", "request-1"]
    assert [state.published for state in outcome.states] == [None]
    assert data_of(outcome.outbox[0])["trigger"] == "sync_requested"


def test_a_stranger_is_told_that_there_is_no_such_campaign_and_nothing_else() -> None:
    outcome = decided(asked(request(user_id=STRANGER), request(cause=cause("request-2"))), recount())
    assert types(outcome) == [STATS, REJECTED]
    rejected = only(outcome, REJECTED)
    assert data_of(rejected) == {"campaign_id": str(CAMPAIGN), "reason": "not_found"}
    assert event_of(rejected)["causationid"] == "request-1"
    assert str(OWNER) not in rejected.event.decode()


def test_a_stranger_alone_makes_no_news_and_no_version() -> None:
    outcome = decided(asked(request(user_id=STRANGER)), recount())
    assert types(outcome) == [REJECTED]
    assert outcome.states == []


def test_a_campaign_that_is_gone_is_counted_and_its_requests_rejected() -> None:
    outcome = decided(asked(request(), request(user_id=None, cause=cause("request-2"))))
    assert (outcome.missing, outcome.recounted, outcome.deferrals) == (1, 0, [])
    assert [data_of(row)["reason"] for row in outcome.outbox] == ["not_found", "not_found"]
    gone = decided(work())
    assert (gone.missing, gone.outbox) == (1, [])


# --- what is put off ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reason", "tries", "delay_s", "next_tries"),
    [
        (None, 0, 0.05, 0),
        ("sweep", 9, 0.05, 0),
        ("locked", 0, 0.1, 1),
        ("locked", 1, 0.2, 2),
        ("locked", 5, 3.2, 6),
        ("locked", 6, 5.0, 7),
        ("locked", 10_000, 5.0, 10_001),
    ],
)
def test_a_locked_campaign_is_retried_at_once_then_ever_later(
    reason: str | None, tries: int, delay_s: float, next_tries: int
) -> None:
    done = work(reason=reason, tries=tries, requests=(request(),), first_written=EARLIER)
    outcome = decided(done, hold=held())
    [deferral] = outcome.deferrals
    assert deferral.delay_s == pytest.approx(delay_s)
    assert (deferral.reason, deferral.tries) == ("locked", next_tries)
    assert deferral.work == done
    assert outcome.outbox == []


def test_a_huge_campaign_waits_for_the_rest_of_its_cool_down() -> None:
    done = work(requests=(request(),))
    [deferral] = decided(done, hold=held(reason="huge", retry_at=NOW + timedelta(seconds=90))).deferrals
    assert (deferral.reason, deferral.delay_s, deferral.work) == ("huge", 90.0, done)
    [due] = decided(done, hold=held(reason="huge", retry_at=NOW - timedelta(seconds=90))).deferrals
    assert due.delay_s == 0.0
    [never_counted] = decided(done, hold=held(reason="huge")).deferrals
    assert never_counted.delay_s == 0.0


def test_a_campaign_beyond_the_budget_goes_into_the_next_chunk_with_everything_it_has() -> None:
    done = work(requests=(request(),))
    outcome = decided(done, hold=held(reason="later"))
    assert outcome.later == [done]
    assert (outcome.deferrals, outcome.outbox, outcome.missing, outcome.recounted) == ([], [], 0, 0)


@pytest.mark.parametrize(
    ("reason", "until_retry_s", "delay_s", "is_hurried"),
    [
        (None, 3_600, 60.0, True),
        (None, 10, 10.0, True),
        ("alone", 3_600, 60.0, True),
        ("failing", 3_600, 3_600.0, False),  # taken before its time: just goes back
        ("failing", -1, 0.0, False),
    ],
)
def test_a_hint_brings_the_retry_of_a_failing_campaign_forward_to_a_minute_at_most(
    reason: str | None, until_retry_s: float, delay_s: float, is_hurried: bool
) -> None:
    hold = held(reason="failing", failures=3, retry_at=NOW + timedelta(seconds=until_retry_s))
    done = work(reason=reason, requests=(request(),))
    outcome = decided(done, hold=hold)
    [deferral] = outcome.deferrals
    assert (deferral.reason, deferral.delay_s, deferral.work) == ("failing", delay_s, done)
    assert outcome.hurried == ([CAMPAIGN] if is_hurried else [])
    assert outcome.outbox == []


@pytest.mark.parametrize(("failures", "told"), [(1, []), (4, []), (5, ["failed"]), (6, ["failed"]), (900, ["failed"])])
def test_from_the_fifth_failure_on_requests_are_answered_failed(failures: int, told: list[str]) -> None:
    at_the_failure, _ = after_failure(asked(), OWNER, failures, NOW)
    afterwards = decided(asked(), hold=held(reason="failing", failures=failures))
    for outcome in (at_the_failure, afterwards):
        assert [data_of(row)["reason"] for row in outcome.outbox] == told
        [deferral] = outcome.deferrals
        assert (deferral.reason, deferral.work.requests) == ("failing", () if told else (request(),))
        assert deferral.work.campaign_id == CAMPAIGN


def test_what_a_failing_campaign_waits_for_survives_its_answers() -> None:
    seen = Seen(EARLIER, drift=True)
    done = work(requests=(request(),), seen=seen, reason="sweep", tries=2, first_written=EARLIER)
    outcome, _ = after_failure(done, OWNER, 5, NOW)
    [deferral] = outcome.deferrals
    assert (deferral.work.hint, deferral.work.seen, deferral.work.first_written) == (cause(), seen, EARLIER)


def test_a_stranger_is_not_told_that_a_campaign_fails() -> None:
    requests = (request(user_id=STRANGER), request(user_id=None, cause=cause("request-2")))
    outcome, _ = after_failure(asked(*requests), OWNER, 5, NOW)
    assert [data_of(row)["reason"] for row in outcome.outbox] == ["not_found", "failed"]


@pytest.mark.parametrize(
    ("failures", "delay_s"), [(1, 1), (2, 2), (3, 4), (5, 16), (12, 2_048), (13, 3_600), (14, 3_600), (9_999, 3_600)]
)
def test_failures_double_the_wait_up_to_an_hour(failures: int, delay_s: float) -> None:
    outcome, retry_s = after_failure(work(), OWNER, failures, NOW)
    assert retry_s == delay_s
    assert [deferral.delay_s for deferral in outcome.deferrals] == [delay_s]


@pytest.mark.parametrize(
    ("reason", "tries", "delay_s", "next_tries"),
    [
        (None, 0, 1.0, 0),
        ("locked", 4, 1.0, 0),
        ("guard", 0, 2.0, 1),
        ("guard", 10, 2_048.0, 11),
        ("guard", 99, 3_600.0, 100),
    ],
)
def test_a_recount_whose_guard_failed_stands_and_the_guard_is_tried_again(
    reason: str | None, tries: int, delay_s: float, next_tries: int
) -> None:
    done = work(reason=reason, tries=tries, requests=(request(),), first_written=EARLIER)
    outcome = decided(done, recount(**NEVER_PUBLISHED), unjudged=True)
    assert types(outcome) == [STATS, STATS]
    [deferral] = outcome.deferrals
    assert (deferral.reason, deferral.delay_s, deferral.tries) == ("guard", delay_s, next_tries)
    assert deferral.work.requests == ()  # answered already
    assert (deferral.work.hint, deferral.work.first_written) == (cause(), EARLIER)


@pytest.mark.parametrize(("prospects", "cooldown_s"), [(20_000, None), (20_001, 10.0)])
def test_a_huge_campaign_cools_down_four_times_its_last_recount(prospects: int, cooldown_s: float | None) -> None:
    counted = recount(counts={"sent": prospects}, last_total=0)
    [state] = decided(counted=counted, recount_s=2.5).states
    assert (state.last_total, state.cooldown_s) == (prospects, cooldown_s)


def test_a_huge_campaign_cools_down_also_when_nothing_changed() -> None:
    counts = {"sent": 20_001}
    [state] = decided(counted=recount(counts=counts, published_counts=counts, last_total=20_001), recount_s=1.0).states
    assert (state.version, state.published, state.cooldown_s) == (7, None, 4.0)


# --- the guard ---------------------------------------------------------------------------------------------------


def test_a_pause_is_one_paused_event_and_news_of_the_same_version_and_an_audit_row() -> None:
    outcome = decided(counted=recount(), judged=pause())
    assert types(outcome) == [PAUSED, STATS]
    version = NOW_MICROSECONDS
    assert data_of(only(outcome, PAUSED)) == {
        "campaign_id": str(CAMPAIGN),
        "user_id": str(OWNER),
        "reason": "bounce_rate",
        "version": version,
        "sent": 120,
        "bounced": 6,
        "rate_bp": 500,
        "threshold_bp": 500,
        "min_sent": 100,
        "window": 500,
        "previous_status": "active",
        "prospects_by_status": REFERENCE_COUNTS,
        "pending": 81,
        "paused_at": "2026-04-22T11:30:00.250000Z",
    }
    told = data_of(only(outcome, STATS))
    assert told["version"] == version
    assert isinstance(told["campaign"], dict)
    assert (told["campaign"]["status"], told["campaign"]["pause_reason"]) == ("paused", "bounce_rate")
    assert [(decision.version, decision.judgement.verdict) for decision in outcome.decisions] == [
        (version, Verdict.TRIP)
    ]
    [state] = outcome.states
    assert (state.guard_paused_at, state.published) == (NOW, (REFERENCE_COUNTS, "paused"))
    assert outcome.verdicts == {(Mode.ENFORCE, Verdict.TRIP): 1}


def test_a_pause_is_news_also_when_paused_was_published_last() -> None:
    assert types(decided(counted=recount(published_status="paused"), judged=pause())) == [PAUSED, STATS]


def test_an_answer_shows_the_row_as_after_the_guard() -> None:
    outcome = decided(asked(), recount(), pause())
    told = data_of(outcome.outbox[-1])["campaign"]
    assert isinstance(told, dict)
    assert told["status"] == "paused"


def test_a_judgement_without_a_pause_tells_and_audits_nothing() -> None:
    outcome = decided(counted=recount(guard_paused_at=EARLIER), judged=judgement())
    assert (outcome.outbox, outcome.decisions, outcome.states) == ([], [], [])
    assert outcome.verdicts == {(Mode.ENFORCE, Verdict.BELOW_RATE): 1}


def test_the_last_pause_is_remembered_by_every_later_state() -> None:
    [state] = decided(counted=recount(guard_paused_at=EARLIER, **NEVER_PUBLISHED)).states
    assert state.guard_paused_at == EARLIER


@pytest.mark.parametrize(
    ("observed_trip", "verdict", "is_written"),
    [
        (False, Verdict.TRIP, True),
        (True, Verdict.TRIP, False),
        (True, Verdict.BELOW_RATE, True),
        (False, Verdict.BELOW_RATE, False),
        (True, Verdict.NOT_ACTIVE, True),
    ],
)
def test_observe_writes_a_decision_only_when_its_verdict_changes_and_never_pauses(
    observed_trip: bool, verdict: Verdict, is_written: bool
) -> None:
    outcome = decided(counted=recount(observed_trip=observed_trip), judged=judgement(verdict, Limits(Mode.OBSERVE)))
    assert outcome.outbox == []
    assert [(d.version, d.judgement.verdict) for d in outcome.decisions] == [(None, verdict)] * is_written
    assert [state.observed_trip for state in outcome.states] == [verdict is Verdict.TRIP] * is_written
    assert outcome.verdicts == {(Mode.OBSERVE, verdict): 1}


# --- drift -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seen", "drift", "is_drift"),
    [
        (Seen(EARLIER, drift=True), {"bounced": -1, "sent": 2, "total": 0}, True),
        (Seen(None, drift=True), {"sent": 2}, False),
        (Seen(EARLIER - timedelta(microseconds=1), drift=True), {"sent": 2}, False),  # recounted since
        (Seen(EARLIER, drift=False), {"sent": 2}, False),  # wrong only since
        (Seen(EARLIER, drift=True), {}, False),  # healed meanwhile
        (None, {"sent": 2}, False),
    ],
)
def test_drift_is_what_the_sweep_saw_and_nobody_recounted_since(
    seen: Seen | None, drift: dict[str, int], is_drift: bool
) -> None:
    done = work(trigger=Trigger.RECONCILIATION, hint=None, seen=seen)
    outcome = decided(done, recount(drift=drift, **NEVER_PUBLISHED))
    data = data_of(only(outcome, STATS))
    assert outcome.healed == int(is_drift)
    assert json.dumps(data.get("drift")) == ('{"sent": 2, "bounced": -1}' if is_drift else "null")
    assert data["trigger"] == "reconciliation"


def test_drift_of_a_campaign_that_was_never_synced_counts() -> None:
    done = work(trigger=Trigger.RECONCILIATION, seen=Seen(None, drift=True))
    assert decided(done, recount(synced_before=None, drift={"sent": 1})).healed == 1


def test_statuses_nobody_knows_are_reported_and_counted() -> None:
    outcome = decided(counted=recount(counts={"sent": 1, "opened": 2, "(null)": 1}, **NEVER_PUBLISHED))
    assert outcome.unknown_statuses == {"opened", "(null)"}
    assert data_of(only(outcome, STATS))["prospects_by_status"] == {"sent": 1, "(null)": 1, "opened": 2}
    assert [state.last_total for state in outcome.states] == [4]


# --- as others see it --------------------------------------------------------------------------------------------


class _Envelope(BaseModel):
    specversion: str
    id: UUID
    source: str
    type: str
    time: datetime
    subject: UUID
    datacontenttype: str


MODELS: dict[str, type[BaseModel]] = {
    STATS: events.CampaignStatsUpdatedV1,
    PAUSED: events.CampaignPausedV1,
    REJECTED: events.CampaignSyncRejectedV1,
}

counts_of = st.dictionaries(
    st.sampled_from(("pending", "sent", "replied", "bounced", "completed", "cancelled", "connected", "opened", "zzz")),
    st.integers(1, 10**6),
)


@given(
    counts=counts_of,
    published=st.none() | counts_of,
    status=st.sampled_from(("draft", "launching", "active", "paused", "completed")),
    name=st.text(st.characters(codec="utf-8", exclude_characters="\x00")),
    skip=st.none() | st.booleans() | st.lists(st.integers(0, 9)) | st.dictionaries(st.text("ab"), st.text("ab")),
    drift=st.dictionaries(st.sampled_from(("total", "sent", "completed", "message_sent")), st.integers(-9, 9)),
    done=st.sampled_from(
        (work(), asked(), asked(request(user_id=STRANGER)), work(hint=None, seen=Seen(EARLIER, drift=True)))
    ),
    judged=st.sampled_from((None, judgement(), pause(), pause(window=Window(101, 101)))),
)
def test_every_event_written_is_valid_for_those_who_read_it(
    counts: dict[str, int],
    published: dict[str, int] | None,
    status: str,
    name: str,
    skip: object,
    drift: dict[str, int],
    done: Work,
    judged: Judgement | None,
) -> None:
    row = campaign(status=status, name=name, skip_other_campaigns=skip)
    counted = recount(campaign=row, counts=counts, published_counts=published, drift=drift)
    outcome = decided(done, counted, judged)
    assert sum(outcome.told.values()) == len(outcome.outbox)
    for told in outcome.outbox:
        event = event_of(told)
        envelope = _Envelope.model_validate(event)
        assert (envelope.type, envelope.subject, told.campaign_id) == (told.type, CAMPAIGN, CAMPAIGN)
        MODELS[told.type].model_validate_json(json.dumps(event["data"]))
    # What we write is nothing we would take for a hint or a request.
    assert not any(
        isinstance(read, StatusHint | SyncRequest) for read in decode([Bytes(t.event) for t in outcome.outbox])
    )


@given(st.lists(st.sampled_from(("recounted", "locked", "later", "gone", "failing")), max_size=12))
def test_every_campaign_of_a_chunk_gets_exactly_one_end(ends: list[str]) -> None:
    works = [
        Work(campaign_id(n), Trigger.SYNC_REQUESTED, requests=(request(campaign_id=campaign_id(n)),))
        for n in range(len(ends))
    ]
    recounts = {
        campaign_id(n): recount(campaign=campaign(id=campaign_id(n)))
        for n, end in enumerate(ends)
        if end == "recounted"
    }
    holds = {
        campaign_id(n): held(campaign_id=campaign_id(n), reason=end)
        for n, end in enumerate(ends)
        if end not in ("recounted", "gone")
    }
    outcome = decide(works, recounts, holds, {}, now=NOW)
    assert outcome.recounted == ends.count("recounted")
    assert outcome.missing == ends.count("gone")
    answered = {row.campaign_id for row in outcome.outbox}
    waiting = {deferral.work.campaign_id for deferral in outcome.deferrals} | {one.campaign_id for one in outcome.later}
    assert answered | waiting == {campaign_id(n) for n in range(len(ends))}
    assert not answered & waiting
