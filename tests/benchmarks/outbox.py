"""An outbox full of events that wait to be published, and what a follower makes of them."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any, Final
from uuid import UUID, uuid5

import asyncpg
import orjson
from aiokafka import AIOKafkaConsumer, TopicPartition

from consumer import envelope, migrations, outcome
from consumer.envelope import Cause
from consumer.outcome import Campaign, OutboxRow
from schemas import events
from schemas.events import Trigger
from tests.benchmarks import workload
from tests.benchmarks.stage import Contestant, Failed, Stage

CAMPAIGNS: Final = 10_000
LOOK_S: Final = 0.01
NOW: Final = datetime(2026, 4, 18, 15, 12, 0, 123456, UTC)
COUNTS: Final = {"pending": 61, "sent": 148, "replied": 24, "bounced": 6, "completed": 45, "timed_out": 9}

Count = Callable[[], Awaitable[int]]


def rows(count: int) -> list[OutboxRow]:
    """What recounts of campaigns in turn would have written: news, each campaign's versions 1, 2, 3 ..."""
    campaigns = [(campaign, uuid5(campaign, "user")) for campaign in workload.campaign_ids(CAMPAIGNS, seed=3)]
    return [
        _row(*campaigns[number % CAMPAIGNS], number % CAMPAIGNS, 1 + number // CAMPAIGNS) for number in range(count)
    ]


def _row(campaign: UUID, user: UUID, number: int, version: int) -> OutboxRow:
    counts = {**COUNTS, "replied": COUNTS["replied"] + version}
    row = Campaign(
        campaign, user, "email", f"Campaign {number}", "active", 50, True, False, None, workload.stats_of(counts),
        NOW, None, NOW, NOW,
    )  # fmt: skip
    event = envelope.encode(
        type=events.STATS_UPDATED,
        id=str(uuid5(campaign, f"stats:{version}")),
        time=NOW,
        subject=str(campaign),
        data=outcome.stats_updated(row, counts, version, Trigger.STATUS_CHANGED, None),
        cause=Cause(uuid5(campaign, f"hint:{version}").hex, f"run-{version}"),
    )
    return OutboxRow(campaign, events.STATS_UPDATED, event)


async def make(stage: Stage, name: str, count: int) -> None:
    """A database of no campaigns and a full outbox, to be copied for each run."""
    async with workload.connected(stage.postgres.url()) as admin:
        await admin.execute(f'CREATE DATABASE "{name}"')
    url = stage.postgres.url(name)
    await migrations.migrate(url, reference_schema=True)
    full = rows(count)
    async with workload.connected(url) as db:
        await db.copy_records_to_table(
            "outbox",
            schema_name="campaign_stats",
            columns=["shard", "campaign_id", "type", "event"],
            records=[(row.shard, row.campaign_id, row.type, row.event) for row in full],
        )
        await workload.settle(db)


@asynccontextmanager
async def copied(stage: Stage, name: str, of: str) -> AsyncIterator[str]:
    """A copy of such a database; its URL. Dropped afterwards."""
    await workload.copy_database(stage.postgres.url(), name, of)
    try:
        yield stage.postgres.url(name)
    finally:
        await workload.drop(stage.postgres.url(), name)


@asynccontextmanager
async def looking(bootstrap: str, topic: str) -> AsyncIterator[Count]:
    """How many records stand on a topic, asked of the broker: it costs the contestants nothing."""
    consumer = AIOKafkaConsumer(bootstrap_servers=bootstrap, enable_auto_commit=False)
    await consumer.start()
    partitions = [TopicPartition(topic, number) for number in range(workload.PARTITIONS)]

    async def count() -> int:
        ends: dict[Any, int] = await consumer.end_offsets(partitions)
        return sum(ends.values())

    try:
        yield count
    finally:
        await consumer.stop()


async def reached(count: Count, number: int, process: Contestant, deadline_s: float) -> float:
    """Wait until so many stand there; when the last look was that did not find so many. Raises Failed."""
    before = time.monotonic()
    deadline = before + deadline_s
    while True:
        looked = time.monotonic()
        found = await count()
        if found >= number:
            return before
        if process.has_ended or looked > deadline:
            raise Failed(f"{process.name}: {found} of {number} published:\n{process.last_lines()}")
        before = looked
        process.resident_mb()
        await asyncio.sleep(LOOK_S)


async def emptied(db: asyncpg.Connection, process: Contestant, deadline_s: float) -> float:
    """Wait until nothing is left in the outbox; when that was. Raises Failed."""
    deadline = time.monotonic() + deadline_s
    while await db.fetchval("SELECT EXISTS (SELECT FROM campaign_stats.outbox)"):
        if process.has_ended or time.monotonic() > deadline:
            raise Failed(f"{process.name} did not empty the outbox:\n{process.last_lines()}")
        await asyncio.sleep(LOOK_S)
    return time.monotonic()


async def misled(bootstrap: str, topic: str, count: int) -> list[str]:
    """What is wrong for a follower who takes only what is newer than what he has; empty when he got all rows."""
    expected = {str(campaign): 0 for campaign in workload.campaign_ids(min(CAMPAIGNS, count), seed=3)}
    latest = dict(expected)
    for number, campaign in enumerate(expected):
        expected[campaign] = count // CAMPAIGNS + (number < count % CAMPAIGNS)
    seen: set[tuple[str, int]] = set()
    skipped = 0
    async for record in workload.read_all(bootstrap, topic):
        event = orjson.loads(record.value)
        campaign, version = event["subject"], event["data"]["version"]
        if record.key.decode() != campaign:
            return [f"a record of {campaign} has the key {record.key!r}"]
        seen.add((campaign, version))
        if version > latest[campaign]:
            skipped += version - latest[campaign] - 1  # what comes of them later is dropped
            latest[campaign] = version
    problems = []
    if len(seen) != count or latest != expected:
        problems.append(f"{count - len(seen)} of {count} rows are not on the topic")
    if skipped:
        problems.append(f"{skipped} of {count} rows came after a newer one of their campaign")
    return problems
