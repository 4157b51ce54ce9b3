"""What follows from a recount: pure decisions about what to save and what to tell."""

import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Final, Literal
from uuid import UUID, uuid5

import msgspec
from msgspec.structs import replace

from consumer import envelope
from consumer.envelope import Cause, SyncRequest
from consumer.generation import Work
from consumer.guard import Mode, Override, Resolved, Verdict, Window, rate_bp
from schemas import events
from schemas.events import RejectionReason, Trigger

SHARDS: Final = 32  # crc32(campaign id) % 32, fixed for ever: rows in the outbox carry it
HUGE_PROSPECTS: Final = 20_000  # as in campaign_stats.recalculate_campaign_stats
COOLDOWN_FACTOR: Final = 4  # a hot huge campaign takes at most 1/5 of its connection (design, section 6)
GIVE_UP_ANSWERING: Final = 5  # failures in a row after which waiting requests are answered `failed`
LONGEST_RETRY_S: Final = 3_600.0
HURRIED_RETRY_S: Final = 60.0  # a hint for a failing campaign brings its retry forward to this
LOCKED_FIRST_S: Final = 0.05
LOCKED_LONGEST_S: Final = 5.0

STATS_ALWAYS: Final = ("total", "sent", "replied", "bounced")
STATS_WHEN_SOME: Final = ("completed", "timed_out", "connection_sent", "connected", "message_sent")
STATUSES: Final = (
    "pending",
    "sent",
    "connection_sent",
    "connected",
    "message_sent",
    "replied",
    "bounced",
    "completed",
    "timed_out",
    "cancelled",
)
KNOWN_STATUSES: Final = frozenset(STATUSES)


Fact = Literal["news", "answer", "pause"]


class Campaign(msgspec.Struct, frozen=True, gc=False):  # like Recount thousands a second: made in a tenth of the time
    """A campaign's row as after the recount; `stats` as stored (jsonb has no order)."""

    id: UUID
    user_id: UUID
    type: str
    name: str
    status: str
    daily_limit: int | None
    stop_on_reply: bool | None
    open_tracking: bool | None
    skip_other_campaigns: object
    stats: Mapping[str, int]
    last_synced_at: datetime
    pause_reason: str | None
    created_at: datetime | None
    updated_at: datetime | None


@dataclass(frozen=True, slots=True)
class Details:
    """A campaign's row with what only its owner may see. `sender_accounts`: objects in id order."""

    campaign: Campaign
    signature: str | None
    operating_hours: object
    sender_accounts: Sequence[Mapping[str, object]]


class Recount(msgspec.Struct, frozen=True, gc=False):
    """One recounted campaign, its row locked: the truth, and what was known before.

    `counts`: status -> count without zeros. `drift`: truth minus stored, keys that differ. `published_counts` None:
    never published. `version` is that of the last thing told, 0 if none.
    """

    campaign: Campaign
    counts: Mapping[str, int]
    drift: Mapping[str, int]
    synced_before: datetime | None
    counted_at: datetime
    version: int
    published_counts: Mapping[str, int] | None
    published_status: str | None
    guard_paused_at: datetime | None
    observed_trip: bool
    last_total: int | None
    failures: int
    user_limits: Override | None
    campaign_limits: Override | None

    @property
    def total(self) -> int:
        """Number of prospects."""
        return sum(self.counts.values())


@dataclass(frozen=True, slots=True)
class Held:
    """A campaign that exists but was not recounted: `reason` locked, failing, huge or later."""

    campaign_id: UUID
    user_id: UUID
    reason: str
    retry_at: datetime | None
    failures: int
    now: datetime


@dataclass(frozen=True, slots=True)
class Judgement:
    """What the guard found for one candidate. `paused_at`: set when this judgement paused the campaign."""

    verdict: Verdict
    window: Window
    resolved: Resolved
    opened_at: datetime | None
    oldest_contact: datetime | None
    newest_contact: datetime | None
    decided_at: datetime
    paused_at: datetime | None = None
    campaign: Campaign | None = None  # the row as after the pause


@dataclass(frozen=True, slots=True)
class OutboxRow:
    """An event that must be published; `event` are its bytes, `since` when what led to it was written to Kafka."""

    campaign_id: UUID
    type: str
    event: bytes
    fact: Fact | None = None
    since: datetime | None = None

    @property
    def shard(self) -> int:
        """Which relay turn publishes it; the same for all events of a campaign."""
        return zlib.crc32(self.campaign_id.bytes) % SHARDS


