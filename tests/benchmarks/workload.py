"""What every measurement works on: campaigns, changes, hints. And the proof that a run did its job.

The proof shares no code with the service: truth is counted here from the bare rows, events are read from the topic.
"""

import asyncio
import itertools
import json
import random
from collections import Counter
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Final
from uuid import UUID

import asyncpg
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.partitioner import murmur2

from consumer import broker, migrations
from schemas import events
from schemas.topics import Topics

WINDOW: Final = 500  # contacts that the guard looks at
PARTITIONS: Final = 6
BATCH_RECORDS: Final = 100  # as upstreams are told to write; record by record costs every reader 1.45x (measured)
PROSPECTS: Final = (240, 360)  # per campaign, uniform: about 300
WRITE_DEADLINE_S: Final = 300.0
READ_DEADLINE_S: Final = 120.0
TEMPLATE: Final = "bench_template"
CONTACTED: Final = ("sent", "replied", "bounced", "completed", "timed_out")  # nobody here is cancelled after a contact

LOAD_CAMPAIGNS: Final = """
INSERT INTO campaigns (id, user_id, type, name, status, daily_limit)
SELECT wanted.id, md5((wanted.number % 500)::text)::uuid,
       CASE WHEN wanted.number % 10 = 0 THEN 'linkedin' ELSE 'email' END,
       'Campaign ' || wanted.number,
       CASE wanted.number % 17 WHEN 3 THEN 'paused' WHEN 11 THEN 'completed' ELSE 'active' END, 50
  FROM unnest($1::uuid[]) WITH ORDINALITY AS wanted (id, number)
"""

LOAD_PROSPECTS: Final = """
INSERT INTO campaign_prospects
       (campaign_id, user_id, status, email, first_name, last_name, company, position, contacted_at)
SELECT c.id, c.user_id, s.status, 'person-' || p.number || '@company-' || p.roll || '.example',
       'First' || p.roll, 'Last' || p.number, 'Company ' || p.roll, 'Head of Procurement',
       CASE WHEN s.status NOT IN ('pending', 'cancelled')
            THEN now() - interval '1 hour' - make_interval(mins => p.roll * 40) END
  FROM unnest($1::uuid[], $2::int[]) AS wanted (id, size)
  JOIN campaigns c ON c.id = wanted.id
 CROSS JOIN LATERAL (
       SELECT number, abs(hashtext(c.id::text || number)) % 1000 AS roll
         FROM generate_series(1, wanted.size) AS number) AS p
 CROSS JOIN LATERAL (
       SELECT CASE WHEN c.type = 'email' THEN
              CASE WHEN p.roll < 200 THEN 'pending' WHEN p.roll < 700 THEN 'sent' WHEN p.roll < 780 THEN 'replied'
                   WHEN p.roll < 800 THEN 'bounced' WHEN p.roll < 950 THEN 'completed'
                   WHEN p.roll < 980 THEN 'timed_out' ELSE 'cancelled' END
              ELSE
              CASE WHEN p.roll < 300 THEN 'pending' WHEN p.roll < 550 THEN 'connection_sent'
                   WHEN p.roll < 750 THEN 'connected' WHEN p.roll < 900 THEN 'message_sent'
                   WHEN p.roll < 970 THEN 'replied' ELSE 'completed' END
              END AS status) AS s
"""

# About 2 % of all prospects move on, 6 per campaign: nearly every campaign has news and stale stats.
CHANGE: Final = """
WITH dice AS (
    SELECT p.id, p.status, abs(hashtext(p.id::text || $1::text)) % 1000 AS roll
      FROM campaign_prospects p
     WHERE p.status IN ('pending', 'sent', 'connection_sent', 'connected')
)
UPDATE campaign_prospects p
   SET updated_at = clock_timestamp(),
       status = CASE
           WHEN c.type = 'email' AND p.status = 'pending' THEN 'sent'
           WHEN c.type = 'email' THEN CASE WHEN dice.roll < 10 THEN 'replied' WHEN dice.roll < 28 THEN 'completed'
                                           ELSE 'bounced' END
           WHEN p.status = 'pending' THEN 'connection_sent'
           WHEN p.status = 'connection_sent' THEN 'connected'
           ELSE 'message_sent' END
  FROM dice, campaigns c
 WHERE p.id = dice.id AND dice.roll < 30 AND c.id = p.campaign_id
"""


