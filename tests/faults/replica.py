"""One replica of the service: the real engines on the real database, with a probe at every point where one may die."""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from typing import Literal, Protocol
from uuid import UUID

from prometheus_client import CollectorRegistry

from consumer.database import Connection, Database, Pending, Transaction
from consumer.deadletters import DeadLetters
from consumer.deferred import DeferredWorker
from consumer.generation import Work
from consumer.guard import Limits
from consumer.health import Health
from consumer.metrics import Metrics
from consumer.outcome import Held, Outcome, Recount
from consumer.pipeline import Pipeline
from consumer.reconcile import Sweep
from consumer.recount import Rules
from consumer.relay import Relay
from tests.faults.fakes import Member, Topics

STEP_DEADLINE_S = 30.0
GRACE_S = 3_600.0  # nothing of an example comes due by itself: time passes by a step of its own
LIMITS = Limits(threshold_bp=1_000, min_sent=10, window=20)

Point = Literal["begin", "taken", "recount", "recounted", "saved", "committed", "offsets", "read", "sent"]


class Probe(Protocol):
    """Sees every transaction of a replica and may do anything at any of its points.

    `committing` is held from a commit until `finished` has looked at what it left, so that it sees one at a time.
    """

    committing: asyncio.Lock

    async def arrive(self, replica: int, point: Point, turn: "Turn | None") -> None: ...
    async def recounted(self, turn: "Turn", recounts: Mapping[UUID, Mapping[str, int]]) -> None: ...
    async def finished(self, turn: "Turn") -> None: ...
    def writer_waits(self) -> AbstractAsyncContextManager[None]: ...


class Turn(Transaction):
    """One transaction, watched."""

    def __init__(self, connection: Connection, replica: int, probe: Probe) -> None:
        super().__init__(connection)
        self.connection = connection
        self.replica = replica
        self._probe = probe

    async def recount(self, campaign_ids: Sequence[UUID], caller: str) -> tuple[dict[UUID, Recount], dict[UUID, Held]]:
        """The real one, beside a writer that may commit while it waits."""
        await self._probe.arrive(self.replica, "recount", self)
        async with self._probe.writer_waits():
            recounts, held = await super().recount(campaign_ids, caller)
        await self._probe.recounted(self, {one: recount.counts for one, recount in recounts.items()})
        await self._probe.arrive(self.replica, "recounted", self)
        return recounts, held

    async def save(self, outcome: Outcome) -> None:
        """The real one."""
        await super().save(outcome)
        await self._probe.arrive(self.replica, "saved", self)

    async def take_deferred(self) -> list[Work]:
        """The real one."""
        works = await super().take_deferred()
        await self._probe.arrive(self.replica, "taken", self)
        return works

    async def read_outbox(
        self, shards: Sequence[int], rows: int, size: int, types: Sequence[str] | None = None
    ) -> list[Pending]:
        """The real one."""
        found = await super().read_outbox(shards, rows, size, types)
        await self._probe.arrive(self.replica, "read", self)
        return found

    async def finish_outbox(self, published: Sequence[int], refused: Mapping[int, str]) -> None:
        """The real one."""
        await self._probe.arrive(self.replica, "sent", self)
        await super().finish_outbox(published, refused)


class Watched(Database):
    """The service's database, its transactions watched by `probe`."""

    probe: Probe

    def __init__(self, url: str, replica: int) -> None:
        super().__init__(url)
        self._replica = replica

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[Turn]:
        """What is raised at `committed` is the loss of the commit's answer."""
        await self.probe.arrive(self._replica, "begin", None)
        async with AsyncExitStack() as one_at_a_time:
            async with super().transaction() as real:
                turn = Turn(real._connection, self._replica, self.probe)
                yield turn
                await one_at_a_time.enter_async_context(self.probe.committing)
            await self.probe.finished(turn)
        await self.probe.arrive(self._replica, "committed", None)


class Replica:
    """The engines of one process. Pipelines run as tasks; the others are stepped."""

    def __init__(self, number: int, database: Watched, member: Member, topics: Topics) -> None:
        self.number = number
        self.database = database
        self.member = member
        health, metrics, rules = Health(), Metrics(CollectorRegistry()), Rules(LIMITS)
        self.relay = Relay(database, topics.publish, metrics, health)
        self.deferred = DeferredWorker(database, rules, metrics, health, wake_relay=self.relay.wake)
        self.sweep = Sweep(
            database, LIMITS, metrics, health, interval_s=GRACE_S, grace_s=GRACE_S, retention_days=90
        )  # fmt: skip
        self.pipeline = Pipeline(
            member,
            database,
            DeadLetters(topics.bury),
            rules,
            metrics,
            health,
            wake_relay=self.relay.wake,
            wake_deferred=self.deferred.wake,
            commit_every_s=0,
        )
        jobs = self.pipeline.fetch(), self.pipeline.flush_for_ever(), self.pipeline.commit_for_ever()
        self._tasks = [asyncio.create_task(job) for job in jobs]

    async def collected(self) -> None:
        """Everything granted was collected; a flush may be under way."""
        await self._either(self.member.polling.wait())

    async def idle(self) -> None:
        """Everything collected was flushed and committed. Raises what ended a task."""
        async with asyncio.timeout(STEP_DEADLINE_S):
            await self.collected()
            pipeline = self.pipeline  # nothing public says so
            while pipeline._filled.is_set() or not (pipeline._idle.is_set() and pipeline._committed.is_set()):
                if pipeline._filled.is_set():
                    await self._either(asyncio.sleep(0))
                await self._either(pipeline._idle.wait())
                await self._either(pipeline._committed.wait())

    async def _either(self, waiting: object) -> None:
        """Wait, but not for a task that ended."""
        waiter = asyncio.ensure_future(waiting)  # type: ignore[call-overload]
        try:
            await asyncio.wait([waiter, *self._tasks], return_when=asyncio.FIRST_COMPLETED)
            for task in self._tasks:
                if task.done():
                    task.result()
        finally:
            waiter.cancel()

    async def kill(self) -> None:
        """The process is gone; its sessions are the caller's to end."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