@dataclass(frozen=True, slots=True)
class State:
    """What is remembered of a recounted campaign; `published` None = nothing new was published."""

    campaign_id: UUID
    version: int
    published: tuple[Mapping[str, int], str] | None
    guard_paused_at: datetime | None
    observed_trip: bool
    last_total: int
    cooldown_s: float | None


@dataclass(frozen=True, slots=True)
class Decision:
    """An audit row of the guard."""

    campaign_id: UUID
    version: int | None
    judgement: Judgement


@dataclass(frozen=True, slots=True)
class Deferral:
    """Work that is put off for `delay_s` seconds from now."""

    work: Work
    reason: str
    delay_s: float
    tries: int = 0


@dataclass(slots=True)
class Outcome:
    """Everything one transaction saves besides the counts themselves, and a tally for metrics and logs."""

    states: list[State] = field(default_factory=list)
    decisions: list[Decision] = field(default_factory=list)
    outbox: list[OutboxRow] = field(default_factory=list)
    deferrals: list[Deferral] = field(default_factory=list)
    hurried: list[UUID] = field(default_factory=list)  # failing campaigns whose retry is brought forward
    recounts: Mapping[UUID, Recount] = field(default_factory=dict)  # what it follows from
    later: list[Work] = field(default_factory=list)  # the chunk was full; goes into the next one
    recounted: int = 0
    missing: int = 0
    healed: int = 0  # campaigns whose drift the sweep had seen
    verdicts: Counter[tuple[Mode, Verdict]] = field(default_factory=Counter)
    told: Counter[str] = field(default_factory=Counter)  # event type -> rows
    unknown_statuses: set[str] = field(default_factory=set)

    def tell(self, row: OutboxRow) -> None:
        """Add an event."""
        self.outbox.append(row)
        self.told[row.type] += 1


def ordered_stats(stats: Mapping[str, int]) -> dict[str, int]:
    """`stats` in the order and with the presence of design section 2."""
    ordered = {key: stats.get(key, 0) for key in STATS_ALWAYS}
    ordered.update((key, stats[key]) for key in STATS_WHEN_SOME if stats.get(key))
    return ordered


def ordered_counts(counts: Mapping[str, int]) -> dict[str, int]:
    """`prospects_by_status`: known statuses first, in the order a prospect moves through them, then unknown ones."""
    ordered = {status: counts[status] for status in STATUSES if counts.get(status)}
    ordered.update((status, counts[status]) for status in sorted(counts.keys() - KNOWN_STATUSES) if counts[status])
    return ordered


def next_version(previous: int, now: datetime) -> int:
    """Always rising, also when the database lost transactions: the clock's microseconds or previous + 1 (section 4)."""
    return max(previous + 1, _microseconds(now))


def decide(
    works: Sequence[Work],
    recounts: Mapping[UUID, Recount],
    held: Mapping[UUID, Held],
    judged: Mapping[UUID, Judgement],
    unjudged: Iterable[UUID] = (),
    *,
    recount_s: float = 0.0,
    now: datetime,
) -> Outcome:
    """What to save and to tell about every work: recounted, held back, or gone.

    `unjudged`: candidates whose guard failed; they are deferred one by one. `recount_s`: what the recount took, for the
    cool-down of huge campaigns. `now`: the database's clock.
    """
    outcome = Outcome(recounts=recounts)
    unjudged = set(unjudged)
    for work in works:
        recount = recounts.get(work.campaign_id)
        if recount is not None:
            _recounted(outcome, work, recount, judged.get(work.campaign_id), recount_s)
            if work.campaign_id in unjudged:
                _defer_guard(outcome, work, recount)
        elif (hold := held.get(work.campaign_id)) is not None:
            _held(outcome, work, hold)
        else:
            outcome.missing += 1
            for request in work.requests:
                outcome.tell(_rejected(work, request, RejectionReason.NOT_FOUND, now))
    return outcome


def after_failure(work: Work, owner: UUID | None, failures: int, now: datetime) -> tuple[Outcome, float]:
    """What to save when a campaign's own recount raised for the `failures`-th time; also seconds until the retry."""
    outcome = Outcome()
    delay_s = min(2.0 ** min(failures - 1, 12), LONGEST_RETRY_S)
    outcome.deferrals.append(Deferral(_after_answers(outcome, work, owner, failures, now), "failing", delay_s))
    return outcome, delay_s


