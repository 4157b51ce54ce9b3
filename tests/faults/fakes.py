"""The bus in memory: a log with a consumer group on one side, what was published on the other.

Nothing here judges. Whatever is lost, refused or repeated is what the machine asked for.
"""

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal
from uuid import UUID

from consumer.deadletters import Row
from consumer.errors import OwnershipLost, Unavailable
from consumer.generation import Partition, Passed
from tests.unit.builders import Batch, Bytes

HINTS, REQUESTS = "prospect.status-changed", "campaign.sync-requested"
PARTITIONS: tuple[Partition, ...] = ((HINTS, 0), (HINTS, 1), (REQUESTS, 0))

CommitFate = Literal["accepted", "refused", "away", "unknown"]
"""`unknown`: accepted, but its answer was lost."""

SendFate = Literal["acknowledged", "failed", "unheard", "away", "refused", "closed"]
"""`unheard`: written, but its acknowledgement was lost. `away`: nobody is there. `refused`: for ever, for its size.
`closed`: its topic takes nothing for as long as this call takes."""


class Crash(BaseException):
    """The process is gone at this point. No Exception, so that nobody takes it for an error to be handled."""


@dataclass
class Log:
    """What upstreams wrote, who reads it and how far the group has committed."""

    records: dict[Partition, list[Bytes]] = field(default_factory=lambda: {partition: [] for partition in PARTITIONS})
    committed: dict[Partition, int] = field(default_factory=lambda: dict.fromkeys(PARTITIONS, 0))
    owners: dict[Partition, int] = field(default_factory=dict)

    def append(self, partition: Partition, value: bytes | None) -> Bytes:
        """Write one record."""
        topic, number = partition
        record = Bytes(value, topic=topic, partition=number, offset=len(self.records[partition]))
        self.records[partition].append(record)
        return record


class Member:
    """One replica's membership in the group: the pipeline's Source. Polls bring something only when granted."""

    def __init__(
        self,
        log: Log,
        number: int,
        delivered: Callable[[Sequence[Bytes]], None],
        fate: Callable[[], Awaitable[CommitFate]],
        accepts: Callable[[Mapping[Partition, int]], Awaitable[None]],
    ) -> None:
        self._log = log
        self._number = number
        self._delivered = delivered
        self._fate = fate
        self._accepts = accepts
        self._positions: dict[Partition, int] = {}
        self._granted: int | None = None
        self._behind_then = 0
        self.behind = 0
        self._grant = asyncio.Event()
        self.polling = asyncio.Event()

    def grant(self, records: int, *, behind: int = 0) -> None:
        """The next poll brings up to this many records of every partition and tells of so many more."""
        self._granted, self._behind_then = records, behind
        self.polling.clear()
        self._grant.set()

    def assigned(self) -> list[Partition]:
        """Begin anew where the group has committed; what is ours now."""
        mine = [partition for partition, owner in self._log.owners.items() if owner == self._number]
        self._positions = {partition: self._log.committed[partition] for partition in mine}
        return mine

    async def poll(self) -> tuple[list[Batch], list[Passed]]:
        """Wait for a grant, then hand out what is there."""
        while self._granted is None:
            self.polling.set()
            self._grant.clear()
            await self._grant.wait()
        limit, self._granted, self.behind = self._granted, None, self._behind_then
        batches = []
        for partition, position in self._positions.items():
            records = self._log.records[partition][position : position + limit]
            if records:
                self._positions[partition] = position + len(records)
                batches.append(Batch(partition, records, position + len(records)))
                self._delivered(records)
        return batches, []

    def pause(self) -> None:
        """Never needed: grants are small."""

    def resume(self) -> None:
        """As above."""

    async def commit(self, offsets: Mapping[Partition, int]) -> None:
        """As the group's coordinator and the client: only for our partitions, also backwards.

        What was asked for in an older assignment too: the client repeats a request as whatever member it is by then.
        """
        fate = await self._fate()
        if fate == "away":
            raise Unavailable("kafka", "no coordinator")
        if fate == "refused" or any(self._log.owners.get(partition) != self._number for partition in offsets):
            raise OwnershipLost("a rebalance is under way")
        await self._accepts(offsets)
        self._log.committed.update(offsets)
        if fate == "unknown":
            raise Unavailable("kafka", "no answer in time")


@dataclass(frozen=True, slots=True)
class Sent:
    """What became of a row."""

    error: str | None = None
    refused: bool = False
    closed: bool = False


@dataclass(frozen=True, slots=True)
class Published:
    """One copy of an event in its topic."""

    type: str
    campaign_id: UUID
    event: bytes


@dataclass
class Topics:
    """What was written to the topics for events and dead letters, whether or not the writer heard of it.

    `fates` say what becomes of the next rows; when they are used up everything is acknowledged.
    """

    fates: list[SendFate] = field(default_factory=list)
    published: list[Published] = field(default_factory=list)
    acknowledged: set[bytes] = field(default_factory=set)
    refused: set[bytes] = field(default_factory=set)
    dead_letters: set[tuple[str, int, int]] = field(default_factory=set)
    _taken: set[bytes] = field(default_factory=set)

    def _next(self) -> SendFate:
        return self.fates.pop(0) if self.fates else "acknowledged"

    async def publish(self, rows: Sequence[tuple[str, UUID, bytes]]) -> list[Sent]:
        """As broker.Publisher, but that a row may arrive although an elder of its campaign failed: the relay does not
        rely on that.
        """
        results: list[Sent] = []
        closed: set[str] = set()
        for place, (type_, campaign_id, event) in enumerate(rows):
            fate = self._next()
            if fate == "away" and place == 0:
                raise Unavailable("kafka", "no broker")
            if fate == "refused" and event not in self._taken:  # what was taken once is not too large later
                self.refused.add(event)
            if fate == "closed":
                closed.add(type_)
            if type_ in closed:
                results.append(Sent("topic missing", closed=True))
            elif event in self.refused:
                results.append(Sent("too large", refused=True))
            elif fate in ("failed", "away", "refused"):
                results.append(Sent("NotLeaderForPartitionError"))
            else:
                self.published.append(Published(type_, campaign_id, event))
                self._taken.add(event)
                if fate == "unheard":
                    results.append(Sent("RequestTimedOutError"))
                else:
                    self.acknowledged.add(event)
                    results.append(Sent())
        return results

    async def bury(self, rows: Sequence[Row]) -> list[Sent]:
        """Write dead letters; only a row that was acknowledged counts as kept."""
        results = []
        for _, _, headers in rows:
            fate = self._next()
            if fate == "away":
                raise Unavailable("kafka", "no broker")
            if fate != "acknowledged":
                results.append(Sent("NotLeaderForPartitionError"))
                continue
            where = {name: (content or b"").decode() for name, content in headers}
            self.dead_letters.add(
                (
                    where["dead-letter-topic"],
                    int(where["dead-letter-partition"]),
                    int(where["dead-letter-offset"]),
                )
            )
            results.append(Sent())
        return results


def body(event: bytes) -> dict[str, object]:
    """An event as JSON, keys in the order in which they were written."""
    parsed = json.loads(event)
    assert isinstance(parsed, dict)
    return parsed
