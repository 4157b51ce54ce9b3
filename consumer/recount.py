"""The one way a campaign is recounted, whoever asks: pipeline, deferred worker, door. Recount, guard, decide, save."""

import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from datetime import datetime
from typing import Final, Literal, Protocol
from uuid import UUID

import structlog

from consumer.errors import Unavailable, described
from consumer.generation import Work
from consumer.guard import Limits, Mode, Resolved, Verdict, Window, applies, is_candidate, judge, resolve
from consumer.metrics import Metrics
from consumer.outcome import Campaign, Held, Judgement, Outcome, Recount, decide

Caller = Literal["chunk", "worker", "door"]

REMEMBERED: Final = 1_000  # unknown statuses and wrong limits logged once each; beyond that nothing new is remembered

log = structlog.get_logger(__name__)


class WindowRead(Protocol):
    """The guard's window of one candidate as read from the database."""

    @property
    def window(self) -> Window: ...
    @property
    def oldest_contact(self) -> datetime | None: ...
    @property
    def newest_contact(self) -> datetime | None: ...
    @property
    def decided_at(self) -> datetime: ...


class Transaction(Protocol):
    """What a recount needs of an open transaction."""

    async def recount(
        self, campaign_ids: Sequence[UUID], caller: str
    ) -> tuple[dict[UUID, Recount], dict[UUID, Held]]: ...
    async def windows(self, candidates: Sequence[tuple[UUID, int, datetime | None]]) -> Mapping[UUID, WindowRead]: ...
    async def pause(self, campaign_ids: Sequence[UUID]) -> dict[UUID, tuple[datetime, Campaign]]: ...
    async def save(self, outcome: Outcome) -> None: ...
    async def now(self) -> datetime: ...
    def savepoint(self) -> AbstractAsyncContextManager[None]: ...


@dataclass(slots=True)
class Rules:
    """The guard's default limits, and what was logged once already."""

    limits: Limits
    logged: set[str] = field(default_factory=set)
    default: Resolved = field(init=False)

    def __post_init__(self) -> None:
        """Resolve once what holds for nearly every campaign."""
        self.default = resolve(self.limits, None, None)

    def once(self, thing: str) -> bool:
        """True the first time `thing` comes up."""
        if thing in self.logged or len(self.logged) >= REMEMBERED:
            return False
        self.logged.add(thing)
        return True


async def recount_campaigns(db: Transaction, works: Sequence[Work], caller: Caller, rules: Rules) -> Outcome:
    """Recount the campaigns of `works` inside the caller's transaction and save what follows.

    Two round trips, three more when the guard has candidates. The outcome is only true once the transaction committed.
    Raises Unavailable for an outage; any other error of the recount itself is the caller's to defer.
    """
    begun = time.monotonic()
    recounts, held = await db.recount([work.campaign_id for work in works], caller)
    recount_s = time.monotonic() - begun
    judged, unjudged = await _guard(db, recounts, rules)
    now = next((r.counted_at for r in recounts.values()), None) or next((h.now for h in held.values()), None)
    outcome = decide(
        works, recounts, held, judged, unjudged, recount_s=recount_s, now=now if now is not None else await db.now()
    )
    await db.save(outcome)
    for status in outcome.unknown_statuses:
        if rules.once(f"status {status}"):
            log.warning("unknown prospect status counted in total only", status=status[:64])
    return outcome


async def _guard(
    db: Transaction, recounts: Mapping[UUID, Recount], rules: Rules
) -> tuple[dict[UUID, Judgement], list[UUID]]:
    """Judge the candidates and pause those that trip, in a savepoint of its own; also who could not be judged."""
    candidates: dict[UUID, tuple[Recount, Resolved]] = {}
    for campaign_id, recount in recounts.items():
        resolved = limits_of(recount, rules)
        limits = resolved.limits
        if limits.mode is Mode.OBSERVE and recount.observed_trip:
            candidates[campaign_id] = (recount, resolved)  # its verdict may change, also without a pause
        elif applies(recount.campaign.type, recount.campaign.status, limits.mode) is None and is_candidate(
            recount.counts, limits, paused_before=recount.guard_paused_at is not None
        ):
            candidates[campaign_id] = (recount, resolved)
    if not candidates:
        return {}, []
    try:
        async with db.savepoint():
            return await _judge(db, candidates), []
    except Unavailable:
        raise
    except Exception as error:
        # Best effort: counting must not stop because judging fails. One campaign at a time, until it succeeds.
        log.error("guard failed, its candidates are deferred", campaigns=len(candidates), **described(error))
        return {}, list(candidates)


async def _judge(db: Transaction, candidates: Mapping[UUID, tuple[Recount, Resolved]]) -> dict[UUID, Judgement]:
    windows = await db.windows(
        [
            (campaign_id, resolved.limits.window, recount.guard_paused_at)
            for campaign_id, (recount, resolved) in candidates.items()
        ]
    )
    verdicts = {
        campaign_id: judge(recount.campaign.type, recount.campaign.status, resolved.limits, windows[campaign_id].window)
        for campaign_id, (recount, resolved) in candidates.items()
    }
    tripped = [
        campaign_id
        for campaign_id, verdict in verdicts.items()
        if verdict is Verdict.TRIP and candidates[campaign_id][1].limits.mode is Mode.ENFORCE
    ]
    paused = await db.pause(tripped) if tripped else {}
    judged = {}
    for campaign_id, (recount, resolved) in candidates.items():
        read = windows[campaign_id]
        paused_at, campaign = paused.get(campaign_id, (None, None))
        judged[campaign_id] = Judgement(
            verdicts[campaign_id],
            read.window,
            resolved,
            recount.guard_paused_at,
            read.oldest_contact,
            read.newest_contact,
            read.decided_at,
            paused_at,
            campaign,
        )
    return judged


def limits_of(recount: Recount, rules: Rules) -> Resolved:
    """The limits that hold for this campaign; a wrong row is logged once and its level ignored."""
    if recount.user_limits is None and recount.campaign_limits is None:
        return rules.default
    resolved = resolve(rules.limits, recount.user_limits, recount.campaign_limits)
    for problem in resolved.ignored:
        if rules.once(f"{recount.campaign.id} {problem}"):
            log.warning("guard limits ignored", campaign=str(recount.campaign.id), problem=problem)
    return resolved


def tally(metrics: Metrics, outcome: Outcome, caller: str, seconds: float) -> None:
    """Count what a committed recount transaction did."""
    metrics.recount_seconds.labels(caller).observe(seconds)
    if outcome.recounted:
        metrics.recounts.labels(caller).inc(outcome.recounted)
    if outcome.missing:
        metrics.campaigns_missing.inc(outcome.missing)
    if outcome.healed:
        metrics.drift_found.inc(outcome.healed)
    for (mode, verdict), count in outcome.verdicts.items():
        metrics.guard_decisions.labels(mode, verdict).inc(count)
    for decision in outcome.decisions:
        if decision.version is not None:
            metrics.pauses.inc()
            window = decision.judgement.window
            log.warning(
                "campaign paused for its bounce rate",
                campaign=str(decision.campaign_id),
                sent=window.sent,
                bounced=window.bounced,
                version=decision.version,
            )
    for deferral in outcome.deferrals:
        metrics.deferred.labels(deferral.reason).inc()