def _recounted(outcome: Outcome, work: Work, recount: Recount, judgement: Judgement | None, recount_s: float) -> None:
    outcome.recounted += 1
    if not recount.counts.keys() <= KNOWN_STATUSES:
        outcome.unknown_statuses |= recount.counts.keys() - KNOWN_STATUSES
    campaign = recount.campaign
    paused_at = None
    observed_trip = recount.observed_trip
    if judgement is not None:
        outcome.verdicts[judgement.resolved.limits.mode, judgement.verdict] += 1
        paused_at = judgement.paused_at
        campaign = judgement.campaign or campaign
        if judgement.resolved.limits.mode is Mode.OBSERVE:
            observed_trip = judgement.verdict is Verdict.TRIP

    drift: Mapping[str, int] | None = None
    if (
        work.seen is not None
        and work.seen.drift
        and work.seen.last_synced_at == recount.synced_before
        and recount.drift
    ):
        outcome.healed += 1
        drift = recount.drift

    foreign = [request for request in work.requests if request.user_id not in (None, campaign.user_id)]
    answered = [request for request in work.requests if request.user_id in (None, campaign.user_id)]
    news = (
        paused_at is not None
        or recount.published_counts != recount.counts
        or recount.published_status != campaign.status
    )
    version = recount.version
    if news or answered:
        version = next_version(recount.version, recount.counted_at)
        data = stats_updated(campaign, recount.counts, version, work.trigger, drift)
        if paused_at is not None and judgement is not None:
            outcome.tell(_paused(work, recount, judgement, paused_at, version))
        if news:
            outcome.tell(
                _row(work, "news", events.STATS_UPDATED, f"stats:{version}", recount.counted_at, data, work.hint)
            )
        for request in answered:
            outcome.tell(_answer(work, request, events.STATS_UPDATED, recount.counted_at, data))
    for request in foreign:
        outcome.tell(_rejected(work, request, RejectionReason.NOT_FOUND, recount.counted_at))

    if judgement is not None and (paused_at is not None or observed_trip != recount.observed_trip):
        outcome.decisions.append(Decision(campaign.id, version if paused_at is not None else None, judgement))
    total = recount.total
    is_huge = total > HUGE_PROSPECTS
    if (
        version != recount.version
        or total != recount.last_total
        or observed_trip != recount.observed_trip
        or recount.failures
        or is_huge
    ):
        outcome.states.append(
            State(
                campaign.id,
                version,
                (recount.counts, campaign.status) if news else None,
                paused_at or recount.guard_paused_at,
                observed_trip,
                total,
                COOLDOWN_FACTOR * recount_s if is_huge else None,
            )
        )


def _defer_guard(outcome: Outcome, work: Work, recount: Recount) -> None:
    tries = work.tries + 1 if work.reason == "guard" else 0
    again = replace(_without_requests(work), seen=None)
    outcome.deferrals.append(Deferral(again, "guard", min(2.0 ** min(tries, 12), LONGEST_RETRY_S), tries))


def put_off_locked(outcome: Outcome, work: Work) -> None:
    """Try again soon: locks are short."""
    tries = work.tries + 1 if work.reason == "locked" else 0
    delay_s = min(LOCKED_FIRST_S * 2.0 ** min(tries, 16), LOCKED_LONGEST_S)
    outcome.deferrals.append(Deferral(work, "locked", delay_s, tries))


def _held(outcome: Outcome, work: Work, hold: Held) -> None:
    if hold.reason == "later":
        outcome.later.append(work)
        return
    wait_s = max(0.0, (hold.retry_at - hold.now).total_seconds()) if hold.retry_at is not None else 0.0
    if hold.reason == "locked":
        put_off_locked(outcome, work)
    elif hold.reason == "huge":
        outcome.deferrals.append(Deferral(work, "huge", wait_s))
    else:
        if work.reason != "failing":  # news from outside: nothing healed should wait for an hour
            wait_s = min(wait_s, HURRIED_RETRY_S)
            outcome.hurried.append(work.campaign_id)
        rest = _after_answers(outcome, work, hold.user_id, hold.failures, hold.now)
        outcome.deferrals.append(Deferral(rest, "failing", wait_s))


