"""The sync-stats door's engine: recount one campaign for somebody who waits on the line.

The same recount, guard and outbox as for events. Calls for one campaign that come while it is being recounted share the
next recount: each gets an answer that was counted after it had called.
"""

import asyncio
import time
from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Final, Protocol
from uuid import UUID

import structlog

from consumer import envelope, recount
from consumer.errors import NotNow, ServiceError, described
from consumer.generation import Work
from consumer.metrics import Metrics
from consumer.outcome import Details, ordered_counts, ordered_stats
from consumer.recount import Rules, recount_campaigns, tally
from schemas.door import FAILING, LOCKED, STOPPING
from schemas.events import Trigger

LOCKED_PATIENCE_S: Final = 5.0  # design, section 7
LOCKED_RETRY_S: Final = 0.05

log = structlog.get_logger(__name__)


class Transaction(recount.Transaction, Protocol):
    """What the door needs of an open transaction."""

    async def describe(self, campaign_id: UUID) -> Details: ...


class Store(Protocol):
    """Where recounts happen; connections of the door's own."""

    def transaction(self) -> AbstractAsyncContextManager[Transaction]: ...
    async def owner(self, campaign_id: UUID) -> UUID | None: ...


class Wake(Protocol):
    """Tells another engine that there is something to do."""

    def __call__(self) -> None: ...


class _Locked(Exception):
    """Somebody holds the campaign's row; rolls back what was begun."""


@dataclass(slots=True, eq=False)
class _Call:
    """One caller who waits: until when for a lock, and for what."""

    patience_ends: float
    answer: asyncio.Future[bytes | None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Door:
    """One per process."""

    def __init__(self, store: Store, rules: Rules, metrics: Metrics, *, wake_relay: Wake, wake_deferred: Wake) -> None:
        self._store = store
        self._rules = rules
        self._metrics = metrics
        self._wake_relay = wake_relay
        self._wake_deferred = wake_deferred
        self._calls: dict[UUID, list[_Call]] = {}
        self._serving: set[asyncio.Task[None]] = set()

    async def sync(self, campaign_id: UUID, user_id: UUID | None) -> bytes | None:
        """The answer's JSON after a recount; None when there is no such campaign or it is not this user's (None: any).

        Raises NotNow when the campaign stays locked or cannot be recounted, Unavailable for an outage.
        """
        owner = await self._store.owner(campaign_id)
        if owner is None or user_id not in (None, owner):
            return None
        call = _Call(time.monotonic() + LOCKED_PATIENCE_S)
        calls = self._calls.setdefault(campaign_id, [])
        calls.append(call)
        if len(calls) == 1:
            task = asyncio.create_task(self._serve(campaign_id, calls), name=f"door {campaign_id}")
            self._serving.add(task)
            task.add_done_callback(self._serving.discard)
        return await call.answer

    async def _serve(self, campaign_id: UUID, calls: list[_Call]) -> None:
        """Recount until nobody waits any more. Only this task takes calls from the list."""
        while calls:
            served: list[_Call] = []
            try:
                answer = await self._recount(campaign_id, calls, served)
            except _Locked:
                await self._wait_for_lock(calls)
                continue
            except ServiceError as error:
                self._finish(calls, served or list(calls), error)
            except Exception as error:
                log.error("campaign cannot be recounted", campaign=str(campaign_id), **described(error))
                self._finish(calls, served or list(calls), NotNow(FAILING, 60))
            else:
                for call in served:
                    calls.remove(call)
                    if not call.answer.done():
                        call.answer.set_result(answer)
        del self._calls[campaign_id]

    async def _recount(self, campaign_id: UUID, calls: list[_Call], served: list[_Call]) -> bytes | None:
        async with self._store.transaction() as db:
            served.extend(calls)  # whoever calls from here on may know of a change that this recount does not see
            begun = time.monotonic()
            outcome = await recount_campaigns(db, [Work(campaign_id, Trigger.SYNC_REQUESTED)], "door", self._rules)
            found = outcome.recounts.get(campaign_id)
            if found is None and not outcome.missing:
                raise _Locked
            details = await db.describe(campaign_id) if found is not None else None
        tally(self._metrics, outcome, "door", time.monotonic() - begun)
        if outcome.outbox:
            self._wake_relay()
        if outcome.deferrals:
            self._wake_deferred()
        return None if found is None or details is None else answer_of(details, found.counts)

    async def _wait_for_lock(self, calls: list[_Call]) -> None:
        now = time.monotonic()
        late = [call for call in calls if call.patience_ends <= now]
        self._finish(calls, late, NotNow(LOCKED, 1))
        if calls:
            await asyncio.sleep(LOCKED_RETRY_S)

    @staticmethod
    def _finish(calls: list[_Call], these: list[_Call], error: Exception) -> None:
        for call in these:
            calls.remove(call)
            if not call.answer.done():
                call.answer.set_exception(error)

    async def close(self) -> None:
        """Give up what still runs; the callers get an error."""
        for task in self._serving:
            task.cancel()
        await asyncio.gather(*self._serving, return_exceptions=True)
        for calls in self._calls.values():
            self._finish(calls, list(calls), NotNow(STOPPING, 1))
        self._calls.clear()


def answer_of(details: Details, counts: Mapping[str, int]) -> bytes:
    """The documented answer, keys in the documented order."""
    campaign = details.campaign
    document: dict[str, object] = {
        "campaign": {
            "id": str(campaign.id),
            "user_id": str(campaign.user_id),
            "type": campaign.type,
            "name": campaign.name,
            "status": campaign.status,
            "daily_limit": campaign.daily_limit,
            "stop_on_reply": campaign.stop_on_reply,
            "open_tracking": campaign.open_tracking,
            "signature": details.signature,
            "skip_other_campaigns": campaign.skip_other_campaigns,
            "operating_hours": details.operating_hours,
            "stats": ordered_stats(campaign.stats),
            "last_synced_at": envelope.format_time(campaign.last_synced_at),
            "pause_reason": campaign.pause_reason,
            "created_at": campaign.created_at and envelope.format_time(campaign.created_at),
            "updated_at": campaign.updated_at and envelope.format_time(campaign.updated_at),
            "sender_accounts": [
                {key: account[key] for key in ("id", "type", "email_address", "display_name", "status", "daily_limit")}
                for account in details.sender_accounts
            ],
        }
    }
    if counts:
        document["prospects_by_status"] = ordered_counts(counts)
    return envelope.to_json(document)
