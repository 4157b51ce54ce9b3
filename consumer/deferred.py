"""What could not be done at once: locked, huge, failing. One campaign per transaction, so nothing waits behind it."""

import asyncio
import time
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager, suppress
from datetime import datetime
from typing import Final, Protocol
from uuid import UUID

import structlog
from msgspec.structs import replace

from consumer import recount, tracing
from consumer.errors import ServiceError, TooSlow, described
from consumer.generation import Work
from consumer.health import Health
from consumer.metrics import Metrics
from consumer.outcome import Outcome, after_failure, put_off_locked
from consumer.recount import Rules, recount_campaigns, tally
from schemas.events import Trigger

POLL_S: Final = 1.0  # the guarantee; usually woken by a deferral or by the next row's due time
SHORTEST_WAIT_S: Final = 0.02  # what is due may be in another worker's hands

PRECEDENCE: Final = (Trigger.SYNC_REQUESTED, Trigger.STATUS_CHANGED, Trigger.RECONCILIATION)

log = structlog.get_logger(__name__)


class Transaction(recount.Transaction, Protocol):
    """What the worker does inside one transaction."""

    async def take_deferred(self) -> list[Work]: ...
    async def fail(self, campaign_id: UUID) -> tuple[int, UUID | None, datetime]: ...


class Store(Protocol):
    """Where deferred rows are."""

    def transaction(self) -> AbstractAsyncContextManager[Transaction]: ...
    async def next_due_s(self) -> float | None: ...


class Wake(Protocol):
    """Tells another engine that there is something to do."""

    def __call__(self) -> None: ...


class DeferredWorker:
    """Takes due rows of one campaign at a time and recounts it with the same code as the pipeline."""

    def __init__(self, store: Store, rules: Rules, metrics: Metrics, health: Health, *, wake_relay: Wake) -> None:
        self._store = store
        self._rules = rules
        self._metrics = metrics
        self._health = health
        self._wake_relay = wake_relay
        self._awake = asyncio.Event()

    def wake(self) -> None:
        """Something was deferred."""
        self._awake.set()

    async def run(self) -> None:
        """Work off what is due, until the process stops."""
        while not self._health.stopping:
            self._awake.clear()
            if await self._health.persist("deferred", self.turn):
                continue
            due_s = await self._health.persist("deferred", self._store.next_due_s)
            wait_s = POLL_S if due_s is None else min(max(due_s, SHORTEST_WAIT_S), POLL_S)
            with suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await self._awake.wait()

    async def turn(self) -> bool:
        """Work off one campaign; False when nothing is due."""
        begun = time.monotonic()
        async with self._store.transaction() as db:
            rows = await db.take_deferred()
            if not rows:
                return False
            work = merged(rows)
            try:
                with tracing.recounting([work]) as traced:
                    async with db.savepoint():
                        outcome = await recount_campaigns(db, traced, "worker", self._rules)
            except ServiceError:
                raise
            except TooSlow as slow:
                outcome = await (self._locked(db, work) if slow.is_lock else self._failed(db, work, slow))
            except Exception as error:
                outcome = await self._failed(db, work, error)
        tally(self._metrics, outcome, "worker", time.monotonic() - begun)
        self._health.progressed()
        if outcome.outbox:
            self._wake_relay()
        return True

    async def _locked(self, db: Transaction, work: Work) -> Outcome:
        """Somebody holds a lock on a whole table: no failure of this campaign's."""
        outcome = Outcome()
        put_off_locked(outcome, work)
        await db.save(outcome)
        return outcome

    async def _failed(self, db: Transaction, work: Work, error: Exception) -> Outcome:
        failures, owner, now = await db.fail(work.campaign_id)
        outcome, retry_s = after_failure(work, owner, failures, now)
        await db.save(outcome)
        log.error(
            "campaign cannot be recounted",
            campaign=str(work.campaign_id),
            failures=failures,
            retry_s=retry_s,
            **described(error),
        )
        return outcome


def merged(rows: Sequence[Work]) -> Work:
    """Rows of one campaign that were taken together become one: all requests, the earliest first written, the first
    trigger that applies, the last hint, the last thing the sweep saw."""
    requests = {(request.source, request.cause.id): request for row in rows for request in row.requests}
    last = max(rows, key=lambda row: row.tries)
    return replace(
        last,
        trigger=min((row.trigger for row in rows), key=PRECEDENCE.index),
        hint=next((row.hint for row in reversed(rows) if row.hint is not None), None),
        requests=tuple(requests.values()),
        seen=next((row.seen for row in reversed(rows) if row.seen is not None), None),
        first_written=min((row.first_written for row in rows if row.first_written is not None), default=None),
    )