@dataclass(frozen=True, slots=True)
class Truth:
    """What a database holds: per campaign the counted statuses, the stored stats and the campaign's own status."""

    counts: Mapping[UUID, Mapping[str, int]]
    stored: Mapping[UUID, Mapping[str, int]]
    status: Mapping[UUID, str]
    email: Collection[UUID]

    def drifted(self) -> list[UUID]:
        """Campaigns whose stored stats are not what their rows say."""
        return [campaign for campaign, counts in self.counts.items() if self.stored[campaign] != stats_of(counts)]

    def overlooked(self) -> list[UUID]:
        """Active email campaigns that the bounce guard should have paused, of those whose window holds all contacts."""
        found = []
        for campaign in self.email:
            counts = self.counts[campaign]
            sent = sum(counts.get(status, 0) for status in CONTACTED)
            if (
                self.status[campaign] == "active"
                and 100 <= sent <= WINDOW
                and counts.get("bounced", 0) * 10_000 >= 500 * sent
            ):
                found.append(campaign)
        return found


@dataclass(slots=True)
class News:
    """What stands on a stats-updated topic: how many events, of each campaign the one with the highest version, and the
    ids of the events that they name as their cause.
    """

    events: int = 0
    causes: set[str] = field(default_factory=set)
    latest: dict[UUID, Mapping[str, Any]] = field(default_factory=dict)


def campaign_ids(count: int, seed: int = 1) -> list[UUID]:
    """The same ids every time."""
    dice = random.Random(seed)
    return [UUID(int=dice.getrandbits(128), version=4) for _ in range(count)]


def zipf(ids: Sequence[UUID], hints: int, seed: int) -> list[UUID]:
    """Which campaign each hint is for: the k-th most frequent one has weight 1/k; `seed` decides which one that is.

    Every campaign is among them, as every campaign changes: what the dice left out takes places of the most frequent.
    """
    dice = random.Random(seed)
    ranked = dice.sample(ids, len(ids))
    weights = list(itertools.accumulate(1 / rank for rank in range(1, len(ids) + 1)))
    draws = dice.choices(ranked, cum_weights=weights, k=hints)
    forgotten = sorted(set(ids) - set(draws))
    plenty = [place for place, campaign in enumerate(draws) if campaign == ranked[0]]
    for place, campaign in zip(dice.sample(plenty, len(forgotten)), forgotten, strict=True):
        draws[place] = campaign
    return draws


def stats_of(counts: Mapping[str, int]) -> dict[str, int]:
    """Stats by the words of the design: four keys always, five when they are not zero."""
    stats = {"total": sum(counts.values()), **{key: counts.get(key, 0) for key in ("sent", "replied", "bounced")}}
    for key in ("completed", "timed_out", "connection_sent", "connected", "message_sent"):
        if counts.get(key):
            stats[key] = counts[key]
    return stats


async def make_template(
    admin_url: str, name: str, url: str, ids: Sequence[UUID], prospects: tuple[int, int] = PROSPECTS
) -> None:
    """The database that every run gets a copy of: the product's tables, our migrations, campaigns with prospects."""
    async with connected(admin_url) as admin:
        await admin.execute(f'CREATE DATABASE "{name}"')
    await migrations.migrate(url, reference_schema=True)
    dice = random.Random(2)
    sizes = [dice.randint(*prospects) for _ in ids]
    async with connected(url) as db:
        await db.execute(LOAD_CAMPAIGNS, ids)
        await db.execute(LOAD_PROSPECTS, ids, sizes)
        await settle(db)


async def copy_database(admin_url: str, name: str, of: str) -> None:
    """A database of its own for one run. The copy is file by file: the same pages, the same visibility map."""
    async with connected(admin_url) as admin:
        await admin.execute(f'CREATE DATABASE "{name}" TEMPLATE "{of}" STRATEGY FILE_COPY')


async def drop(admin_url: str, name: str) -> None:
    """Forget the database of a run."""
    async with connected(admin_url) as admin:
        await admin.execute(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)')


async def change(url: str, seed: int) -> int:
    """Move prospects behind the back of every counter, the same ones for the same seed; how many."""
    async with connected(url) as db:
        tag: str = await db.execute(CHANGE, str(seed))
        await settle(db)
    return int(tag.split()[-1])


async def settle(db: asyncpg.Connection) -> None:
    """What autovacuum and the checkpointer would have done by and by, so that no run pays for another one's rows."""
    await db.execute("VACUUM (ANALYZE)")
    await db.execute("CHECKPOINT")


