"""The Kafka source on a real broker: broken bytes, and a second member that joins while they are passed over."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

import pytest

from consumer.broker import Connection, Source
from consumer.errors import OwnershipLost
from consumer.generation import Partition
from tests.conftest import Bus

PATTERN = [
    ("good", 4),
    ("broken", 3),
    ("good", 3),
    ("broken", 1),
    ("broken", 1),
    ("good", 1),
    ("broken", 4),
    ("good", 2),
]

pytestmark = [pytest.mark.apache_kafka, pytest.mark.kcat]


async def publish_broken(bus: Bus, topic: str, partition: int, records: int) -> None:
    """One batch of records whose header key is not UTF-8, which the client cannot hand out."""
    process = await asyncio.create_subprocess_exec(
        b"kcat", b"-P", b"-b", bus.bootstrap.encode(), b"-t", topic.encode(), b"-p", str(partition).encode(),
        b"-H", b"\xff\xfe=x", stdin=asyncio.subprocess.PIPE,
    )  # fmt: skip
    await process.communicate(b"broken\n" * records)
    assert process.returncode == 0


async def fill(bus: Bus, topic: str, partition: int) -> tuple[set[int], set[int]]:
    """Good records with broken ones between; the offsets of either."""
    good, broken, end = set[int](), set[int](), 0
    for kind, count in PATTERN:
        if kind == "good":
            for _ in range(count):
                await bus.publish(topic, b"{}", partition=partition)
        else:
            await publish_broken(bus, topic, partition, count)
        (good if kind == "good" else broken).update(range(end, end + count))
        end += count
    return good, broken


@dataclass
class Truth:
    """What was handed out or passed over by anybody, and what each commit claims."""

    good: dict[Partition, set[int]] = field(default_factory=dict)
    broken: dict[Partition, set[int]] = field(default_factory=dict)
    handed_out: dict[Partition, set[int]] = field(default_factory=dict)
    passed: dict[Partition, set[int]] = field(default_factory=dict)
    committed: dict[Partition, int] = field(default_factory=dict)
    repeated: list[tuple[Partition, int]] = field(default_factory=list)

    def is_done(self) -> bool:
        return all(self.committed.get(name, 0) == len(self.good[name] | self.broken[name]) for name in self.good)


class Member:
    """Polls and commits at once, as an engine does that finishes every chunk immediately."""

    def __init__(self, bus: Bus, topic: str, group: str, truth: Truth) -> None:
        self.source = Source(Connection(bus.bootstrap, {}), [topic], group, fetch_max_wait_ms=20, revocation_s=8)
        self.truth = truth
        self.revocations = 0
        self.assignments = 0

    async def start(self) -> None:
        await self.source.start(self._revoked, self._assigned)

    async def _revoked(self) -> None:
        self.revocations += 1

    def _assigned(self, _: Sequence[Partition]) -> None:
        self.assignments += 1

    async def turn(self) -> None:
        batches, passed = await self.source.poll()
        revocations, truth, offsets = self.revocations, self.truth, dict[Partition, int]()
        for batch in batches:
            for record in batch.records:
                if record.offset < truth.committed.get(batch.partition, 0):
                    truth.repeated.append((batch.partition, record.offset))
                truth.handed_out.setdefault(batch.partition, set()).add(record.offset)
            offsets[batch.partition] = batch.next_offset
        for stub in passed:
            truth.passed.setdefault(stub.partition, set()).update(range(stub.first, stub.last + 1))
        if not offsets or revocations != self.revocations:
            return
        try:
            await self.source.commit(offsets)
        except OwnershipLost:
            return
        truth.committed.update(offsets)
        for name, offset in offsets.items():
            covered = truth.handed_out.get(name, set()) | truth.passed.get(name, set())
            assert set(range(offset)) <= covered, f"{name} committed {offset}, lost {set(range(offset)) - covered}"


class Held:
    """The client of a member; from its `at`-th call on a call takes until a rebalance has begun (`revoked`) or ended
    (`assigned`): the moment that is hard to hit."""

    def __init__(self, member: Member, at: int, until: str, join: Callable[[], None]) -> None:
        self._member = member
        self._client: Any = member.source._consumer
        self._left = at
        self._until = until
        self._join = join

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._client, name)
        if name not in ("getmany", "end_offsets", "beginning_offsets", "committed", "position"):
            return found

        async def held(*arguments: Any, **named: Any) -> Any:
            if name == "getmany":  # what it has read it returns at once, so it can be late only before
                await self._hold()
                return await found(*arguments, **named)
            answer = await found(*arguments, **named)
            await self._hold()
            return answer

        return held

    async def _hold(self) -> None:
        self._left -= 1
        if self._left == -1:
            self._join()
        while self._left < 0 and not self.is_over:
            await asyncio.sleep(0.005)

    @property
    def is_over(self) -> bool:
        return (self._member.revocations if self._until == "revoked" else self._member.assignments) >= 2


@pytest.mark.parametrize("until", ["revoked", "assigned"])
@pytest.mark.parametrize("at", [0, 1, 4, 7, 8, 12, 17, 25])
async def test_a_rebalance_while_broken_bytes_are_passed_over_loses_and_repeats_nothing(
    bus: Bus, at: int, until: str
) -> None:
    topic, group, truth = bus.topics.prefix + "prospect.status-changed", f"g{uuid4().hex[:8]}", Truth()
    for number in range(3):
        truth.good[topic, number], truth.broken[topic, number] = await fill(bus, topic, number)
    first, second = Member(bus, topic, group, truth), Member(bus, topic, group, truth)
    tasks: list[asyncio.Task[None]] = []
    try:
        await first.start()
        held = Held(first, at, until, lambda: tasks.append(asyncio.create_task(_serve(second))))
        first.source._consumer = held
        async with asyncio.timeout(40):
            while not (truth.is_done() and held.is_over and second.assignments):
                await first.turn()
    finally:
        await _end(tasks, first, second)
    assert truth.handed_out == truth.good
    assert truth.passed == truth.broken
    assert truth.repeated == []


async def _serve(member: Member) -> None:
    await member.start()
    while True:
        await member.turn()


async def _end(tasks: Sequence[asyncio.Task[None]], *members: Member) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    for member in members:
        await member.source.stop(5)


@pytest.mark.parametrize("leaves", ["at a rebalance", "at a stop"])
async def test_what_was_read_can_be_committed_while_the_partitions_are_taken_away(bus: Bus, leaves: str) -> None:
    topic, group, truth = bus.topics.prefix + "prospect.status-changed", f"g{uuid4().hex[:8]}", Truth()
    for number in range(3):
        await bus.publish(topic, b"{}", partition=number)
        truth.good[topic, number], truth.broken[topic, number] = {0}, set()
    read = dict.fromkeys(truth.good, 1)

    class Late(Member):
        """Commits nothing before it has to go."""

        async def turn(self) -> None:
            batches, _ = await self.source.poll()
            for batch in batches:
                truth.handed_out.setdefault(batch.partition, set()).update(record.offset for record in batch.records)

        async def _revoked(self) -> None:
            if truth.handed_out == truth.good and not truth.committed:
                await self.source.commit(read)
                truth.committed.update(read)

    first, second = Late(bus, topic, group, truth), Member(bus, topic, group, truth)
    tasks: list[asyncio.Task[None]] = []
    try:
        await first.start()
        async with asyncio.timeout(40):
            while truth.handed_out != truth.good:
                await first.turn()
            if leaves == "at a stop":
                await first._revoked()
                await first.source.stop(5)
            tasks.append(asyncio.create_task(_serve(second)))
            while not (second.assignments and truth.is_done()):
                await (asyncio.sleep(0.05) if leaves == "at a stop" else first.turn())
            assert await second.source.committed(sorted(read)) == read
            for number in range(3):
                await bus.publish(topic, b"{}", partition=number)
                truth.good[topic, number].add(1)
            while truth.handed_out != truth.good:  # before these somebody would have read the others again
                await (asyncio.sleep(0.05) if leaves == "at a stop" else first.turn())
    finally:
        await _end(tasks, first, second)
    assert truth.repeated == []
