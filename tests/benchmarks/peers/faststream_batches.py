"""Batches by FastStream, counted by this project's SQL function: as far as one gets without writing a consumer.

Idiom: https://faststream.ag2.ai/latest/kafka/Subscriber/batch_subscriber/, .../kafka/Publisher/batch_publisher/
("Per-Message Attributes"), .../kafka/ack/ (NACK_ON_ERROR) and .../getting-started/serialization/decoder/. One recount
per campaign and batch, one event per recounted campaign, then the batch is committed. Tuned: pydantic reads the bytes
at once instead of validating what JSON left (CPU 0.7x, measured), a fetch waits 0.1 s at most, batches of 5 000.

SQUEEZED=1 goes beyond what its documentation leads to: the service's settings of the garbage collector (CPU 0.5x), and
batches as large as ten fetches of the default size, for fewer recounts: at the price of up to 0.8 GB of memory.

Settings from the environment: DATABASE_URL, KAFKA_BOOTSTRAP_SERVERS, INPUT_TOPIC, OUTPUT_TOPIC, GROUP_ID.
"""

import asyncio
import gc
import logging
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from uuid import UUID

import asyncpg
import orjson
from faststream import AckPolicy, ContextRepo, FastStream
from faststream.exceptions import NackMessage
from faststream.kafka import KafkaBroker, KafkaMessage, KafkaPublishMessage
from faststream.kafka.annotations import KafkaMessage as Batch
from per_event import Event, stats_updated

RECOUNT = """
SELECT campaign_id, held, user_id, type, name, status, last_synced_at, stats, counts
  FROM campaign_stats.recalculate_campaign_stats($1, $2)
"""
SESSION = {"jit": "off", "plan_cache_mode": "force_generic_plan"}  # the service's, as far as they are about speed
SQUEEZED = os.environ.get("SQUEEZED") == "1"
TOLD = ("user_id", "type", "name", "status", "last_synced_at")


@asynccontextmanager
async def lifespan(context: ContextRepo) -> AsyncIterator[None]:
    """The session, from before the broker starts until it has ended."""
    db = await asyncpg.connect(os.environ["DATABASE_URL"], server_settings=SESSION)
    context.set_global("db", db)
    if SQUEEZED:
        gc.collect()
        gc.freeze()
        gc.set_threshold(50_000, 20, 20)
    yield
    await db.close()


broker = KafkaBroker(
    os.environ["KAFKA_BOOTSTRAP_SERVERS"],
    acks="all",
    enable_idempotence=True,
    max_batch_size=1_000_000,  # what a broker takes by default; a chunk's events, about 700 bytes each, must fit
    log_level=logging.DEBUG,
    graceful_timeout=2.0,
)
app = FastStream(broker, lifespan=lifespan)
publisher = broker.publisher(os.environ["OUTPUT_TOPIC"], batch=True)


async def decode(message: KafkaMessage) -> list[Event]:
    """All events of a batch."""
    return [Event.model_validate_json(value) for value in message.body]


@broker.subscriber(
    os.environ["INPUT_TOPIC"],
    group_id=os.environ["GROUP_ID"],
    auto_offset_reset="earliest",
    ack_policy=AckPolicy.NACK_ON_ERROR,
    batch=True,
    max_records=50_000 if SQUEEZED else 5_000,
    max_partition_fetch_bytes=(8 if SQUEEZED else 1) * 2**20,
    fetch_max_wait_ms=100,  # a partition that was not read in time drops out of the next fetch, which waits that long
    decoder=decode,
)
async def on_status_changed(events: list[Event], batch: Batch) -> None:
    """Recount what the batch names and tell. A locked campaign makes it all be read again."""
    db = app.context.get("db")
    records = zip(events, batch.raw_message, strict=True)
    causes = {event.data.campaign_id: (event, record.partition) for event, record in records}
    left = list(causes)
    while left:
        rows = await db.fetch(RECOUNT, left, "chunk")
        left = [row["campaign_id"] for row in rows if row["held"] == "later"]  # beyond what one transaction should lock
        for alone in [row["campaign_id"] for row in rows if row["held"] in ("huge", "failing")]:
            rows += await db.fetch(RECOUNT, [alone], "door")
        await tell([row for row in rows if row["held"] is None], causes)
        if any(row["held"] == "locked" for row in rows):
            raise NackMessage


async def tell(rows: list[asyncpg.Record], causes: dict[UUID, tuple[Event, int]]) -> None:
    """Publish the recounted campaigns, each to the partition its hint came from: both topics have the same key.

    A batch goes whole to one partition, and to any one if none is named, whatever the keys of its messages are.
    """
    batches: dict[int, list[KafkaPublishMessage]] = {}
    for row in rows:
        cause, partition = causes[row["campaign_id"]]
        stats, counts = orjson.Fragment(row["stats"]), orjson.Fragment(row["counts"])  # JSON as PostgreSQL made it
        campaign = {"id": row["campaign_id"], **{name: row[name] for name in TOLD}, "stats": stats}
        body = stats_updated({"campaign": campaign, "prospects_by_status": counts}, cause)
        key = str(row["campaign_id"]).encode()
        batches.setdefault(partition, []).append(KafkaPublishMessage(body, key=key))
    await asyncio.gather(*(publisher.publish(*messages, partition=number) for number, messages in batches.items()))


if __name__ == "__main__":
    asyncio.run(app.run())