async def read_truth(url: str) -> Truth:
    """Count everything from the bare rows."""
    counts: dict[UUID, Counter[str]] = {}
    async with connected(url) as db:
        campaigns = await db.fetch("SELECT id, type, status, stats FROM campaigns")
        for row in await db.fetch("SELECT campaign_id, status, count(*) AS n FROM campaign_prospects GROUP BY 1, 2"):
            counts.setdefault(row["campaign_id"], Counter())[row["status"]] = row["n"]
    return Truth(
        counts={row["id"]: counts.get(row["id"], Counter()) for row in campaigns},
        stored={row["id"]: json.loads(row["stats"]) for row in campaigns},
        status={row["id"]: row["status"] for row in campaigns},
        email={row["id"] for row in campaigns if row["type"] == "email"},
    )


async def waiting(db: asyncpg.Connection) -> int:
    """Rows in the outbox (also those set aside) and in the deferred table."""
    rows: int = await db.fetchval(
        "SELECT (SELECT count(*) FROM campaign_stats.outbox) + (SELECT count(*) FROM campaign_stats.deferred)"
    )
    return rows


async def sessions(url: str) -> list[int]:
    """Process ids of the service's sessions in this database."""
    async with connected(url) as db:
        rows = await db.fetch(
            "SELECT pid FROM pg_stat_activity"
            " WHERE datname = current_database() AND application_name = 'campaign-stats'"
        )
    return [row["pid"] for row in rows]


async def prove(url: str, before: Truth, news: News, hinted: Collection[UUID]) -> list[str]:
    """What is wrong after a run of the service; empty when its figures may count.

    Campaigns that nobody hinted at are none of its business here: their prospects moved all the same. `before`: the
    template, in which everything had been published (to another topic): a campaign without an event on this topic must
    be as it was then.
    """
    after = await read_truth(url)
    async with connected(url) as db:
        rows = await waiting(db)
    problems, mine = [], set(hinted)
    if drifted := mine.intersection(after.drifted()):
        problems.append(f"{len(drifted)} campaigns have wrong stats")
    if overlooked := mine.intersection(after.overlooked()):
        problems.append(f"{len(overlooked)} campaigns should be paused")
    if rows:
        problems.append(f"{rows} rows left in outbox and deferred")
    untold = wrong = 0
    for campaign in hinted:
        told = news.latest.get(campaign)
        counts, status = after.counts[campaign], after.status[campaign]
        if told is None:
            untold += (counts, status) != (before.counts[campaign], before.status[campaign])
        else:
            wrong += (told["prospects_by_status"], told["campaign"]["stats"], told["campaign"]["status"]) != (
                counts,
                stats_of(counts),
                status,
            )
    if untold or wrong:
        problems.append(f"of {len(hinted)} campaigns with hints {untold} were not told, {wrong} told wrongly")
    return problems


async def create_topics(bootstrap: str, prefix: str, partitions: int = PARTITIONS, replication: int = 1) -> None:
    """All topics of one run."""
    wanted: dict[str, dict[str, str]] = {name: {} for name in Topics(prefix).all}
    await broker.create_topics(broker.Connection(bootstrap, {}), wanted, partitions=partitions, replication=replication)


async def create_topic(bootstrap: str, name: str) -> None:
    """One more topic, for what a peer publishes."""
    await broker.create_topics(broker.Connection(bootstrap, {}), {name: {}}, partitions=PARTITIONS, replication=1)


async def delete_topics(bootstrap: str, prefix: str) -> None:
    """Give their space back."""
    await broker.delete_topics(broker.Connection(bootstrap, {}), Topics(prefix).all)


async def write_hints(
    bootstrap: str, topic: str, draws: Sequence[UUID], seed: int, *, pad: int = 0, partitions: int = PARTITIONS
) -> None:
    """One status hint per draw, in batches, in this order within each partition; returns when all are acknowledged.

    `pad`: bytes that make each hint longer.
    """
    dice = random.Random(seed)
    keys = {campaign: str(campaign) for campaign in set(draws)}
    place = {campaign: (murmur2(key.encode()) & 0x7FFFFFFF) % partitions for campaign, key in keys.items()}
    padding = "/" + "x" * (pad - 1) if pad else ""
    producer = AIOKafkaProducer(bootstrap_servers=bootstrap, acks="all", max_batch_size=1_000_000)
    await producer.start()
    try:
        async with asyncio.timeout(WRITE_DEADLINE_S):
            acknowledged = []
            batches: dict[int, Any] = {}
            for campaign in draws:
                partition, key = place[campaign], keys[campaign]
                batch = batches.setdefault(partition, producer.create_batch())
                batch.append(timestamp=None, key=key.encode(), value=hint(key, dice.getrandbits(128), padding))
                if batch.record_count() == BATCH_RECORDS:
                    acknowledged.append(await producer.send_batch(batches.pop(partition), topic, partition=partition))
            for partition, batch in batches.items():
                acknowledged.append(await producer.send_batch(batch, topic, partition=partition))
            await asyncio.gather(*acknowledged)
    finally:
        await producer.stop()


