"""What the operator's dead-letter commands do: read the topic, and send back what can be read after a repair."""

import base64
import re
from collections import Counter
from collections.abc import AsyncIterator, Collection, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Final, NamedTuple, Protocol

from consumer import turn
from consumer.broker import CREATE_TOPICS, Outgoing, Sent
from consumer.database import Connection, statement
from consumer.envelope import Record, format_time
from schemas.events import DeadLetterReason

PREFIX: Final = "dead-letter-"
REDRIVEN: Final = PREFIX + "redriven"  # on what is sent back: when; it comes along if the record still cannot be read
OURS: Final = frozenset(
    (REDRIVEN, *(PREFIX + name for name in ("topic", "partition", "offset", "reason", "error", "time")))
)
STUBS: Final = (DeadLetterReason.UNREADABLE, DeadLetterReason.TOO_LARGE)
LOCK: Final = "dead-letters redrive"
AT_ONCE: Final = 200  # one transaction stays open while they are sent
AT_ONCE_BYTES: Final = 4 * 1024 * 1024
_TOPIC: Final = re.compile(r"[A-Za-z0-9._-]{1,249}")
_OFFSETS: Final = re.compile(r"([0-9]{1,18})(?:-([0-9]{1,18}))?")


class Origin(NamedTuple):
    """Where a dead letter came from."""

    topic: str
    partition: int
    offset: int


@dataclass(frozen=True, slots=True)
class Letter:
    """A record of the dead-letter topic. `origin` is None when it does not say where it came from.

    `last_offset` is greater than the origin's where a stub stands for several records; `has_bytes`: it is no stub.
    """

    partition: int
    offset: int
    time: datetime
    reason: str | None
    error: str | None
    origin: Origin | None
    last_offset: int | None
    has_bytes: bool
    key: bytes | None
    value: bytes | None
    headers: Sequence[tuple[str, bytes | None]]
    redriven_at: datetime | None
    """Set when its original was itself sent back before, and could still not be read."""

    @property
    def place(self) -> str:
        """As commands take it."""
        return f"{self.partition}:{self.offset}"

    def without_bytes(self) -> "Letter":
        """What a list keeps."""
        return replace(self, key=None, value=None, headers=())

    def document(self, redriven_at: datetime | None) -> dict[str, object]:
        """The shape of one entry of `dead-letters list --json`."""
        topic, partition, offset = self.origin or (None, None, None)
        return {
            "place": self.place,
            "time": format_time(self.time),
            "reason": self.reason,
            "topic": topic,
            "partition": partition,
            "offset": offset,
            "last_offset": self.last_offset,
            "error": self.error,
            "redriven_at": (at := redriven_at or self.redriven_at) and format_time(at),
        }


def read_letter(record: Record) -> Letter:
    """What a record of the dead-letter topic says. Never raises: anybody with the right may write there."""
    said = {name: (content or b"").decode("utf-8", "replace") for name, content in record.headers if name in OURS}
    headers = [(name, content) for name, content in record.headers if name not in OURS]
    topic, number = said.get(PREFIX + "topic", ""), said.get(PREFIX + "partition", "")
    offsets = _OFFSETS.fullmatch(said.get(PREFIX + "offset", ""))
    origin = None
    if _TOPIC.fullmatch(topic) and re.fullmatch(r"[0-9]{1,9}", number) and offsets:
        origin = Origin(topic, int(number), int(offsets[1]))
    reason = said.get(PREFIX + "reason")
    return Letter(
        record.partition,
        record.offset,
        _time(said.get(PREFIX + "time", "")) or datetime.fromtimestamp(max(0, record.timestamp) / 1000, UTC),
        reason,
        said.get(PREFIX + "error"),
        origin,
        int(offsets[2] or offsets[1]) if origin and offsets else None,
        # A dead letter that was itself too large for its topic is a stub too, under its own reason.
        reason not in STUBS and bool(record.key or record.value or headers),
        record.key,
        record.value,
        headers,
        _time(said.get(REDRIVEN, "")),
    )


