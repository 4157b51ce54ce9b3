"""What was collected while the database was busy: dirty campaigns, sync requests, dead letters and offsets together."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Final
from uuid import UUID

import msgspec

from consumer.envelope import Cause, DeadLetter, Hints, Record, SyncRequest
from schemas.events import Trigger

CHUNK_CAMPAIGNS: Final = 1_000  # one transaction; larger gains nothing and holds locks longer (design, section 6)

Partition = tuple[str, int]
"""Topic and partition number."""


@dataclass(frozen=True, slots=True)
class Passed:
    """Records that the client could not hand out, first to last offset inclusive, and the class of its error."""

    partition: Partition
    first: int
    last: int
    error: str
    too_large: bool = False


@dataclass(frozen=True, slots=True)
class Seen:
    """What the sweep saw of a campaign: its `last_synced_at` and whether the stored numbers were wrong."""

    last_synced_at: datetime | None
    drift: bool


class Work(msgspec.Struct, frozen=True, gc=False):
    """One campaign to recount, and everybody who wants to know. `hint`: ids of the last status hint.

    `since`: when the oldest hint or request behind it, or one read with it, was written to Kafka. The other last
    ones tell the story of a deferred one: the reason it was deferred for last, how often in a row, when its oldest row
    was first written, and what the sweep saw.
    """

    campaign_id: UUID
    trigger: Trigger
    hint: Cause | None = None
    requests: tuple[SyncRequest, ...] = ()
    seen: Seen | None = None
    reason: str | None = None
    tries: int = 0
    first_written: datetime | None = None
    since: datetime | None = None


@dataclass(slots=True)
class Generation:
    """Filled by the fetch loop, then handed over to the flush owner, which alone reads it from then on. In a backlog
    the flush owner takes off the oldest of its campaigns before.

    `offsets` are the next offsets to read; they may be committed once everything else in here is done. `held_bytes`:
    what dead letters and the ids of requests hold in memory. `oldest`: when the first record of a batch was written,
    epoch seconds of its producer's or broker's clock. `ahead`: how many campaigns were taken off; one that
    comes again is in here as well.
    """

    hints: Hints = field(default_factory=Hints)
    requests: dict[UUID, dict[tuple[str, str], SyncRequest]] = field(default_factory=dict)
    dead_letters: list[tuple[Record, DeadLetter]] = field(default_factory=list)
    offsets: dict[Partition, int] = field(default_factory=dict)
    records: int = 0
    asked: int = 0  # requests, the same one twice counted twice
    held_bytes: int = 0
    oldest: float | None = None
    ahead: int = 0

    def add_request(self, request: SyncRequest) -> None:
        """A sync request; the same event twice is one request."""
        self.requests.setdefault(request.campaign_id, {})[request.source, request.cause.id] = request
        self.asked += 1
        self.held_bytes += len(request.source) + len(request.cause.id)  # usually short, but without a limit

    def add_dead_letter(self, record: Record, letter: DeadLetter) -> None:
        """A record that can never be read."""
        self.dead_letters.append((record, letter))
        headers = sum(len(name) + len(content or b"") for name, content in record.headers)
        self.held_bytes += len(record.key or b"") + len(record.value or b"") + headers

    def read_up_to(self, partition: Partition, next_offset: int, records: int) -> None:
        """`records` more were collected from `partition`; reading goes on at `next_offset`."""
        self.offsets[partition] = next_offset
        self.records += records

    def written_at(self, moment: float) -> None:
        """A batch of records begins with one written at this time."""
        self.oldest = moment if self.oldest is None else min(self.oldest, moment)

    def take_first(self, most: int) -> list[Work]:
        """Up to `most` of the dirty campaigns, the oldest as a rule; they are no longer in here. Not for campaigns that
        somebody asked for: call it only while nobody did.
        """
        since = _moment(self.oldest)
        taken = self.hints.take_first(most)
        self.ahead += len(taken)
        return [Work(campaign, Trigger.STATUS_CHANGED, hint=cause, since=since) for campaign, cause in taken.items()]

    def works(self) -> Iterator[Work]:
        """Every dirty campaign once, those with sync requests first."""
        hints, since = self.hints.settled(), _moment(self.oldest)
        for campaign_id, requests in self.requests.items():
            yield Work(
                campaign_id,
                Trigger.SYNC_REQUESTED,
                hint=hints.get(campaign_id),
                requests=tuple(requests.values()),
                since=since,
            )
        for campaign_id, cause in hints.items():
            if campaign_id not in self.requests:
                yield Work(campaign_id, Trigger.STATUS_CHANGED, hint=cause, since=since)

    @property
    def campaigns(self) -> int:
        """How many campaigns are dirty."""
        hints = self.hints.settled()
        return len(hints) + sum(campaign_id not in hints for campaign_id in self.requests)

    def __bool__(self) -> bool:
        """Whether there is anything to flush or to commit."""
        return bool(self.offsets)


def _moment(seconds: float | None) -> datetime | None:
    """None also for what no calendar holds: a producer writes whatever time it likes."""
    try:
        return None if seconds is None else datetime.fromtimestamp(seconds, UTC)
    except (OverflowError, ValueError, OSError):
        return None
