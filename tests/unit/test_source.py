"""What counts as read to the end, while partitions come and go."""

from types import SimpleNamespace
from typing import Any

import pytest

from consumer.service import Service


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