def _time(text: str) -> datetime | None:
    try:
        found = datetime.fromisoformat(text)
        return found.astimezone(UTC) if found.tzinfo is not None else found.replace(tzinfo=UTC)
    except (ValueError, OverflowError):
        return None


@dataclass(frozen=True, slots=True)
class Filter:
    """Which dead letters are meant; None = any. `since` is included, `until` is not."""

    reason: str | None = None
    topic: str | None = None
    since: datetime | None = None
    until: datetime | None = None

    @property
    def is_empty(self) -> bool:
        """Whether everything is meant."""
        return self == Filter()

    def matches(self, letter: Letter) -> bool:
        """Whether this one is meant."""
        return (
            (self.reason is None or letter.reason == self.reason)
            and (self.topic is None or (letter.origin is not None and letter.origin.topic == self.topic))
            and (self.since is None or letter.time >= self.since)
            and (self.until is None or letter.time < self.until)
        )


async def redriven(connection: Connection, letters: Sequence[Letter]) -> dict[Origin, datetime]:
    """Which of their originals were sent back before, and when last."""
    origins = list({letter.origin for letter in letters if letter.origin is not None})
    rows = await connection.fetch(statement("redriven"), *_columns(origins))
    return {Origin(row["topic"], row["partition"], row["offset"]): row["redriven_at"] for row in rows}


class Publish(Protocol):
    """The publisher, as far as it is needed here."""

    async def publish(self, rows: Sequence[Outgoing]) -> list[Sent]: ...
    async def check(self, topics: Sequence[str]) -> list[str]: ...


class Redrive:
    """Sends dead letters back to the topics they came from, each original once, and counts what became of them.

    One batch per transaction, under a lock that ends with it: read the marks, send, wait for the acknowledgement, mark,
    commit. So of two redrives at once one sees the marks of the other, and whoever is killed leaves nothing locked;
    what it had sent but not marked is sent again next time, which a recount does not mind. (Marks written before
    sending would serve as locks too, but two redrives with different filters would deadlock on them.)
    """

    def __init__(
        self,
        connection: Connection,
        publisher: Publish,
        allowed: Collection[str],
        *,
        again: bool,
        dry_run: bool,
        limit: int | None,
    ) -> None:
        self._allowed = allowed
        self._connection = connection
        self._publisher = publisher
        self._again = again
        self._dry_run = dry_run
        self._limit = limit
        self._seen = set[Origin]()
        self._topics: dict[str, bool] = {}  # known so far: whether it is there
        self.sent = 0
        self.skipped = 0
        """Sent back by an earlier redrive."""
        self.impossible = 0
        """Stubs: their bytes were never kept."""
        self.failures = Counter[str]()
        """Why the others could not be sent."""
        self.is_stopped = False
        """Nothing more can be sent now, or the limit is reached."""

    async def take(self, letters: Sequence[Letter]) -> None:
        """Send these back. Raises Unavailable when Kafka or the database is away; what was sent is marked."""
        wanted = []
        for letter in letters:
            if letter.origin is None:
                self.impossible += 1
            elif letter.origin not in self._seen:  # a crash repeats dead letters
                self._seen.add(letter.origin)
                if letter.has_bytes:
                    wanted.append((letter.origin, letter))
                else:
                    self.impossible += 1
        foreign = [origin for origin, _ in wanted if origin.topic not in self._allowed]
        for origin in foreign:  # the header may be anybody's: it must not make us write where subscribers trust us
            self.failures[f"topic {origin.topic} is none that the service reads"] += 1
        wanted = [(origin, letter) for origin, letter in wanted if origin.topic in self._allowed]
        await self._look_up({origin.topic for origin, _ in wanted} - self._topics.keys())
        sendable = []
        for origin, letter in wanted:
            if self._topics[origin.topic]:
                sendable.append((origin, letter))
            else:
                self.failures[f"topic {origin.topic} is missing: {CREATE_TOPICS}"] += 1
        for batch in _batches(sendable):
            if not self.is_stopped:
                await self._send(batch)

    async def _look_up(self, topics: set[str]) -> None:
        if topics:
            missing = await self._publisher.check(sorted(topics))
            self._topics.update({topic: topic not in missing for topic in topics})

    async def _send(self, batch: Sequence[tuple[Origin, Letter]]) -> None:
        """Send a batch; those that failed in it again, as long as some get through."""
        pending, is_second = list(batch), False
        while pending:
            async with self._turn():
                pending = await self._not_yet_sent(pending)
                if self._limit is not None:
                    pending = pending[: self._limit - self.sent]
                if self._dry_run:
                    results = [Sent()] * len(pending)
                else:
                    mark = (REDRIVEN, format_time(datetime.now(UTC)).encode())
                    rows = [
                        Outgoing(origin.topic, letter.key, letter.value, [*letter.headers, mark])
                        for origin, letter in pending
                    ]
                    results = await self._publisher.publish(rows) if rows else []
                    acked = [origin for (origin, _), sent in zip(pending, results, strict=True) if sent.error is None]
                    await self._connection.execute(statement("mark_redriven"), *_columns(acked))
            left = []
            for row, result in zip(pending, results, strict=True):
                if result.error is None:
                    self.sent += 1
                elif result.refused:
                    self.failures[result.error] += 1
                else:
                    left.append((row, result.error))
            if is_second and len(left) == len(pending):  # not one got through: an outage, or a right that is missing
                self.failures.update(f"{error}; stopped here: run it again when that is put right" for _, error in left)
                self.is_stopped = True
                return
            pending, is_second = [row for row, _ in left], True
        self.is_stopped = self._limit is not None and self.sent >= self._limit

    @asynccontextmanager
    async def _turn(self) -> AsyncIterator[None]:
        if self._dry_run:
            yield
            return
        async with turn.locked(self._connection, LOCK):
            yield

    async def _not_yet_sent(self, rows: list[tuple[Origin, Letter]]) -> list[tuple[Origin, Letter]]:
        if self._again:
            return rows
        done = await redriven(self._connection, [letter for _, letter in rows])
        left = [(origin, letter) for origin, letter in rows if origin not in done and letter.redriven_at is None]
        self.skipped += len(rows) - len(left)
        return left


