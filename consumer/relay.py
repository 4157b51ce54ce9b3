"""Outbox shard -> publish -> delete what was acknowledged."""

import asyncio
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager, suppress
from typing import Final, Protocol
from uuid import UUID

import structlog

from consumer.errors import Unavailable
from consumer.health import Health
from consumer.metrics import Metrics

TURN_ROWS: Final = 2_000  # 1.2x the rate of 500 (measured); a turn holds its shards for as long as it sends
TURN_BYTES: Final = 4 * 1024 * 1024
ALONE_ROWS: Final = 100  # after a failed send the next rows go one by one, to find the one at fault
POLL_S: Final = 0.5  # the guarantee; a wake after a commit is the usual way

log = structlog.get_logger(__name__)


class Row(Protocol):
    """An event that waits in the outbox."""

    @property
    def id(self) -> int: ...
    @property
    def campaign_id(self) -> UUID: ...
    @property
    def type(self) -> str: ...
    @property
    def event(self) -> bytes: ...


class Sent(Protocol):
    """What became of a row: `error` None means acknowledged."""

    @property
    def error(self) -> str | None: ...
    @property
    def refused(self) -> bool: ...


class Transaction(Protocol):
    """What the relay does inside one transaction."""

    async def lock_shards(self) -> list[int]: ...
    async def read_outbox(self, shards: Sequence[int], rows: int, size: int) -> Sequence[Row]: ...
    async def finish_outbox(self, published: Sequence[int], refused: Mapping[int, str]) -> None: ...


class Store(Protocol):
    """Where the outbox is."""

    def transaction(self) -> AbstractAsyncContextManager[Transaction]: ...


class Publish(Protocol):
    """Publishes events; what became of each, in order. Raises Unavailable when Kafka cannot be reached at all."""

    async def __call__(self, rows: Sequence[tuple[str, UUID, bytes]], *, alone: bool) -> Sequence[Sent]: ...


class Relay:
    """Publishes what stands in the outbox, oldest first within each campaign, until it was acknowledged.

    Presence in the table is the only thing that counts: nothing is handed over in memory, so a crash loses nothing.
    """

    def __init__(self, store: Store, publish: Publish, metrics: Metrics, health: Health) -> None:
        self._store = store
        self._publish = publish
        self._metrics = metrics
        self._health = health
        self._awake = asyncio.Event()
        self._alone = False

    def wake(self) -> None:
        """Something was committed to the outbox."""
        self._awake.set()

    async def run(self) -> None:
        """Turn after turn, until the process stops."""
        while not self._health.stopping:
            self._awake.clear()
            if not await self._health.persist("relay", self.turn):
                with suppress(TimeoutError):
                    async with asyncio.timeout(POLL_S):
                        await self._awake.wait()

    async def turn(self) -> int:
        """Publish one turn's rows; how many were finished. Raises Unavailable when some were not acknowledged."""
        begun = time.monotonic()
        failure: str | None = None
        rows: Sequence[Row] = ()
        published: list[int] = []
        refused: dict[int, str] = {}
        alone, self._alone = self._alone, False  # batches again next time: one bad topic must not slow the others
        async with self._store.transaction() as db:
            shards = await db.lock_shards()
            if shards:
                rows = await db.read_outbox(shards, ALONE_ROWS if alone else TURN_ROWS, TURN_BYTES)
            if rows:
                results = await self._send(rows, alone=alone)
                stuck: set[UUID] = set()
                for row, sent in zip(rows, results, strict=True):
                    if row.campaign_id in stuck:
                        continue  # an elder of its campaign is not out yet: leave it, it is repeated in order
                    if sent.error is None:
                        published.append(row.id)
                    elif sent.refused and alone:
                        refused[row.id] = sent.error
                    else:
                        stuck.add(row.campaign_id)
                        failure = failure or sent.error
                if published or refused:
                    await db.finish_outbox(published, refused)
        if not rows:
            return 0
        self._count(rows, set(published), refused)
        self._metrics.relay_seconds.observe(time.monotonic() - begun)
        if failure is not None:
            self._alone = not alone
            self._metrics.publish_failures.inc()
            raise Unavailable("relay", failure)
        return len(published) + len(refused)

    async def _send(self, rows: Sequence[Row], *, alone: bool) -> Sequence[Sent]:
        try:
            return await self._publish([(row.type, row.campaign_id, row.event) for row in rows], alone=alone)
        except Unavailable as error:
            raise Unavailable("relay", error.detail) from error

    def _count(self, rows: Sequence[Row], published: set[int], refused: Mapping[int, str]) -> None:
        for row in rows:
            if row.id in published:
                self._metrics.published.labels(row.type).inc()
        for row_id, why in refused.items():
            self._metrics.set_aside.inc()
            log.error("event set aside", outbox_id=row_id, why=why)