def _after_answers(outcome: Outcome, work: Work, owner: UUID | None, failures: int, now: datetime) -> Work:
    """From the fifth failure on nobody is kept waiting: answer `failed` and keep only the recount to be done."""
    if failures < GIVE_UP_ANSWERING or not work.requests:
        return work
    for request in work.requests:
        foreign = owner is not None and request.user_id not in (None, owner)
        outcome.tell(_rejected(work, request, RejectionReason.NOT_FOUND if foreign else RejectionReason.FAILED, now))
    return _without_requests(work)


def _without_requests(work: Work) -> Work:
    """The same work once its requests were answered."""
    rest = Trigger.STATUS_CHANGED if work.hint is not None else Trigger.RECONCILIATION
    return replace(work, trigger=rest, requests=())


def stats_updated(
    campaign: Campaign,
    counts: Mapping[str, int],
    version: int,
    trigger: Trigger,
    drift: Mapping[str, int] | None,
) -> dict[str, object]:
    """Data of `campaign.stats_updated.v1`, keys in the documented order."""
    data: dict[str, object] = {
        "campaign": {
            "id": str(campaign.id),
            "user_id": str(campaign.user_id),
            "type": campaign.type,
            "name": campaign.name,
            "status": campaign.status,
            "daily_limit": campaign.daily_limit,
            "stop_on_reply": campaign.stop_on_reply,
            "open_tracking": campaign.open_tracking,
            "skip_other_campaigns": campaign.skip_other_campaigns,
            "stats": ordered_stats(campaign.stats),
            "last_synced_at": envelope.format_time(campaign.last_synced_at),
            "pause_reason": campaign.pause_reason,
            "created_at": campaign.created_at and envelope.format_time(campaign.created_at),
            "updated_at": campaign.updated_at and envelope.format_time(campaign.updated_at),
        }
    }
    if counts:
        data["prospects_by_status"] = ordered_counts(counts)
    data["version"] = version
    data["trigger"] = trigger
    if drift:
        data["drift"] = {key: drift[key] for key in (*STATS_ALWAYS, *STATS_WHEN_SOME) if drift.get(key)}
    return data


def _paused(work: Work, recount: Recount, judgement: Judgement, paused_at: datetime, version: int) -> OutboxRow:
    limits = judgement.resolved.limits
    campaign = recount.campaign
    data: dict[str, object] = {
        "campaign_id": str(campaign.id),
        "user_id": str(campaign.user_id),
        "reason": "bounce_rate",
        "version": version,
        "sent": judgement.window.sent,
        "bounced": judgement.window.bounced,
        "rate_bp": rate_bp(judgement.window),
        "threshold_bp": limits.threshold_bp,
        "min_sent": limits.min_sent,
        "window": limits.window,
        "previous_status": "active",
        "prospects_by_status": ordered_counts(recount.counts),
        "pending": recount.counts.get("pending", 0),
        "paused_at": envelope.format_time(paused_at),
    }
    return _row(work, "pause", events.PAUSED, f"paused:{version}", paused_at, data, work.hint)


def _rejected(work: Work, request: SyncRequest, reason: RejectionReason, now: datetime) -> OutboxRow:
    return _answer(
        work, request, events.SYNC_REJECTED, now, {"campaign_id": str(request.campaign_id), "reason": reason}
    )


def _answer(work: Work, request: SyncRequest, type_: str, now: datetime, data: Mapping[str, object]) -> OutboxRow:
    name = f"answer:{request.source}:{request.cause.id}"
    return _row(work, "answer", type_, name, now, data, request.cause)


def _row(
    work: Work, fact: Fact, type_: str, name: str, time: datetime, data: Mapping[str, object], cause: Cause | None
) -> OutboxRow:
    campaign_id = work.campaign_id
    event = envelope.encode(
        type=type_,
        id=str(uuid5(campaign_id, name)),
        time=time,
        subject=str(campaign_id),
        data=data,
        cause=cause,
    )
    since = None if work.trigger is Trigger.RECONCILIATION else work.since or work.first_written
    return OutboxRow(campaign_id, type_, event, fact, since)


def _microseconds(moment: datetime) -> int:
    return int(moment.timestamp()) * 1_000_000 + moment.microsecond