def _columns(origins: Sequence[Origin]) -> tuple[list[str], list[int], list[int]]:
    return (
        [origin.topic for origin in origins],
        [origin.partition for origin in origins],
        [origin.offset for origin in origins],
    )


def _batches(rows: Sequence[tuple[Origin, Letter]]) -> Iterator[list[tuple[Origin, Letter]]]:
    """As many rows and bytes as one send takes; at least one row each."""
    batch: list[tuple[Origin, Letter]] = []
    size = 0
    for row in rows:
        bytes_ = len(row[1].value or b"") + len(row[1].key or b"")
        if batch and (len(batch) >= AT_ONCE or size + bytes_ > AT_ONCE_BYTES):
            yield batch
            batch, size = [], 0
        batch.append(row)
        size += bytes_
    if batch:
        yield batch


def origin(row: Mapping[str, object]) -> str | None:
    """Where a letter came from in words, given its document; a stub may stand for a range of offsets."""
    if row["topic"] is None:
        return None
    last = "" if row["last_offset"] == row["offset"] else f"-{row['last_offset']}"
    return f"{row['topic']} {row['partition']}:{row['offset']}{last}"


def encoded(content: bytes | None) -> dict[str, str] | None:
    """Bytes for JSON: as text where they are UTF-8, else as base64."""
    if content is None:
        return None
    try:
        return {"encoding": "utf-8", "content": content.decode("utf-8")}
    except UnicodeDecodeError:
        return {"encoding": "base64", "content": base64.b64encode(content).decode()}


def words(content: Mapping[str, str] | None) -> str:
    """The same for people."""
    if content is None:
        return "-"
    return plain(content["content"]) + (" (base64)" if content["encoding"] == "base64" else "")


def plain(text: str) -> str:
    """What others wrote must not steer the terminal."""
    return "".join(sign if sign.isprintable() or sign == "\n" else ascii(sign)[1:-1] for sign in text)
