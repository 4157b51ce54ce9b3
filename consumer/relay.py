"""Outbox shard -> publish -> delete what was acknowledged."""

import asyncio
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager, suppress
from dataclasses import dataclass
from datetime import datetime
from typing import Final, Protocol
from uuid import UUID

import structlog

from consumer import tracing
from consumer.errors import Unavailable
from consumer.health import Health, backoff_s
from consumer.metrics import FACTS, Metrics
from consumer.outcome import SHARDS
from schemas.topics import WRITTEN

SOON_S: Final = 0.02  # after a turn that published: another replica may have found its shard in our hands meanwhile
TURN_ROWS: Final = 2_000  # 1.2x the rate of 500 (measured); a turn holds its shards for as long as it sends
TURN_BYTES: Final = 4 * 1024 * 1024
PROBE_ROWS: Final = 1  # of a type that is held back, to see whether its topic takes it again
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
    @property
    def since(self) -> datetime | None: ...
    @property
    def fact(self) -> str | None: ...


class Sent(Protocol):
    """What became of a row: `error` None means acknowledged, `refused` that it never can be.

    `closed`: its topic is missing or we may not write to it, which concerns this topic alone.
    """

    @property
    def error(self) -> str | None: ...
    @property
    def refused(self) -> bool: ...
    @property
    def closed(self) -> bool: ...


class Transaction(Protocol):
    """What the relay does inside one transaction."""

    async def lock_shards(self) -> list[int]: ...
    async def read_outbox(
        self, shards: Sequence[int], rows: int, size: int, types: Sequence[str] | None
    ) -> Sequence[Row]: ...
    async def finish_outbox(self, published: Sequence[int], refused: Mapping[int, str]) -> None: ...
    async def has_outbox(self, event_type: str) -> bool: ...


class Store(Protocol):
    """Where the outbox is."""

    def transaction(self) -> AbstractAsyncContextManager[Transaction]: ...


class Publish(Protocol):
    """Publishes events; what became of each, in order. Raises Unavailable when Kafka cannot be reached at all."""

    async def __call__(self, rows: Sequence[tuple[str, UUID, bytes]]) -> Sequence[Sent]: ...


@dataclass(slots=True)
class Hold:
    """A type whose topic is closed to us: when a row of it is tried again (monotonic), and how often that failed."""

    due: float
    tries: int = 0


class Relay:
    """Publishes what stands in the outbox, oldest first within each campaign and topic, until it was acknowledged.

    A type whose topic is missing or closed to us is held back, so that the others pass, and tried again by a single
    row with backoff; as long as one is held the relay is degraded.

    Presence in the table is the only thing that counts: nothing is handed over in memory, so a crash loses nothing.
    """

    def __init__(self, store: Store, publish: Publish, metrics: Metrics, health: Health) -> None:
        self._store = store
        self._publish = publish
        self._metrics = metrics
        self._health = health
        self._awake = asyncio.Event()
        self._held: dict[str, Hold] = {}
        self._is_more = False  # whether the last turn may have left something that it could have taken

    def wake(self) -> None:
        """Something was committed to the outbox."""
        self._awake.set()

    async def run(self) -> None:
        """Turn after turn, until the process stops."""
        while not self._health.stopping:
            self._awake.clear()
            done = await self._health.persist("relay", self.turn)
            if not self._is_more:
                with suppress(TimeoutError):
                    async with asyncio.timeout(SOON_S if done else POLL_S):
                        await self._awake.wait()

    async def turn(self) -> int:
        """Publish one turn's rows; how many were finished, and types that are held back from now on. Raises Unavailable
        when others were not acknowledged.
        """
        done = 0
        for event_type in [event_type for event_type, hold in self._held.items() if hold.due <= time.monotonic()]:
            done += await self._pass([event_type], PROBE_ROWS, probe=event_type)
        types = [event_type for event_type in WRITTEN if event_type not in self._held] if self._held else None
        return done + await self._pass(types, TURN_ROWS)

    async def _pass(self, types: Sequence[str] | None, limit: int, probe: str | None = None) -> int:
        begun = time.monotonic()
        failure: str | None = None
        rows: Sequence[Row] = ()
        published: list[int] = []
        refused: dict[int, str] = {}
        closed: dict[str, str] = {}
        async with self._store.transaction() as db:
            shards = await db.lock_shards()
            if shards:
                rows = await db.read_outbox(shards, limit, TURN_BYTES, types)
            if rows:
                results = await self._send(rows)
                stuck: set[tuple[UUID, str]] = set()
                for row, sent in zip(rows, results, strict=True):
                    if (row.campaign_id, row.type) in stuck:
                        continue  # an elder of its campaign and topic is not out yet: it is repeated, in order
                    if sent.error is None:
                        published.append(row.id)
                    elif sent.refused:
                        refused[row.id] = sent.error
                    else:
                        stuck.add((row.campaign_id, row.type))
                        if sent.closed or row.type == probe:
                            closed.setdefault(row.type, sent.error)
                        else:
                            failure = failure or sent.error
                if published or refused:
                    await db.finish_outbox(published, refused)
            # No row: another relay may have its shard, and nothing is known unless it has sent them all.
            is_open = bool(rows) or (probe is not None and not await db.has_outbox(probe))
        if probe is not None and is_open and probe not in closed:
            del self._held[probe]
            self._health.recovered(_holding(probe))
        newly_held = self._hold(closed)
        is_cut = len(rows) >= TURN_ROWS // SHARDS or sum(len(row.event) for row in rows) >= TURN_BYTES
        self._is_more = is_cut or newly_held > 0
        if not rows:
            return 0
        self._count(rows, set(published), refused)
        self._metrics.relay_seconds.observe(time.monotonic() - begun)
        if failure is not None or closed:
            self._metrics.publish_failures.inc()
        if failure is not None:
            raise Unavailable("relay", failure)
        return len(published) + len(refused) + newly_held

    def _hold(self, closed: Mapping[str, str]) -> int:
        """Hold these types back for a while, for the reasons given; how many were not held before."""
        newly = 0
        for event_type, why in closed.items():
            hold = self._held.get(event_type)
            newly += hold is None
            tries = 0 if hold is None else hold.tries + 1
            self._held[event_type] = Hold(time.monotonic() + backoff_s(tries), tries)
            self._health.lost("relay", _holding(event_type), why)
        return newly

    async def _send(self, rows: Sequence[Row]) -> Sequence[Sent]:
        try:
            with tracing.publishing([row.event for row in rows]):
                return await self._publish([(row.type, row.campaign_id, row.event) for row in rows])
        except Unavailable as error:
            raise Unavailable("relay", error.detail) from error

    def _count(self, rows: Sequence[Row], published: set[int], refused: Mapping[int, str]) -> None:
        now, is_traced = time.time(), tracing.is_on()
        delays = {fact: self._metrics.delay.labels(fact) for fact in FACTS}
        out = [row for row in rows if row.id in published]
        for event_type, count in Counter(row.type for row in out).items():
            self._metrics.published.labels(event_type).inc(count)
        for row in out:
            if row.since is not None and row.fact in delays:
                exemplar = tracing.exemplar(row.event) if is_traced else None
                delays[row.fact].observe(max(0.0, now - row.since.timestamp()), exemplar)
        for row_id, why in refused.items():
            self._metrics.set_aside.inc()
            log.error("event set aside", outbox_id=row_id, why=why)


def _holding(event_type: str) -> str:
    """Who is waiting, for Health."""
    return f"relay of {event_type}"
