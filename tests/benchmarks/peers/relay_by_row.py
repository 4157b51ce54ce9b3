"""A transactional outbox's polling publisher, row by row: lock one, publish it, delete it, commit.

The pattern is "Polling publisher" of "Transactional outbox" (https://microservices.io/patterns/data/polling-publisher.html);
`FOR UPDATE SKIP LOCKED` is what PostgreSQL's manual offers for tables used as queues by several consumers ("The Locking
Clause" of SELECT); `send_and_wait` is that of aiokafka's page "Producer client". The row goes in the transaction that
published it, so a crash repeats at most one. Tuned where that costs no line: one session, whose statements asyncpg
keeps prepared, no linger.

Settings from the environment: DATABASE_URL, KAFKA_BOOTSTRAP_SERVERS, OUTPUT_TOPIC.
"""

import asyncio
import os
import signal

import asyncpg
from aiokafka import AIOKafkaProducer

POLL_S = 0.1

OLDEST = "SELECT id, campaign_id, event FROM campaign_stats.outbox ORDER BY id LIMIT 1 FOR UPDATE SKIP LOCKED"
DELETE = "DELETE FROM campaign_stats.outbox WHERE id = $1"


async def publish_one(db: asyncpg.Connection, producer: AIOKafkaProducer, topic: str) -> bool:
    """Publish the oldest row that nobody else has; False when there is none."""
    async with db.transaction():
        row = await db.fetchrow(OLDEST)
        if row is None:
            return False
        await producer.send_and_wait(topic, row["event"], key=str(row["campaign_id"]).encode())
        await db.execute(DELETE, row["id"])
    return True


async def main() -> None:
    """Publish until SIGTERM; the row that is under way is finished."""
    stopping = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopping.set)
    topic = os.environ["OUTPUT_TOPIC"]
    db = await asyncpg.connect(os.environ["DATABASE_URL"])
    producer = AIOKafkaProducer(
        bootstrap_servers=os.environ["KAFKA_BOOTSTRAP_SERVERS"], acks="all", enable_idempotence=True
    )
    await producer.start()
    try:
        while not stopping.is_set():
            if not await publish_one(db, producer, topic):
                await asyncio.sleep(POLL_S)
    finally:
        await producer.stop()
        await db.close()


if __name__ == "__main__":
    asyncio.run(main())
