"""Dead letters: records that can never be read are kept, whole, before their offset may pass."""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Final, Protocol

from consumer.envelope import DeadLetter, Record, dead_letter_headers, stub_headers
from consumer.errors import Unavailable
from consumer.generation import Passed
from schemas.events import DeadLetterReason

AT_ONCE: Final = 1_000


class Sent(Protocol):
    """What became of a record: `error` None means acknowledged."""

    @property
    def error(self) -> str | None: ...
    @property
    def refused(self) -> bool: ...


class Publish(Protocol):
    """Publishes (key, value, headers) to the dead-letter topic; what became of each, in order."""

    async def __call__(
        self, rows: Sequence[tuple[bytes | None, bytes | None, Sequence[tuple[str, bytes | None]]]], *, alone: bool
    ) -> Sequence[Sent]: ...


class DeadLetters:
    """Writes dead letters; a method returns when all of its records were acknowledged."""

    def __init__(self, publish: Publish) -> None:
        self._publish = publish

    async def records(self, letters: Sequence[tuple[Record, DeadLetter]]) -> None:
        """Keep records with their bytes, key and headers. One larger than the topic takes becomes a stub.

        Raises Unavailable when not all could be written; then all are written again.
        """
        for begin in range(0, len(letters), AT_ONCE):
            some = letters[begin : begin + AT_ONCE]
            now = datetime.now(UTC)
            rows = [(record.key, record.value, dead_letter_headers(record, letter, now)) for record, letter in some]
            results = await self._publish(rows, alone=False)
            again = [place for place, sent in enumerate(results) if sent.error is not None]
            if not again:
                continue
            alone = await self._publish([rows[place] for place in again], alone=True)
            for place, sent in zip(again, alone, strict=True):
                record, letter = some[place]
                if sent.refused:
                    stub = stub_headers(record.topic, record.partition, record.offset, record.offset, letter, now)
                    await self._keep(None, stub)
                elif sent.error is not None:
                    raise Unavailable("kafka", f"{sent.error} while writing dead letters")

    async def stubs(self, passed: Sequence[Passed]) -> None:
        """Keep the coordinates of records nobody can hand out. Raises Unavailable."""
        for stub in passed:
            reason = DeadLetterReason.TOO_LARGE if stub.too_large else DeadLetterReason.UNREADABLE
            letter = DeadLetter(reason, f"the client cannot hand it out ({stub.error}); the sweep repairs what it said")
            topic, partition = stub.partition
            await self._keep(None, stub_headers(topic, partition, stub.first, stub.last, letter, datetime.now(UTC)))

    async def _keep(self, key: bytes | None, headers: Sequence[tuple[str, bytes | None]]) -> None:
        [sent] = await self._publish([(key, b"", headers)], alone=True)
        if sent.error is not None:
            raise Unavailable("kafka", f"{sent.error} while writing dead letters")
