"""Looks at the tables and the topics when all is quiet and says what does not hold. Shares no code with the service."""

import json
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, Final
from uuid import UUID, uuid5

import asyncpg
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from cloudevents.core.bindings.kafka import KafkaMessage, from_structured_event
from cloudevents.core.formats.json import JSONFormat

CONTACTED: Final = ("sent", "replied", "bounced", "completed", "timed_out")
NOT_ALWAYS: Final = ("completed", "timed_out", "connection_sent", "connected", "message_sent")
LIMITS: Final = (500, 100, 500)  # threshold in basis points, least sent, window: the defaults; no scenario has others
UNSEEN: Final = timedelta(seconds=25)  # from a writer's clock to its COMMIT: it may wait for a frozen session of ours
STATS_UPDATED: Final = "campaign.stats_updated.v1"
REJECTED: Final = "campaign.sync_rejected.v1"
PAUSED: Final = "campaign.paused.v1"


@dataclass(frozen=True)
class Told:
    """One event of ours as a subscriber reads it, in the order of its partition."""

    id: str
    type: str
    subject: str
    data: Mapping[str, Any]
    causation: str | None
    partition: int
    offset: int


@dataclass
class Findings:
    """`problems` is empty when every guarantee held; the rest is for tests that look closer."""

    problems: list[str] = field(default_factory=list)
    told: list[Told] = field(default_factory=list)
    dead_letters: list[Any] = field(default_factory=list)
    pauses: dict[str, Told] = field(default_factory=dict)

    def must(self, holds: object, otherwise: str) -> None:
        """Note what does not hold."""
        if not holds:
            self.problems.append(otherwise)


async def read_all(bootstrap: str, topics: Sequence[str]) -> list[Any]:
    """Every record of the topics up to their present ends, in offset order within each partition."""
    consumer = AIOKafkaConsumer(bootstrap_servers=bootstrap, enable_auto_commit=False, auto_offset_reset="earliest")
    await consumer.start()
    try:
        metadata = await consumer._client.fetch_all_metadata()
        partitions = [
            TopicPartition(topic, number) for topic in topics for number in metadata.partitions_for_topic(topic) or ()
        ]
        consumer.assign(partitions)
        ends = await consumer.end_offsets(partitions)
        records: list[Any] = []
        while any([await consumer.position(partition) < ends[partition] for partition in partitions]):
            for some in (await consumer.getmany(timeout_ms=200)).values():
                records.extend(some)
        return records
    finally:
        await consumer.stop()


async def lag(bootstrap: str, group: str, topics: Sequence[str]) -> int:
    """How many records lie between what the group has committed and the ends, also where it is beyond an end."""
    admin = AIOKafkaAdminClient(bootstrap_servers=bootstrap)
    consumer = AIOKafkaConsumer(bootstrap_servers=bootstrap, enable_auto_commit=False)
    await admin.start()
    await consumer.start()
    try:
        metadata = await consumer._client.fetch_all_metadata()
        partitions = [
            TopicPartition(topic, number) for topic in topics for number in metadata.partitions_for_topic(topic) or ()
        ]
        ends = await consumer.end_offsets(partitions)
        committed = await admin.list_consumer_group_offsets(group)
        done = {partition: max(0, committed[partition].offset) for partition in partitions if partition in committed}
        return sum(abs(ends[partition] - done.get(partition, 0)) for partition in partitions)
    finally:
        await consumer.stop()
        await admin.close()


async def check(
    database_url: str,
    bootstrap: str,
    topics: Any,
    group: str,
    *,
    requested: Mapping[tuple[str, str], UUID],
    garbage: Collection[tuple[str, bytes]],
    paused: Collection[UUID] = (),
    bouncing: Collection[UUID] = (),
    untold: Collection[UUID] = (),
) -> Findings:
    """What does not hold now that nothing moves any more.

    `paused`: campaigns that must have been paused, exactly once each. `bouncing`: all that may have been paused.
    `untold`: campaigns of which nothing need have been published.
    """
    found = Findings()
    db = await asyncpg.connect(database_url)
    try:
        await db.set_type_codec("jsonb", schema="pg_catalog", encoder=json.dumps, decoder=json.loads)
        found.must(
            await lag(bootstrap, group, topics.read) == 0, "offsets: the group has not committed everything there is"
        )
        ours = [topics.of(type_) for type_ in (STATS_UPDATED, REJECTED, PAUSED)]
        found.told = [_told(record) for record in await read_all(bootstrap, ours)]
        found.dead_letters = await read_all(bootstrap, [topics.dead_letters])
        campaigns = await db.fetch("SELECT * FROM public.campaigns")
        counts = await _counts(db)
        _ids_stand_for_one_fact(found, requested)
        _first_copies_are_in_order(found)
        _numbers_are_true(found, campaigns, counts, untold)
        _followers_know_the_truth(found, campaigns, counts, {str(one) for one in untold})
        _requests_are_answered(found, requested, {campaign["id"] for campaign in campaigns})
        await _pauses_are_justified(found, db, campaigns, paused, bouncing)
        await _nobody_bounces_on(found, db, campaigns)
        _garbage_is_kept(found, garbage)
        await _nothing_is_left(found, db)
    finally:
        await db.close()
    return found


