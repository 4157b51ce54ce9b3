"""The consumer a team would write first: one event at a time, its own recount, publish, commit, in order.

Reading with `async for` and committing `{partition: offset + 1}` by hand after the work is the at-least-once form of
aiokafka's documentation (https://aiokafka.readthedocs.io/en/stable/consumer.html, "Manual vs automatic committing");
`send_and_wait` is that of its page "Producer client". Lock, count, update, commit, then publish: as a request handler
for one campaign would do it. Tuned where that costs no line: one session, whose statements asyncpg keeps prepared, the
index that the count needs, one pass of pydantic over the bytes, no linger.

Settings from the environment: DATABASE_URL, KAFKA_BOOTSTRAP_SERVERS, INPUT_TOPIC, OUTPUT_TOPIC, GROUP_ID.
"""

import asyncio
import os
import signal
from datetime import UTC, datetime
from typing import Any, Literal
from uuid import UUID, uuid4

import asyncpg
import orjson
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from pydantic import BaseModel

ALWAYS = ("sent", "replied", "bounced")
WHEN_SOME = ("completed", "timed_out", "connection_sent", "connected", "message_sent")


class StatusChanged(BaseModel):
    """Data of the hint."""

    campaign_id: UUID
    prospect_id: UUID
    from_status: str | None = None
    to_status: str


class Event(BaseModel):
    """A CloudEvent in structured mode."""

    specversion: Literal["1.0"]
    id: str
    source: str
    type: Literal["prospect.status_changed.v1"]
    data: StatusChanged


async def recount(db: asyncpg.Connection, campaign_id: UUID) -> dict[str, Any] | None:
    """Count the campaign's prospects under its row lock and write `stats`; the campaign as an event tells it."""
    async with db.transaction():
        if await db.fetchrow("SELECT id FROM campaigns WHERE id = $1 FOR NO KEY UPDATE", campaign_id) is None:
            return None
        rows = await db.fetch(
            "SELECT status, count(*) AS prospects FROM campaign_prospects WHERE campaign_id = $1 GROUP BY status",
            campaign_id,
        )
        counts = {row["status"]: row["prospects"] for row in rows}
        stats = {"total": sum(counts.values()), **{key: counts.get(key, 0) for key in ALWAYS}}
        stats.update((key, counts[key]) for key in WHEN_SOME if key in counts)
        campaign = await db.fetchrow(
            "UPDATE campaigns SET stats = $2, last_synced_at = clock_timestamp() WHERE id = $1"
            " RETURNING id, user_id, type, name, status, last_synced_at",
            campaign_id,
            orjson.dumps(stats).decode(),
        )
    return {"campaign": {**dict(campaign or {}), "stats": stats}, "prospects_by_status": counts}


def stats_updated(data: dict[str, Any], cause: Event) -> bytes:
    """The event that tells the world."""
    return orjson.dumps(
        {
            "specversion": "1.0",
            "id": str(uuid4()),
            "source": "per-event-consumer",
            "type": "campaign.stats_updated.v1",
            "time": datetime.now(UTC),
            "subject": str(cause.data.campaign_id),
            "datacontenttype": "application/json",
            "causationid": cause.id,
            "data": data,
        },
        default=str,
    )


async def main() -> None:
    """Consume until SIGTERM; the event that is under way is finished."""
    stopping = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopping.set)
    servers = os.environ["KAFKA_BOOTSTRAP_SERVERS"]
    output = os.environ["OUTPUT_TOPIC"]
    db = await asyncpg.connect(os.environ["DATABASE_URL"])
    producer = AIOKafkaProducer(bootstrap_servers=servers, acks="all", enable_idempotence=True)
    consumer = AIOKafkaConsumer(
        os.environ["INPUT_TOPIC"],
        bootstrap_servers=servers,
        group_id=os.environ["GROUP_ID"],
        enable_auto_commit=False,
        auto_offset_reset="earliest",
    )
    await producer.start()
    await consumer.start()
    try:
        async for record in consumer:
            event = Event.model_validate_json(record.value)
            data = await recount(db, event.data.campaign_id)
            if data is not None:
                key = str(event.data.campaign_id).encode()
                await producer.send_and_wait(output, stats_updated(data, event), key=key)
            await consumer.commit({TopicPartition(record.topic, record.partition): record.offset + 1})
            if stopping.is_set():
                break
    finally:
        await consumer.stop()
        await producer.stop()
        await db.close()


if __name__ == "__main__":
    asyncio.run(main())
