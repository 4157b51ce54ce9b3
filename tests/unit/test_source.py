"""Positions that move without records, and what counts as read to the end while partitions come and go."""

from types import SimpleNamespace
from typing import Any

import pytest
from aiokafka import TopicPartition

from consumer.broker import Connection, Source
from consumer.broker import source as source_module
from consumer.errors import OwnershipLost
from consumer.service import Service

PARTITION = TopicPartition("t", 0)


class CutOff:
    """A client whose log has three records; then it is cut off, and it begins again by itself."""

    def __init__(self) -> None:
        self.at = 0

    def assignment(self) -> set[TopicPartition]:
        return {PARTITION}

    async def position(self, _: TopicPartition) -> int:
        return self.at

    def last_stable_offset(self, _: TopicPartition) -> int:
        return 10

    async def getmany(self, *, timeout_ms: int, max_records: int) -> dict[Any, list[Any]]:
        if self.at:
            self.at = 0
            return {}
        self.at = 3
        return {PARTITION: [SimpleNamespace(offset=offset) for offset in range(3)]}


async def test_a_log_that_was_cut_off_takes_the_committed_offset_back_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    source = Source(Connection("x:1", {}), ["t"], "g", fetch_max_wait_ms=1, revocation_s=8)
    vars(source).update(_consumer=CutOff(), _fetched=SimpleNamespace(passed=[], bytes_left=0))
    [first], _ = await source.poll()
    assert first.next_offset == 3
    assert source.behind == 7
    monkeypatch.setattr(source_module, "TOLD_S", -1.0)
    assert source.behind == 0  # of a partition that delivers nothing more nobody knows
    # Else what is written next would be passed over by whoever begins at the committed offset.
    [back], _ = await source.poll()
    assert (back.partition, back.next_offset, list(back.records)) == (("t", 0), 0, [])


async def test_who_was_forgotten_by_the_group_commits_nothing() -> None:
    committed: list[object] = []

    async def commit(offsets: object) -> None:
        committed.append(offsets)

    client = SimpleNamespace(assignment=lambda: {PARTITION}, commit=commit, _coordinator=SimpleNamespace(generation=7))
    source = Source(Connection("x:1", {}), ["t"], "g", fetch_max_wait_ms=1, revocation_s=8)
    vars(source).update(_consumer=client)
    await source.commit({("t", 0): 3})
    client._coordinator.generation = -1  # as aiokafka's reset_generation leaves it
    with pytest.raises(OwnershipLost, match="forgotten"):
        await source.commit({("t", 0): 4})
    assert committed == [{PARTITION: 3}]


class Offsets:
    """Answers about offsets; the partitions are taken away in the middle of the `during`-th question."""

    def __init__(self, pipeline: SimpleNamespace, during: int) -> None:
        self.pipeline = pipeline
        self.during = during

    async def _answer(self, partitions: Any, offset: int) -> dict[Any, int]:
        self.during -= 1
        if self.during == 0:
            self.pipeline.is_ours, self.pipeline.epoch, self.pipeline.assigned = False, 2, frozenset()
        return dict.fromkeys(partitions, offset)

    async def ends(self, partitions: Any) -> dict[Any, int]:
        return await self._answer(partitions, 10)

    async def starts(self, partitions: Any) -> dict[Any, int]:
        return await self._answer(partitions, 0)

    async def committed(self, partitions: Any) -> dict[Any, int]:
        return await self._answer(partitions, 10)


@pytest.mark.parametrize(("during", "expected"), [(0, True), (1, False), (2, False), (3, False)])
async def test_nothing_counts_as_read_while_partitions_are_taken_away(during: int, expected: bool) -> None:
    service = Service.__new__(Service)
    pipeline = SimpleNamespace(is_ours=True, epoch=1, assigned=frozenset({("t", 0)}))
    vars(service).update(_pipeline=pipeline, _source=Offsets(pipeline, during), _ends={})
    assert await service._is_read() is expected
    pipeline.is_ours = False
    assert not await service._is_read()
