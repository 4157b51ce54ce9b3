"""A fake group, store and dead-letter topic around a real pipeline, and what is true outside."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime
from uuid import UUID

import pytest
from prometheus_client import CollectorRegistry

from consumer.envelope import DeadLetter, Record
from consumer.errors import OwnershipLost, Unavailable
from consumer.generation import Partition, Passed
from consumer.guard import Limits
from consumer.health import Health
from consumer.metrics import Metrics
from consumer.outcome import Campaign, Held, Outcome, Recount
from consumer.pipeline import Pipeline
from consumer.recount import Rules, WindowRead
from tests.unit.builders import (
    NOW,
    Batch,
    Bytes,
    campaign,
    held,
    hint_event,
    recount,
    request_event,
)

TOPIC = "prospect.status-changed"
CHUNK = 4  # campaigns, so that a generation has several chunks
SHARED = 99_993  # is recounted at once, see Transaction
STEPS = 5_000  # turns of the event loop; far more than any example needs


@dataclass
class World:
    """What is true outside: who is done, deferred, answered; and how the next operations end (`ok` when used up)."""

    store_plan: list[str] = field(default_factory=list)
    commit_plan: list[str] = field(default_factory=list)
    letter_plan: list[str] = field(default_factory=list)
    is_forgetful: bool = False
    log: list[str] = field(default_factory=list)
    delivered: list[Bytes] = field(default_factory=list)
    done: set[Bytes] = field(default_factory=set)
    outcomes: list[Outcome] = field(default_factory=list)
    committed: dict[Partition, int] = field(default_factory=dict)
    hold: asyncio.Event | None = None  # transactions wait for it
    hold_commits: asyncio.Event | None = None  # commits of offsets wait for it

    def record(self, partition: int, offset: int, kind: str) -> Bytes:
        """The record at this place; `shared` hints are all for one campaign, others for one each."""
        number = 1 + 10_000 * partition + offset
        identity = f"{partition}-{offset}"
        value: bytes | None
        match kind:
            case "shared":
                value = json.dumps(hint_event(SHARED, id=identity)).encode()
            case "request":
                value = json.dumps(request_event(number, id=identity)).encode()
            case "bad":
                value = b"no json"
            case "tombstone":
                value = None
            case _:
                value = json.dumps(hint_event(number, id=identity)).encode()
        return Bytes(value, topic=TOPIC, partition=partition, offset=offset)

    def is_done(self, record: Bytes) -> bool:
        return record.value is None or record in self.done

    def finish(self, known: Sequence[Bytes], recounted: set[UUID], outcome: Outcome) -> None:
        """A transaction committed."""
        if self.is_forgetful:
            return
        self.outcomes.append(outcome)
        deferred = {deferral.work.campaign_id for deferral in outcome.deferrals}
        kept = {request.cause.id for deferral in outcome.deferrals for request in deferral.work.requests}
        answered = {json.loads(row.event).get("causationid") for row in outcome.outbox}
        for record in known:
            try:
                event = json.loads(record.value or b"")
            except ValueError:
                continue
            if event["type"].startswith("campaign.sync_requested"):
                if event["id"] in kept | answered:
                    self.done.add(record)
            elif UUID(event["data"]["campaign_id"]) in recounted | deferred:
                self.done.add(record)


def next_of(plan: list[str]) -> str:
    return plan.pop(0) if plan else "ok"


class Source:
    """The group's side: hands out what is pending, checks every commit that it accepts."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.pending: list[tuple[list[Batch], list[Passed]]] = []
        self.bell = asyncio.Event()
        self.polls = 0
        self.paused = False
        self.behind = 0

    def deliver(self, batches: list[Batch], passed: Sequence[Passed] = ()) -> None:
        self.pending.append((batches, list(passed)))
        self.bell.set()

    async def poll(self) -> tuple[list[Batch], list[Passed]]:
        self.polls += 1
        while not self.pending:
            self.bell.clear()
            await self.bell.wait()
        batches, passed = self.pending.pop(0)
        for batch in batches:
            self.world.delivered.extend(batch.records)
        return batches, passed

    def pause(self) -> None:
        self.paused = True
        self.world.log.append("pause")

    def resume(self) -> None:
        self.paused = False
        self.world.log.append("resume")

    async def commit(self, offsets: Mapping[Partition, int]) -> None:
        await asyncio.sleep(0)
        if self.world.hold_commits is not None:
            await self.world.hold_commits.wait()
        match next_of(self.world.commit_plan):
            case "away":
                raise Unavailable("kafka", "no coordinator")
            case "refused":
                raise OwnershipLost("a rebalance is under way")
        for partition, offset in offsets.items():
            undone = [
                record
                for record in self.world.delivered
                if (record.topic, record.partition) == partition
                and record.offset < offset
                and not self.world.is_done(record)
            ]
            assert not undone, f"offset {offset} of {partition} passes {undone[0].offset}, which is not done"
            assert offset >= self.world.committed.get(partition, 0), "an older generation was committed after a newer"
            self.world.committed[partition] = offset
        self.world.log.append("commit")


class Store:
    """The database's side: a transaction that raises leaves no trace."""

    def __init__(self, world: World) -> None:
        self.world = world

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator["Transaction"]:
        fate = next_of(self.world.store_plan)
        await asyncio.sleep(0)
        if fate == "away at begin":
            raise Unavailable("database", "no connection")
        turn = Transaction(self.world, fate)
        yield turn
        if self.world.hold is not None:
            await self.world.hold.wait()
        await asyncio.sleep(0)
        if fate == "away at commit":
            raise Unavailable("database", "lost at the commit")
        self.world.finish(turn.known, turn.recounted, turn.outcome)
        self.world.log.append("transaction")


