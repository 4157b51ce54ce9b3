"""What `replay` does: moves the group's committed offsets back to a time, never forward, and only while nobody runs."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

from consumer import turn
from consumer.database import Connection
from consumer.errors import OwnershipLost, ServiceError
from consumer.generation import Partition


class Group(Protocol):
    """The consumer group, from outside of it."""

    @property
    def partitions(self) -> list[Partition]: ...
    async def members(self) -> int: ...
    async def committed(self) -> dict[Partition, int]: ...
    async def first_since(self, moment: datetime) -> dict[Partition, int]: ...
    async def commit(self, offsets: Mapping[Partition, int]) -> None: ...


@dataclass(frozen=True, slots=True)
class Move:
    """From which offset to which a partition goes back; both None where nothing was ever committed."""

    partition: Partition
    begin: int | None
    target: int | None

    @property
    def records(self) -> int:
        """About how many are read again."""
        return 0 if self.begin is None or self.target is None else self.begin - self.target

    def document(self) -> dict[str, object]:
        """The shape of one entry of `replay --json`."""
        topic, number = self.partition
        return {"topic": topic, "partition": number, "from": self.begin, "to": self.target, "records": self.records}


async def replay(group: Group, connection: Connection, name: str, since: datetime) -> list[Move]:
    """Move the offsets of the group called `name` back; what was done, per partition.

    Raises ServiceError while the group has members, Unavailable. All partitions move in one request, so whoever is
    killed has moved all or none. Two replays at once could undo each other's step back (the broker guards only against
    members), hence the lock.
    """
    async with turn.locked(connection, f"replay {name}"):
        if members := await group.members():
            raise ServiceError(_is_running(name, f"has {members} member{'s' if members > 1 else ''}"))
        moves = await planned(group, since)
        offsets = {move.partition: move.target for move in moves if move.records and move.target is not None}
        if offsets:
            try:
                await group.commit(offsets)
            except OwnershipLost as error:
                raise ServiceError(_is_running(name, "has members since just now")) from error
        return moves


async def planned(group: Group, since: datetime) -> list[Move]:
    """Where each partition would go: to the first record at or after `since`, or nowhere when it is there already.

    A partition without a committed offset stays so: the service begins at its first record.
    """
    committed, first = await group.committed(), await group.first_since(since)
    moves = []
    for partition in group.partitions:
        begin = committed.get(partition)
        target = None if begin is None else min(begin, first.get(partition, begin))
        moves.append(Move(partition, begin, target))
    return moves


def _is_running(name: str, how: str) -> str:
    return (
        f"group {name} {how}: stop every replica of the service first (one that was killed counts for 15 seconds more)"
    )