async def write_requests(bootstrap: str, topic: str, campaigns: Sequence[UUID]) -> list[str]:
    """A sync request for each campaign; their ids."""
    ids = [f"request-{number}" for number in range(len(campaigns))]
    async with AIOKafkaProducer(bootstrap_servers=bootstrap, acks="all") as producer, asyncio.timeout(WRITE_DEADLINE_S):
        for identity, campaign in zip(ids, campaigns, strict=True):
            event = {
                "specversion": "1.0", "id": identity, "source": "/engine/web", "type": events.SYNC_REQUESTED,
                "time": "2026-04-18T15:12:00Z", "subject": str(campaign), "datacontenttype": "application/json",
                "data": {"campaign_id": str(campaign)},
            }  # fmt: skip
            await producer.send_and_wait(topic, json.dumps(event).encode(), key=str(campaign).encode())
    return ids


def hint(campaign: str, number: int, padding: str = "") -> bytes:
    """One hint as an upstream writes it, 435 bytes and `padding`; its id follows from `number`."""
    identity = f"{number:032x}"
    prospect = f"{identity[:8]}-{identity[8:12]}-4{identity[13:16]}-8{identity[17:20]}-{identity[20:]}"
    return (
        f'{{"specversion":"1.0","id":"{identity}","source":"/engine/sender{padding}","type":"{events.STATUS_CHANGED}",'
        f'"time":"2026-04-18T15:12:00.123456Z","subject":"{campaign}","datacontenttype":"application/json",'
        f'"correlationid":"run-{identity[:8]}","data":{{"campaign_id":"{campaign}","prospect_id":"{prospect}",'
        '"from_status":"pending","to_status":"sent"}}'
    ).encode()


async def read_news(bootstrap: str, topic: str, behind: Mapping[int, int] | None = None) -> News:
    """Everything on a topic of stats_updated events, of each partition from the offset in `behind` on."""
    news = News()
    async for record in read_all(bootstrap, topic, behind):
        event = json.loads(record.value)
        data = event["data"]
        news.events += 1
        news.causes.add(event.get("causationid", ""))
        campaign = UUID(data["campaign"]["id"])
        if data.get("version", 0) >= news.latest.get(campaign, {}).get("version", 0):
            news.latest[campaign] = data
    return news


async def read_counts(bootstrap: str, topic: str) -> dict[UUID, int]:
    """The latest count of every campaign on a topic of a peer that only counts."""
    return {UUID(record.key.decode()): int(record.value) async for record in read_all(bootstrap, topic)}


async def read_all(bootstrap: str, topic: str, behind: Mapping[int, int] | None = None) -> AsyncIterator[Any]:
    """Every record that stands on a topic now."""
    async with asyncio.timeout(READ_DEADLINE_S), _reading(bootstrap) as consumer:
        partitions = await _partitions(consumer, topic)
        consumer.assign(partitions)
        for number, offset in (behind or {}).items():
            consumer.seek(TopicPartition(topic, number), offset)
        left = {
            partition: end
            for partition, end in (await consumer.end_offsets(partitions)).items()
            if end > (behind or {}).get(partition.partition, 0)
        }
        while left:
            for partition, records in (await consumer.getmany(timeout_ms=500)).items():
                for record in records:
                    yield record
                if records[-1].offset + 1 >= left.get(partition, 0):
                    left.pop(partition, None)


async def ends(bootstrap: str, topic: str) -> dict[int, int]:
    """Of each partition the offset that its next record will get."""
    async with _reading(bootstrap) as consumer:
        partitions = await _partitions(consumer, topic)
        return {partition.partition: end for partition, end in (await consumer.end_offsets(partitions)).items()}


async def _partitions(consumer: Any, topic: str) -> list[Any]:
    cluster = await consumer._client.fetch_all_metadata()
    return [TopicPartition(topic, number) for number in sorted(cluster.partitions_for_topic(topic))]


@asynccontextmanager
async def _reading(bootstrap: str) -> AsyncIterator[Any]:
    consumer = AIOKafkaConsumer(bootstrap_servers=bootstrap, enable_auto_commit=False, auto_offset_reset="earliest")
    await consumer.start()
    try:
        yield consumer
    finally:
        await consumer.stop()


@asynccontextmanager
async def connected(url: str) -> AsyncIterator[asyncpg.Connection]:
    """One session."""
    db = await asyncpg.connect(url, command_timeout=300)
    try:
        yield db
    finally:
        await db.close(timeout=10)
