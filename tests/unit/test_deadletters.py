"""Dead letters beside a topic that refuses some: each is kept once, whole or as a stub, in few attempts."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from consumer.deadletters import DeadLetters, Row
from consumer.envelope import DeadLetter, Record
from consumer.errors import Unavailable
from schemas.events import DeadLetterReason

STUB_AT_MOST = 400


@dataclass(frozen=True)
class Bytes:
    value: bytes
    offset: int
    key: bytes | None = None
    headers: Sequence[tuple[str, bytes | None]] = ()
    topic: str = "t"
    partition: int = 0
    timestamp: int = 0


@dataclass(frozen=True)
class Sent:
    error: str | None = None
    refused: bool = False


@dataclass
class Topic:
    """Takes rows up to `limit` bytes."""

    limit: int
    away_after: int = 10**9
    kept: list[Row] = field(default_factory=list)
    calls: int = 0

    async def __call__(self, rows: Sequence[Row]) -> Sequence[Sent]:
        self.calls += 1
        if self.calls > self.away_after:
            return [Sent("away")] * len(rows)
        self.kept += [row for row in rows if size(row) <= self.limit]
        return [Sent() if size(row) <= self.limit else Sent("too large", refused=True) for row in rows]


def size(row: Row) -> int:
    key, value, headers = row
    return len(key or b"") + len(value or b"") + sum(len(name) + len(content or b"") for name, content in headers)


def letters_of(sizes: Sequence[int]) -> list[tuple[Record, DeadLetter]]:
    letter = DeadLetter(DeadLetterReason.NOT_JSON, "no")
    return [(Bytes(b"x" * size, offset), letter) for offset, size in enumerate(sizes)]


def offsets(rows: Sequence[Row]) -> list[int]:
    return sorted(int(dict(headers)["dead-letter-offset"] or b"") for _, _, headers in rows)


@given(st.lists(st.sampled_from([1, 50, 300, 700, 2_000]), max_size=60), st.integers(STUB_AT_MOST, 3_000))
async def test_each_is_kept_once_and_only_what_does_not_fit_loses_its_bytes(sizes: list[int], limit: int) -> None:
    topic, letters = Topic(limit), letters_of(sizes)
    await DeadLetters(topic).records(letters)
    assert letters == []
    assert offsets(topic.kept) == list(range(len(sizes)))
    fits = [row for row in topic.kept if (row[1] or b"") != b""]
    own = size((None, b"", topic.kept[0][2])) if topic.kept else 0
    assert sorted(len(row[1] or b"") for row in fits) == sorted(one for one in sizes if one + own <= limit)


async def test_many_that_do_not_fit_cost_few_attempts() -> None:
    topic = Topic(1_500)
    await DeadLetters(topic).records(letters_of([2_000] * 3_000))
    assert len(topic.kept) == 3_000
    assert topic.calls <= 5  # what is at least as large as a refused one is not tried again


@pytest.mark.parametrize("away_after", [0, 1, 2])
async def test_an_outage_is_told_at_once_and_what_was_kept_is_not_written_again(away_after: int) -> None:
    topic, letters = Topic(10_000, away_after), letters_of([300] * 2_500)
    with pytest.raises(Unavailable):
        await DeadLetters(topic).records(letters)
    assert topic.calls == away_after + 1
    topic.away_after = 10**9
    await DeadLetters(topic).records(letters)
    assert offsets(topic.kept) == list(range(2_500))


async def test_a_topic_that_takes_not_even_a_stub_is_an_outage() -> None:
    with pytest.raises(Unavailable):
        await DeadLetters(Topic(10)).records(letters_of([5, 5]))
