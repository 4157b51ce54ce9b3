"""The Kafka source with a client that fails at the edge: nothing read is ever lost."""

from types import SimpleNamespace
from typing import Any

import pytest
from aiokafka import TopicPartition
from aiokafka.errors import KafkaConnectionError

from consumer.broker import Connection, Source
from consumer.errors import Unavailable
from consumer.service import Service

GOOD, EMPTY = TopicPartition("t", 0), TopicPartition("t", 1)


class Client:
    """Its first fetch breaks, so every partition is walked alone; its look-ups fail `away` times."""

    def __init__(self, away: int) -> None:
        self.positions = {GOOD: 0, EMPTY: 0}
        self.log: dict[TopicPartition, list[int]] = {GOOD: [0, 1, 2], EMPTY: []}
        self.away = away
        self.is_first = True

    def assignment(self) -> set[TopicPartition]:
        return {GOOD, EMPTY}

    def seek(self, partition: TopicPartition, offset: int) -> None:
        self.positions[partition] = offset

    async def position(self, partition: TopicPartition) -> int:
        return self.positions[partition]

    def _look_up(self) -> None:
        if self.away:
            self.away -= 1
            raise KafkaConnectionError

    async def committed(self, _: TopicPartition) -> None:
        self._look_up()

    async def end_offsets(self, partitions: list[TopicPartition]) -> dict[TopicPartition, int]:
        self._look_up()
        return {partition: len(self.log[partition]) for partition in partitions}

    async def beginning_offsets(self, partitions: list[TopicPartition]) -> dict[TopicPartition, int]:
        self._look_up()
        return dict.fromkeys(partitions, 0)

    async def getmany(self, *partitions: TopicPartition, timeout_ms: int, max_records: int) -> dict[Any, list[Any]]:
        if self.is_first:
            self.is_first = False
            self.positions[GOOD] = 2  # the client has forgotten what it read before the broken bytes
            raise UnicodeDecodeError("utf-8", b"\xff", 0, 1, "header key")
        found = {}
        for partition in partitions or (GOOD, EMPTY):
            begin = self.positions[partition]
            if records := [
                SimpleNamespace(offset=offset) for offset in self.log[partition][begin : begin + max_records]
            ]:
                found[partition] = records
                self.positions[partition] += len(records)
        return found


@pytest.mark.parametrize("away", range(6))
async def test_every_record_is_handed_out_though_look_ups_fail_on_the_way(away: int) -> None:
    source = Source(Connection("x:1", {}), ["t"], "g", fetch_max_wait_ms=1)
    client = source._consumer = Client(away)
    handed_out: list[int] = []
    for _ in range(14):
        try:
            batches, _passed = await source.poll()
        except Unavailable:
            continue
        handed_out.extend(record.offset for batch in batches for record in batch.records)
    assert client.away == 0
    assert handed_out == [0, 1, 2]


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
