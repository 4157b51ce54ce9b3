"""Dead letters: records that can never be read are kept, whole, before their offset may pass."""

import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Final, Protocol

from consumer.envelope import DeadLetter, Record, dead_letter_headers, stub_headers
from consumer.errors import Unavailable
from consumer.generation import Passed
from schemas.events import DeadLetterReason

AT_ONCE: Final = 1_000

Row = tuple[bytes | None, bytes | None, Sequence[tuple[str, bytes | None]]]
"""Key, value, headers."""


class Sent(Protocol):
    """What became of a record: `error` None means acknowledged, `refused` that it is larger than the topic takes."""

    @property
    def error(self) -> str | None: ...
    @property
    def refused(self) -> bool: ...


class Publish(Protocol):
    """Publishes (key, value, headers) to the dead-letter topic; what became of each, in order."""

    async def __call__(self, rows: Sequence[Row]) -> Sequence[Sent]: ...


class DeadLetters:
    """Writes dead letters; a method returns when all of its records were acknowledged."""

    def __init__(self, publish: Publish) -> None:
        self._publish = publish

    async def records(self, letters: list[tuple[Record, DeadLetter]]) -> None:
        """Keep records with their bytes, key and headers, and take each off the list once it is kept.

        One larger than the topic takes becomes a stub. Raises Unavailable when not all could be written; called again,
        it goes on with those that are left.
        """
        too_large = sys.maxsize  # bytes; what is at least as large as a refused row need not be tried
        while letters:
            now = datetime.now(UTC)
            rows = [_row(record, letter, now, too_large) for record, letter in letters[:AT_ONCE]]
            results = await self._publish(rows)
            left = [place for place, sent in enumerate(results) if sent.error is not None]
            letters[: len(rows)] = [letters[place] for place in left]
            failed = next((results[place].error for place in left if not results[place].refused), None)
            if failed is None and left:
                smallest = min(left, key=lambda place: _size(rows[place]))
                failed = None if _size(rows[smallest]) < too_large else results[smallest].error  # not even a stub is
                too_large = _size(rows[smallest])
            if failed is not None:
                raise Unavailable("kafka", f"{failed} while writing dead letters")

    async def stubs(self, passed: list[Passed]) -> None:
        """Keep the coordinates of records nobody can hand out; takes each off the list. Raises Unavailable."""
        while passed:
            stub = passed[0]
            reason = DeadLetterReason.TOO_LARGE if stub.too_large else DeadLetterReason.UNREADABLE
            letter = DeadLetter(reason, f"the client cannot hand it out ({stub.error}); the sweep repairs what it said")
            topic, partition = stub.partition
            await self._keep(None, stub_headers(topic, partition, stub.first, stub.last, letter, datetime.now(UTC)))
            del passed[0]

    async def _keep(self, key: bytes | None, headers: Sequence[tuple[str, bytes | None]]) -> None:
        [sent] = await self._publish([(key, b"", headers)])
        if sent.error is not None:
            raise Unavailable("kafka", f"{sent.error} while writing dead letters")


def _row(record: Record, letter: DeadLetter, now: datetime, too_large: int) -> Row:
    whole = (record.key, record.value, dead_letter_headers(record, letter, now))
    if _size(whole) < too_large:
        return whole
    return None, b"", stub_headers(record.topic, record.partition, record.offset, record.offset, letter, now)


def _size(row: Row) -> int:
    key, value, headers = row
    return len(key or b"") + len(value or b"") + sum(len(name) + len(content or b"") for name, content in headers)
