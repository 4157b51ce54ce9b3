"""The sweep: finds what differs from the truth, or from what was published, and defers it. Changes nothing itself."""

import asyncio
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from datetime import datetime
from typing import Final, Protocol
from uuid import UUID

import structlog

from consumer.errors import Unavailable, described
from consumer.generation import Seen, Work
from consumer.guard import Limits, Mode, Override, Resolved, Verdict, Window, applies, is_candidate, judge, resolve
from consumer.health import Health
from consumer.metrics import Metrics
from consumer.outcome import Deferral, Outcome
from schemas.events import Trigger

PAGE_CAMPAIGNS: Final = 500
IDLE_S: Final = 1.0  # how often a replica asks whether a lap is due
RETENTION_EVERY_S: Final = 3_600.0

log = structlog.get_logger(__name__)


class Compared(Protocol):
    """A campaign as the sweep sees it, unlocked."""

    @property
    def campaign_id(self) -> UUID: ...
    @property
    def type(self) -> str: ...
    @property
    def status(self) -> str: ...
    @property
    def last_synced_at(self) -> datetime | None: ...
    @property
    def counts(self) -> Mapping[str, int]: ...
    @property
    def drift(self) -> Mapping[str, int]: ...
    @property
    def differs(self) -> bool: ...
    @property
    def waiting(self) -> bool: ...
    @property
    def guard_paused_at(self) -> datetime | None: ...
    @property
    def user_limits(self) -> Override | None: ...
    @property
    def campaign_limits(self) -> Override | None: ...


class WindowRead(Protocol):
    """The guard's window of one candidate."""

    @property
    def window(self) -> Window: ...


class Transaction(Protocol):
    """What the sweep does inside one transaction."""

    async def sweep_turn(self) -> tuple[UUID | None, datetime | None] | None: ...
    async def sweep_page(self, after: UUID | None, campaigns: int) -> Sequence[Compared]: ...
    async def sweep_next(self, after: UUID | None) -> UUID | None: ...
    async def sweep_advance(self, after: UUID | None, interval_s: float) -> None: ...
    async def windows(self, candidates: Sequence[tuple[UUID, int, datetime | None]]) -> Mapping[UUID, WindowRead]: ...
    async def save(self, outcome: Outcome) -> None: ...
    def savepoint(self) -> AbstractAsyncContextManager[None]: ...


class Store(Protocol):
    """Where the campaigns are."""

    def transaction(self) -> AbstractAsyncContextManager[Transaction]: ...
    async def forget(self, days: int) -> int: ...


class Sweep:
    """All campaigns, every status, page by page; one replica at a time holds the cursor's row."""

    def __init__(
        self,
        store: Store,
        limits: Limits,
        metrics: Metrics,
        health: Health,
        *,
        interval_s: float,
        grace_s: float,
        retention_days: int,
    ) -> None:
        self._store = store
        self._limits = limits
        self._metrics = metrics
        self._health = health
        self._interval_s = interval_s
        self._grace_s = grace_s
        self._retention_days = retention_days
        self._forgot_at: float | None = None
        self._campaigns = PAGE_CAMPAIGNS

    async def run(self) -> None:
        """Lap after lap, until the process stops."""
        while not self._health.stopping:
            if not await self._health.persist("sweep", self.page):
                await self._health.persist("sweep", self._forget)
                await asyncio.sleep(min(IDLE_S, self._interval_s))

    async def page(self) -> bool:
        """Compare one page; False when none is due or another replica sweeps."""
        begun = time.monotonic()
        async with self._store.transaction() as db:
            turn = await db.sweep_turn()
            if turn is None:
                return False
            compared, last_id = await self._compared(db, turn[0])
            outcome = Outcome()
            would_pause = await self._would_pause(db, compared)
            for campaign in compared:
                if not campaign.waiting and (campaign.differs or campaign.campaign_id in would_pause):
                    outcome.deferrals.append(self._deferral(campaign))
            await db.save(outcome)
            await db.sweep_advance(last_id, self._interval_s)
        self._metrics.sweep_pages.inc()
        self._metrics.sweep_campaigns.inc(len(compared))
        self._metrics.sweep_seconds.observe(time.monotonic() - begun)
        self._metrics.sweep_deferred.inc(len(outcome.deferrals))
        self._metrics.deferred.labels("sweep").inc(len(outcome.deferrals))
        if last_id is None:
            self._metrics.sweep_laps.inc()
        if outcome.deferrals:
            log.info("sweep found differences", campaigns=len(outcome.deferrals), of=len(compared))
        return True

    async def _compared(self, db: Transaction, after: UUID | None) -> tuple[Sequence[Compared], UUID | None]:
        """A page, smaller where it takes too long or fails; its last id, None when the lap ends."""
        while True:
            try:
                async with db.savepoint():
                    compared = await db.sweep_page(after, self._campaigns)
            except Unavailable:
                raise
            except Exception as error:
                # Too large, or rows that cannot be read: it must not keep every replica's sweep from the others.
                if self._campaigns == 1:  # only its own recount can tell whether it is right
                    skipped = await db.sweep_next(after)
                    log.error(
                        "campaign cannot be compared, left out of this lap", campaign=str(skipped), **described(error)
                    )
                    return [], skipped
                self._campaigns = max(1, self._campaigns // 8)
            else:
                last_id = None if len(compared) < self._campaigns else compared[-1].campaign_id
                self._campaigns = min(PAGE_CAMPAIGNS, self._campaigns * 2)
                return compared, last_id

    def _deferral(self, campaign: Compared) -> Deferral:
        seen = Seen(campaign.last_synced_at, drift=bool(campaign.drift))
        return Deferral(Work(campaign.campaign_id, Trigger.RECONCILIATION, seen=seen), "sweep", self._grace_s)

    async def _would_pause(self, db: Transaction, compared: Sequence[Compared]) -> set[UUID]:
        """Active email campaigns that the guard would pause now: after an error, a lowered threshold, a new mode."""
        candidates: dict[UUID, tuple[Compared, Resolved]] = {}
        for campaign in compared:
            resolved = resolve(self._limits, campaign.user_limits, campaign.campaign_limits)
            if (
                resolved.limits.mode is Mode.ENFORCE
                and applies(campaign.type, campaign.status, resolved.limits.mode) is None
                and is_candidate(campaign.counts, resolved.limits, paused_before=campaign.guard_paused_at is not None)
            ):
                candidates[campaign.campaign_id] = (campaign, resolved)
        if not candidates:
            return set()
        try:
            async with db.savepoint():
                windows = await db.windows(
                    [
                        (campaign_id, resolved.limits.window, campaign.guard_paused_at)
                        for campaign_id, (campaign, resolved) in candidates.items()
                    ]
                )
        except Unavailable:
            raise
        except Exception as error:
            # Best effort, as in a recount: comparing must not stop because judging fails. The next lap tries again.
            log.error("guard failed in the sweep", campaigns=len(candidates), **described(error))
            return set()
        return {
            campaign_id
            for campaign_id, (campaign, resolved) in candidates.items()
            if judge(campaign.type, campaign.status, resolved.limits, windows[campaign_id].window) is Verdict.TRIP
        }

    async def _forget(self) -> None:
        if self._forgot_at is not None and time.monotonic() - self._forgot_at < RETENTION_EVERY_S:
            return
        gone = await self._store.forget(self._retention_days)
        self._forgot_at = time.monotonic()
        if gone:
            log.info("retention applied", rows=gone)