def _told(record: Any) -> Told:
    event = from_structured_event(
        KafkaMessage(headers=dict(record.headers), key=record.key, value=record.value), JSONFormat()
    )
    raw = json.loads(record.value)
    data = event.get_data()
    assert isinstance(data, dict)
    assert raw["id"] == event.get_id()  # the package invents a missing one
    assert record.key.decode() == event.get_subject()
    return Told(
        raw["id"],
        event.get_type(),
        record.key.decode(),
        data,
        raw.get("causationid"),
        record.partition,
        record.offset,
    )


async def _counts(db: asyncpg.Connection) -> dict[UUID, dict[str, int]]:
    counts: dict[UUID, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for row in await db.fetch("SELECT campaign_id, status FROM public.campaign_prospects"):
        counts[row["campaign_id"]][row["status"]] += 1
    return counts


def _stats(counts: Mapping[str, int]) -> dict[str, int]:
    stats = {"total": sum(counts.values())}
    stats |= {status: counts.get(status, 0) for status in ("sent", "replied", "bounced")}
    return stats | {status: counts[status] for status in NOT_ALWAYS if counts.get(status)}


def _ids_stand_for_one_fact(found: Findings, requested: Mapping[tuple[str, str], UUID]) -> None:
    """News and pauses: the same id, the same words, and an id that follows from campaign and version.

    An answer's id stands for its request: a request that is worked off twice may be answered with newer numbers. But
    whatever is told of one version of a campaign tells the same numbers.
    """
    answers = {str(uuid5(campaign, f"answer:{source}:{id_}")) for (source, id_), campaign in requested.items()}
    asked = {id_ for _, id_ in requested}
    said: dict[tuple[str, str], Told] = {}
    numbers: dict[tuple[str, int], Any] = {}
    for told in found.told:
        if told.type == REJECTED:
            continue
        kind = "paused" if told.type == PAUSED else "stats"
        due = str(uuid5(UUID(told.subject), f"{kind}:{told.data['version']}"))
        if told.type == STATS_UPDATED:
            says = (told.data["campaign"]["stats"], told.data.get("prospects_by_status"))
            before = numbers.setdefault((told.subject, told.data["version"]), says)
            found.must(before == says, f"version {told.data['version']} of {told.subject} has two sets of numbers")
            if told.id in answers or (told.data["trigger"] == "sync_requested" and told.causation not in asked):
                continue
        first = said.setdefault((told.type, told.id), told)
        found.must(first.data == told.data, f"id {told.id} of {told.type} says two things")
        found.must(told.id == due, f"id of {told.type} does not follow from its campaign and version")


def _first_copies_are_in_order(found: Findings) -> None:
    """Whoever reads a topic meets a campaign's events by rising version, but for repeats of what was there before."""
    highest: dict[tuple[str, str], int] = {}
    seen: set[tuple[str, str]] = set()
    for told in found.told:
        if told.type == REJECTED or (told.type, told.id) in seen:
            continue
        seen.add((told.type, told.id))
        before = highest.get((told.type, told.subject), 0)
        found.must(told.data["version"] >= before, f"order: {told.type} of {told.subject} went back from {before}")
        highest[told.type, told.subject] = max(before, told.data["version"])


def _numbers_are_true(
    found: Findings,
    campaigns: Sequence[asyncpg.Record],
    counts: Mapping[UUID, Mapping[str, int]],
    untold: Collection[UUID],
) -> None:
    for campaign in campaigns:
        if campaign["id"] in untold:
            continue
        truth = _stats(counts.get(campaign["id"], {}))
        stored = {name: count for name, count in campaign["stats"].items() if count or name in truth}
        found.must(stored == truth, f"numbers: {campaign['id']} has {campaign['stats']}, the rows say {truth}")
        found.must(campaign["last_synced_at"], f"numbers: {campaign['id']} was never recounted")


def _followers_know_the_truth(
    found: Findings,
    campaigns: Sequence[asyncpg.Record],
    counts: Mapping[UUID, Mapping[str, int]],
    untold: Collection[str],
) -> None:
    """A follower takes what is newer than what it has, whatever the order."""
    known: dict[str, Told] = {}
    for told in found.told:
        if told.type == STATS_UPDATED:
            has = known.get(told.subject)
            if has is None or told.data["version"] > has.data["version"]:
                known[told.subject] = told
    for campaign in campaigns:
        campaign_id = str(campaign["id"])
        truth = {status: count for status, count in counts.get(campaign["id"], {}).items() if count}
        if campaign_id in untold:
            continue
        if campaign_id not in known:
            found.problems.append(f"follower: nothing was ever told of {campaign_id}")
            continue
        row = known[campaign_id].data
        says = (row.get("prospects_by_status", {}), row["campaign"]["stats"], row["campaign"]["status"])
        holds = (truth, _stats(truth), campaign["status"])
        found.must(says == holds, f"follower: ends with {says} for {campaign_id}, the rows say {holds}")


def _requests_are_answered(
    found: Findings, requested: Mapping[tuple[str, str], UUID], campaigns: Collection[UUID]
) -> None:
    """Each of them, under one id; `not_found` of those whose campaign does not exist and of no other."""
    answers: dict[str, set[str]] = defaultdict(set)
    rejected: dict[str, str] = {}
    for told in found.told:
        if told.causation is not None and (told.type == REJECTED or told.data.get("trigger") == "sync_requested"):
            answers[told.causation].add(told.id)
        if told.type == REJECTED:
            rejected[str(told.causation)] = told.data["reason"]
    nobodys = rejected.keys() - {request for _, request in requested}
    found.must(not nobodys, f"rejections of requests that nobody made: {nobodys}")
    for (source, request), campaign_id in requested.items():
        ids = answers.get(request, set())
        due_reason = None if campaign_id in campaigns else "not_found"
        found.must(
            not ids or rejected.get(request) == due_reason,
            f"request {request} was rejected: {rejected.get(request)}, not {due_reason}",
        )
        due = str(uuid5(campaign_id, f"answer:{source}:{request}"))
        found.must(ids, f"request {request} was never answered")
        found.must(ids <= {due}, f"request {request} was answered under ids that do not follow from it")


async def _pauses_are_justified(
    found: Findings,
    db: asyncpg.Connection,
    campaigns: Sequence[asyncpg.Record],
    paused: Collection[UUID],
    bouncing: Collection[UUID],
) -> None:
    """Every pause told stands in the audit with the same numbers, which trip the rule, and every one there was told."""
    for told in found.told:
        if told.type == PAUSED:
            found.pauses[told.id] = told
    audit = {
        (str(row["campaign_id"]), row["version"]): row
        for row in await db.fetch("SELECT * FROM campaign_stats.guard_decisions WHERE paused")
    }
    by_version = {(told.subject, told.data["version"]): told for told in found.pauses.values()}
    found.must(len(by_version) == len(found.pauses), "pauses: one pause was told under two ids")
    for key in by_version.keys() ^ audit.keys():
        where = "told but not in the audit" if key in by_version else "in the audit but never told"
        found.problems.append(f"pauses: {key[0]} version {key[1]} is {where}")
    contacts = await _contacts(db)
    for key, told in sorted(by_version.items()):
        data = told.data
        limits = (data["threshold_bp"], data["min_sent"], data["window"])
        found.must(limits == LIMITS, f"pauses: {key[0]} by {limits}, which nobody set")
        if key in audit:
            earlier = [audit[other]["decided_at"] for other in audit if other[0] == key[0] and other[1] < key[1]]
            _follows_from_the_rows(found, told, contacts[UUID(key[0])], max(earlier, default=None))
        trips = data["sent"] >= data["min_sent"] and data["bounced"] * 10_000 >= data["threshold_bp"] * data["sent"]
        found.must(trips, f"pauses: {key[0]} with {data['bounced']} of {data['sent']}")
        if key in audit:
            same = (audit[key]["sent"], audit[key]["bounced"]) == (data["sent"], data["bounced"])
            found.must(same, f"pauses: audit and event of {key[0]} differ")
        beside = [
            one
            for one in found.told
            if one.type == STATS_UPDATED and one.subject == told.subject and one.data["version"] == data["version"]
        ]
        found.must(beside, f"pauses: no stats_updated of the same version beside the pause of {key[0]}")
    rows = {str(row["id"]): row for row in campaigns}
    unexpected = {key[0] for key in by_version} - {str(one) for one in bouncing}
    found.must(not unexpected, f"pauses: {unexpected} were paused, and nothing asked for it")
    for campaign_id in map(str, paused):
        times = [key for key in by_version if key[0] == campaign_id]
        found.must(len(times) == 1, f"pauses: {campaign_id} was paused {len(times)} times, not once")
        row = rows[campaign_id]
        found.must(
            (row["status"], row["pause_reason"]) == ("paused", "bounce_rate"), f"pauses: row of {campaign_id} says no"
        )


async def _contacts(db: asyncpg.Connection) -> dict[UUID, list[Any]]:
    """Of each campaign: those who were mailed, when, and whether that bounced."""
    contacts: dict[UUID, list[Any]] = defaultdict(list)
    for row in await db.fetch(
        "SELECT campaign_id, id, status, contacted_at FROM public.campaign_prospects WHERE contacted_at IS NOT NULL"
    ):
        if row["status"] in (*CONTACTED, "cancelled"):
            contacts[row["campaign_id"]].append(row)
    return contacts


def _follows_from_the_rows(found: Findings, told: Told, contacts: Sequence[Any], since: datetime | None) -> None:
    """A pause's numbers against the rows as they are now: nobody is ever not mailed again, and a bounce stays one.

    Who was mailed moments before may not have been seen, for its writer had not committed.
    """
    at = datetime.fromisoformat(told.data["paused_at"])
    window = [row for row in contacts if row["contacted_at"] <= at and (since is None or row["contacted_at"] > since)]
    surely = sum(row["contacted_at"] <= at - UNSEEN for row in window)
    bounced = sum(row["status"] == "bounced" for row in window)
    says = (told.data["sent"], told.data["bounced"])
    holds = min(surely, LIMITS[2]) <= says[0] <= min(len(window), LIMITS[2]) and says[1] <= bounced
    found.must(holds, f"pauses: {told.subject} says {says}, the rows say {len(window)} ({surely} surely), {bounced}")


async def _nobody_bounces_on(found: Findings, db: asyncpg.Connection, campaigns: Sequence[asyncpg.Record]) -> None:
    """No active email campaign is left that trips the rule (default limits) and was recounted since."""
    paused_at = {
        row["campaign_id"]: row["guard_paused_at"]
        for row in await db.fetch("SELECT campaign_id, guard_paused_at FROM campaign_stats.campaign_state")
    }
    contacts = await _contacts(db)
    for campaign in campaigns:
        if campaign["type"] != "email" or campaign["status"] != "active" or campaign["last_synced_at"] is None:
            continue
        since = paused_at.get(campaign["id"])
        window = sorted(
            (row for row in contacts[campaign["id"]] if since is None or row["contacted_at"] > since),
            key=lambda row: (row["contacted_at"], row["id"]),
            reverse=True,
        )[:500]
        bounced = sum(row["status"] == "bounced" for row in window)
        trips = len(window) >= 100 and bounced * 10_000 >= 500 * len(window)
        found.must(not trips, f"pauses: {campaign['id']} bounces on, {bounced} of {len(window)}")


def _garbage_is_kept(found: Findings, garbage: Collection[tuple[str, bytes]]) -> None:
    kept = {(dict(letter.headers)["dead-letter-topic"].decode(), letter.value) for letter in found.dead_letters}
    for topic, value in garbage:
        found.must((topic, value) in kept, f"dead letters: {value[:40]!r} is lost")
    for topic, value in kept - set(garbage):
        found.problems.append(f"dead letters: {value[:80]!r} of {topic} is no garbage")


async def _nothing_is_left(found: Findings, db: asyncpg.Connection) -> None:
    for table in ("outbox", "deferred"):
        rows = await db.fetchval(f"SELECT count(*) FROM campaign_stats.{table}")
        found.must(rows == 0, f"{table}: {rows} rows are left")
