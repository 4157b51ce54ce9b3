"""What must be true of the service, worked out from bare rows and published bytes; shares no code with the service.

Everything wrong is collected in `violations`, because what the service calls runs inside its own error handling.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final, Literal
from uuid import UUID, uuid5

from consumer.generation import Partition
from tests.faults.fakes import Log, Topics, body
from tests.unit.builders import Bytes

ALWAYS: Final = ("total", "sent", "replied", "bounced")
WHEN_SOME: Final = ("completed", "timed_out", "connection_sent", "connected", "message_sent")
CONTACTED: Final = ("sent", "replied", "bounced", "completed", "timed_out")
MIN_SENT, THRESHOLD_BP, WINDOW = 10, 1_000, 20

Row = Any  # of asyncpg, by column name: a Record is no Mapping
Place = tuple[str, int, int]
"""Topic, partition, offset."""


class Violation(AssertionError):
    """The service broke a promise."""


@dataclass(frozen=True, slots=True)
class Meaning:
    """What a record asks for. `request`: the id of a sync request; `foreign`: of somebody else's campaign."""

    kind: Literal["hint", "request", "garbage", "tombstone"]
    campaign_id: UUID | None = None
    request: str | None = None
    foreign: bool = False


@dataclass(frozen=True, slots=True)
class Told:
    """A row of the outbox."""

    id: int
    campaign_id: UUID
    type: str
    event: bytes
    body: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Prospect:
    """What the guard and the counts look at."""

    id: UUID
    status: str
    contacted_at: datetime | None


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A campaign and its prospects as one transaction saw them."""

    type: str
    status: str
    prospects: tuple[Prospect, ...]

    def window(self, opened_at: datetime | None) -> tuple[int, int]:
        """Contacted and bounced among the latest contacts since the last pause."""
        contacted = [
            prospect
            for prospect in self.prospects
            if (prospect.status in CONTACTED or (prospect.status == "cancelled" and prospect.contacted_at is not None))
            and (opened_at is None or (prospect.contacted_at is not None and prospect.contacted_at > opened_at))
        ]
        contacted.sort(key=lambda p: (p.contacted_at is not None, p.contacted_at or 0, p.id), reverse=True)
        latest = contacted[:WINDOW]
        return len(latest), sum(prospect.status == "bounced" for prospect in latest)

    def trips(self, opened_at: datetime | None) -> bool:
        """The rule of the guard, in integers."""
        sent, bounced = self.window(opened_at)
        enough = sent >= MIN_SENT and bounced * 10_000 >= THRESHOLD_BP * sent
        return self.type == "email" and self.status == "active" and enough


def counted(statuses: Iterable[str]) -> dict[str, int]:
    """Status -> count."""
    counts: dict[str, int] = {}
    for status in statuses:
        counts[status] = counts.get(status, 0) + 1
    return counts


def stats_of(counts: Mapping[str, int]) -> dict[str, int]:
    """`stats` in order and with the keys that must be there."""
    stats = {key: sum(counts.values()) if key == "total" else counts.get(key, 0) for key in ALWAYS}
    return stats | {key: counts[key] for key in WHEN_SOME if counts.get(key)}


@dataclass
class Model:
    """What happened so far, as seen from outside."""

    log: Log
    topics: Topics
    alive: set[UUID] = field(default_factory=set)
    stale: set[UUID] = field(default_factory=set)  # changed without a hint since: only a sweep can know
    failed: set[UUID] = field(default_factory=set)  # recounts of these were made to fail
    violations: list[str] = field(default_factory=list)
    clock: int = 0
    meanings: dict[Place, Meaning] = field(default_factory=dict)
    read_at: dict[Place, int] = field(default_factory=dict)
    recounted_at: dict[UUID, int] = field(default_factory=dict)
    told: dict[int, Told] = field(default_factory=dict)
    told_events: dict[bytes, Told] = field(default_factory=dict)
    told_ids: dict[str, bytes] = field(default_factory=dict)
    present: set[int] = field(default_factory=set)
    set_aside: set[int] = field(default_factory=set)
    versions: dict[UUID, int] = field(default_factory=dict)
    opened_at: dict[UUID, datetime] = field(default_factory=dict)
    synced_at: dict[UUID, datetime | None] = field(default_factory=dict)
    deferred: dict[int, tuple[UUID, frozenset[str]]] = field(default_factory=dict)
    looked_at: int = 0
    checked: int = 0
    pauses: int = 0

    def wrong(self, sentence: str) -> None:
        """A promise is broken."""
        self.violations.append(sentence)

    def tick(self) -> int:
        """Before and after, of our own."""
        self.clock += 1
        return self.clock

    def raise_first(self) -> None:
        """The first broken promise, if any."""
        if self.violations:
            raise Violation(self.violations[0])

    # -- the log

    def wrote(self, record: Bytes, meaning: Meaning) -> None:
        """An upstream wrote a record."""
        self.meanings[record.topic, record.partition, record.offset] = meaning
        if meaning.kind in ("hint", "request") and meaning.campaign_id is not None:
            self.stale.discard(meaning.campaign_id)

    def delivered(self, records: Sequence[Bytes]) -> None:
        """A replica read records."""
        now = self.tick()
        for record in records:
            self.read_at.setdefault((record.topic, record.partition, record.offset), now)

    def commits(self, offsets: Mapping[Partition, int], deferred: Mapping[UUID, frozenset[str]]) -> None:
        """Offsets are about to be committed. `deferred`: campaign -> requests that wait there."""
        for partition, offset in offsets.items():
            committed = self.log.committed[partition]
            if offset < committed:
                self.wrong(f"offsets go back from {committed} to {offset} in {partition}")
            for passed in range(committed, offset):
                self._passes((*partition, passed), deferred)

    def _passes(self, place: Place, deferred: Mapping[UUID, frozenset[str]]) -> None:
        meaning = self.meanings[place]
        if meaning.kind == "garbage" and place not in self.topics.dead_letters:
            self.wrong(f"the offset passes {place}, whose dead letter was not acknowledged")
        campaign_id = meaning.campaign_id
        if campaign_id is None or place not in self.read_at:
            return
        is_done = self.recounted_at.get(campaign_id, 0) > self.read_at[place] or campaign_id in deferred
        if campaign_id in self.alive and not is_done:
            self.wrong(f"the offset passes {place}, whose campaign is neither recounted nor deferred")
        if (
            meaning.request is not None
            and answer_id(campaign_id, meaning.request) not in self.told_ids
            and meaning.request not in deferred.get(campaign_id, frozenset())
        ):
            self.wrong(f"the offset passes {place}, whose request is neither answered nor deferred")

    # -- transactions

    def recounted(self, counts: Mapping[str, int], snapshot: Snapshot) -> None:
        """The service counted; whoever held the campaign before us has committed by now."""
        truth = counted(prospect.status for prospect in snapshot.prospects)
        if counts != truth:
            self.wrong(f"counted {counts} under the lock, but the rows say {truth}")

    def committed(
        self,
        recounts: Mapping[UUID, tuple[int, Sequence[Snapshot]]],
        outbox: Sequence[Row],
        audit: Sequence[Row],
        rows: Mapping[UUID, Row],
    ) -> None:
        """A transaction committed. `recounts`: when and what it saw; `audit`: new pauses; `rows`: campaigns now."""
        for campaign_id, (clock, _) in recounts.items():
            self.recounted_at[campaign_id] = max(clock, self.recounted_at.get(campaign_id, 0))
        new = [self._tell(row) for row in outbox if row["id"] not in self.told]
        self._outbox_rows_left(outbox)
        self._versions_rise(new)
        self._pauses_are_right(recounts, new, audit, rows)

    def _tell(self, row: Mapping[str, Any]) -> Told:
        told = Told(row["id"], row["campaign_id"], row["type"], row["event"], body(row["event"]))
        self.told[told.id] = told
        self.told_events[told.event] = told
        event_id, data = told.body["id"], told.body["data"]
        is_answer = event_id == answer_id(told.campaign_id, told.body.get("causationid", ""))
        name = {"campaign.stats_updated.v1": "stats", "campaign.paused.v1": "paused"}.get(told.type)
        if not is_answer and (name is None or event_id != str(uuid5(told.campaign_id, f"{name}:{data['version']}"))):
            self.wrong(f"{told.type} has an id that does not follow from what it says")
        if not is_answer and self.told_ids.get(event_id, told.event) != told.event:
            self.wrong(f"one id for two different {told.type}")
        self.told_ids[event_id] = told.event
        return told

    def _outbox_rows_left(self, outbox: Sequence[Row]) -> None:
        present = {row["id"] for row in outbox}
        for gone in self.present - present:
            if self.told[gone].event not in self.topics.acknowledged:
                self.wrong(f"outbox row {gone} was deleted, but never acknowledged")
        self.set_aside = {row["id"] for row in outbox if row["aside"]}
        for aside in self.set_aside:
            if self.told[aside].event not in self.topics.refused:
                self.wrong(f"outbox row {aside} was set aside, but was not refused for ever")
        self.present = present

    def _versions_rise(self, new: Sequence[Told]) -> None:
        for campaign_id in {told.campaign_id for told in new}:
            versions = {
                told.body["data"]["version"]
                for told in new
                if told.campaign_id == campaign_id and "version" in told.body["data"]
            }
            if len(versions) > 1:
                self.wrong(f"one recount with the versions {sorted(versions)}")
            for version in versions:
                before = self.versions.get(campaign_id, 0)
                if version <= before:
                    self.wrong(f"version {version} of a new recount comes after {before}")
                self.versions[campaign_id] = version

    def _pauses_are_right(
        self,
        recounts: Mapping[UUID, tuple[int, Sequence[Snapshot]]],
        new: Sequence[Told],
        audit: Sequence[Row],
        rows: Mapping[UUID, Row],
    ) -> None:
        events = {told.campaign_id: told.body["data"] for told in new if told.type == "campaign.paused.v1"}
        news = {
            (told.campaign_id, told.body["data"]["version"], told.body["data"]["campaign"]["status"])
            for told in new
            if told.type == "campaign.stats_updated.v1"
        }
        paused = {row["campaign_id"]: row for row in audit}
        if len(paused) != len(audit) or events.keys() != paused.keys():
            self.wrong("pauses in the audit and events of pauses are not the same")
        for campaign_id, row in paused.items():
            self.pauses += 1
            windows = [
                snapshot.window(self.opened_at.get(campaign_id))
                for snapshot in recounts[campaign_id][1]
                if snapshot.trips(self.opened_at.get(campaign_id))
            ]
            if (row["sent"], row["bounced"]) not in windows:
                self.wrong(f"a pause at {row['bounced']} of {row['sent']}, which the rule does not justify")
            event = events.get(campaign_id, {})
            if (event.get("version"), event.get("sent"), event.get("bounced")) != (
                row["version"],
                row["sent"],
                row["bounced"],
            ):
                self.wrong("a pause whose event and audit do not say the same")
            if (campaign_id, row["version"], "paused") not in news:
                self.wrong("a pause without stats_updated of its version")
            if (rows[campaign_id]["status"], rows[campaign_id]["pause_reason"]) != ("paused", "bounce_rate"):
                self.wrong("a pause that does not stand in the campaign's row")
        for campaign_id, (_, snapshots) in recounts.items():
            if campaign_id not in paused and all(s.trips(self.opened_at.get(campaign_id)) for s in snapshots):
                self.wrong("a recount of a campaign that trips, without a pause")
        self.opened_at.update({campaign_id: row["decided_at"] for campaign_id, row in paused.items()})

    # -- after every step

    def looked(
        self, campaigns: Mapping[UUID, datetime | None], deferred: Mapping[int, tuple[UUID, frozenset[str]]]
    ) -> None:
        """The state of things after a step: `last_synced_at` of every campaign, and every deferred row."""
        for campaign_id, synced_at in campaigns.items():
            before = self.synced_at.get(campaign_id)
            if before is not None and (synced_at is None or synced_at < before):
                self.wrong(f"last_synced_at goes back from {before} to {synced_at}")
        self.synced_at = dict(campaigns)
        written = {campaign_id for row_id, (campaign_id, _) in deferred.items() if row_id not in self.deferred}
        waiting = frozenset[str]().union(*(requests for _, requests in deferred.values()))
        for row_id, (campaign_id, requests) in self.deferred.items():
            if row_id in deferred:
                continue
            is_done = self.recounted_at.get(campaign_id, 0) > self.looked_at or campaign_id in written
            if campaign_id in self.alive and not is_done:
                self.wrong("a deferred row is gone, but its campaign was not recounted")
            for request in requests - waiting:
                if answer_id(campaign_id, request) not in self.told_ids:
                    self.wrong("a deferred row is gone with a request that was not answered")
        self.deferred = dict(deferred)
        self.looked_at = self.tick()
        for copy in self.topics.published[self.checked :]:
            if copy.event not in self.told_events:
                self.wrong(f"a {copy.type} was published that is not in the outbox as it stands")
        self.checked = len(self.topics.published)

    # -- at rest

    def at_rest(self, campaigns: Mapping[UUID, Row], statuses: Mapping[UUID, Sequence[str]], *, swept: bool) -> None:
        """Everything was drained: what is stored and what was published last is the truth."""
        last: dict[UUID, Row] = {}
        copies = [copy.event for copy in self.topics.published] + [self.told[row].event for row in self.set_aside]
        for event in copies:
            told = self.told_events.get(event)
            if told is not None and told.type == "campaign.stats_updated.v1":
                data = told.body["data"]
                if data["version"] >= last.get(told.campaign_id, {"version": 0})["version"]:
                    last[told.campaign_id] = data
        for campaign_id, row in campaigns.items():
            if campaign_id in self.stale and not swept:
                continue
            counts = counted(statuses.get(campaign_id, ()))
            if row["stats"] != stats_of(counts):
                self.wrong(f"stored {row['stats']}, but the rows say {stats_of(counts)}")
            data = last.get(campaign_id)
            if data is None:
                self.wrong("a campaign was never published")
                continue
            published = data["campaign"]
            if list(published["stats"].items()) != list(stats_of(counts).items()):
                self.wrong(f"published {published['stats']} last, but the rows say {stats_of(counts)}")
            if data.get("prospects_by_status", {}) != counts or published["status"] != row["status"]:
                self.wrong(f"published {published['status']} last, but the row says {row['status']}")
        self._requests_are_answered()
        self._order_is_kept()

    def _requests_are_answered(self) -> None:
        answers: dict[str, list[Row]] = {}
        for event in {copy.event for copy in self.topics.published} | {self.told[row].event for row in self.set_aside}:
            parsed = body(event)
            answers.setdefault(str(parsed["id"]), []).append(parsed)
        for meaning in self.meanings.values():
            if meaning.request is None or meaning.campaign_id is None:
                continue
            found = answers.get(answer_id(meaning.campaign_id, meaning.request), [])
            if not found:
                self.wrong(f"request {meaning.request} was never answered")
            for answer in found:
                is_rejected = answer["type"] == "campaign.sync_rejected.v1"
                may_be_rejected = (
                    meaning.foreign or meaning.campaign_id not in self.alive or meaning.campaign_id in self.failed
                )
                if answer.get("causationid") != meaning.request or (is_rejected and not may_be_rejected):
                    self.wrong(f"request {meaning.request} has the wrong answer {answer['type']}")
                if meaning.foreign and not is_rejected:
                    self.wrong(f"request {meaning.request} of a stranger was answered")

    def _order_is_kept(self) -> None:
        """Who reads a topic to its end meets the last copy of each of a campaign's events in commit order."""
        last: dict[tuple[UUID, str], dict[int, int]] = {}
        for place, copy in enumerate(self.topics.published):
            told = self.told_events.get(copy.event)
            if told is not None:
                last.setdefault((copy.campaign_id, copy.type), {})[told.id] = place
        for places in last.values():
            by_id = [places[row_id] for row_id in sorted(places)]
            if by_id != sorted(by_id):
                self.wrong("events of a campaign stand in their topic in another order than that of the commits")


def answer_id(campaign_id: UUID, request: str) -> str:
    """The id of the answer to a request."""
    return str(uuid5(campaign_id, f"answer:product:{request}"))