class Transaction:
    """Records recounts; campaigns have their fate by number, so that it is the same at every try."""

    def __init__(self, world: World, fate: str) -> None:
        self.world = world
        self.fate = fate
        self.known = list(world.delivered)
        self.recounted: set[UUID] = set()
        self.outcome = Outcome()

    async def recount(self, campaign_ids: Sequence[UUID], caller: str) -> tuple[dict[UUID, Recount], dict[UUID, Held]]:
        assert caller == "chunk"
        assert 0 < len(set(campaign_ids)) == len(campaign_ids) <= CHUNK
        self.known = list(self.world.delivered)
        await asyncio.sleep(0)
        if self.fate == "away":
            raise Unavailable("database", "read-only")
        if self.fate == "error":
            raise ValueError("a trigger of the product raised")
        recounts: dict[UUID, Recount] = {}
        holds: dict[UUID, Held] = {}
        for place, name in enumerate(campaign_ids):
            if self.fate == "full" and place > 0:
                holds[name] = held(campaign_id=name, reason="later")
            elif name.bytes[0] % 5 == 0:
                holds[name] = held(campaign_id=name, reason=("locked", "huge", "failing")[name.bytes[1] % 3])
            else:
                self.recounted.add(name)
                if name.bytes[0] % 5 != 1:  # else it is gone
                    recounts[name] = recount(campaign=campaign(id=name, type="linkedin"))
        return recounts, holds

    async def save(self, outcome: Outcome) -> None:
        await asyncio.sleep(0)
        if self.fate == "error at save" and self.recounted:  # a deferral that fails like that would be a bug
            raise ValueError("a value nobody thought of")
        self.outcome = outcome

    async def now(self) -> datetime:
        return NOW

    async def windows(self, candidates: Sequence[tuple[UUID, int, datetime | None]]) -> Mapping[UUID, WindowRead]:
        raise AssertionError("nobody here is a candidate")

    async def pause(self, campaign_ids: Sequence[UUID]) -> dict[UUID, tuple[datetime, Campaign]]:
        raise AssertionError("nobody here is a candidate")

    @asynccontextmanager
    async def savepoint(self) -> AsyncIterator[None]:
        yield


class Letters:
    """The dead-letter topic."""

    def __init__(self, world: World) -> None:
        self.world = world

    async def records(self, letters: Sequence[tuple[Record, DeadLetter]]) -> None:
        await asyncio.sleep(0)
        if next_of(self.world.letter_plan) == "away":
            raise Unavailable("kafka", "no broker")
        for record, _ in letters:
            self.world.done.add(
                Bytes(record.value, topic=record.topic, partition=record.partition, offset=record.offset)
            )
        self.world.log.append(f"{len(letters)} dead letters")

    async def stubs(self, passed: Sequence[Passed]) -> None:
        await asyncio.sleep(0)
        self.world.log.extend(f"stub {stub.first}-{stub.last}" for stub in passed)


@dataclass
class Run:
    """A pipeline at work between the fakes."""

    world: World
    source: Source
    pipeline: Pipeline
    metrics: Metrics
    tasks: list[asyncio.Task[None]]

    async def until(self, condition: Callable[[], bool]) -> None:
        """Let the tasks run until this holds; what a task raises is raised here."""
        for _ in range(STEPS):
            for task in self.tasks:
                if task.done():
                    task.result()
            if condition():
                return
            await asyncio.sleep(0)
        pytest.fail("what was waited for never happened")

    async def steps(self, count: int) -> None:
        for _ in range(count):
            await self.until(lambda: True)
            await asyncio.sleep(0)

    def value(self, name: str, **labels: str) -> float:
        return self.metrics.registry.get_sample_value(f"campaign_stats_{name}", labels) or 0.0


@asynccontextmanager
async def running(world: World, *, commit_every_s: float = 0) -> AsyncIterator[Run]:
    source, metrics = Source(world), Metrics(CollectorRegistry())
    woken: list[str] = world.log
    pipeline = Pipeline(
        source,
        Store(world),
        Letters(world),
        Rules(Limits()),
        metrics,
        Health(),
        wake_relay=lambda: woken.append("relay woken"),
        wake_deferred=lambda: woken.append("deferred woken"),
        commit_every_s=commit_every_s,
    )
    pipeline.take_over([(TOPIC, 0), (TOPIC, 1)])
    jobs = pipeline.fetch(), pipeline.flush_for_ever(), pipeline.commit_for_ever()
    tasks = [asyncio.create_task(job) for job in jobs]
    try:
        yield Run(world, source, pipeline, metrics, tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def batch(world: World, partition: int, first: int, kinds: Sequence[str]) -> Batch:
    records = [world.record(partition, first + place, kind) for place, kind in enumerate(kinds)]
    return Batch((TOPIC, partition), records, first + len(kinds))


async def let_go_waits(world: World, run: Run) -> None:
    """Partitions are taken away while transactions are held, and not before these end."""
    letting_go = asyncio.create_task(run.pipeline.let_go())
    await run.steps(20)
    assert not letting_go.done()
    assert world.hold is not None
    world.hold.set()
    await run.until(letting_go.done)
