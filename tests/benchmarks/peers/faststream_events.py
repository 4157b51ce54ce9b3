"""The consumer of per_event.py as FastStream's users write it: one decorated handler, called once per event.

Idiom: https://faststream.ag2.ai/latest/kafka/ack/ (NACK_ON_ERROR commits after success and reads again after a
failure), .../kafka/Subscriber/ ("Concurrent processing"), .../kafka/Publisher/ ("Decorating your publishing functions")
and .../getting-started/lifespan/context/ for the pool. How to count and what to publish is per_event.py's.

WORKERS above 1 makes as many members of the group in this process. That is all the concurrency FastStream has for
committing after success: events of one partition stay in order, so never more are at work than there are partitions.
(ACK_FIRST would run events of one campaign side by side and commit them before they are done.)

Settings from the environment: DATABASE_URL, KAFKA_BOOTSTRAP_SERVERS, INPUT_TOPIC, OUTPUT_TOPIC, GROUP_ID, WORKERS.
"""

import asyncio
import logging
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import asyncpg
from faststream import AckPolicy, ContextRepo, FastStream
from faststream.exceptions import AckMessage
from faststream.kafka import KafkaBroker, KafkaResponse
from per_event import Event, recount, stats_updated

WORKERS = int(os.environ["WORKERS"])


async def as_it_is(_: object) -> None:
    """In place of asyncpg's reset when a connection goes back: saves a round trip, and nobody changes the session."""


@asynccontextmanager
async def lifespan(context: ContextRepo) -> AsyncIterator[None]:
    """The pool, from before the broker starts until it has ended."""
    url = os.environ["DATABASE_URL"]
    async with asyncpg.create_pool(url, min_size=WORKERS, max_size=WORKERS, reset=as_it_is) as pool:
        context.set_global("pool", pool)
        yield


broker = KafkaBroker(
    os.environ["KAFKA_BOOTSTRAP_SERVERS"],
    acks="all",
    enable_idempotence=True,
    log_level=logging.DEBUG,  # the default, INFO, prints two lines per event
    graceful_timeout=2.0,  # for the running event; an idle worker is waited for that long too
)
app = FastStream(broker, lifespan=lifespan)


@broker.subscriber(
    os.environ["INPUT_TOPIC"],
    group_id=os.environ["GROUP_ID"],
    auto_offset_reset="earliest",
    ack_policy=AckPolicy.NACK_ON_ERROR,
    max_workers=WORKERS,
)
@broker.publisher(os.environ["OUTPUT_TOPIC"])
async def on_status_changed(event: Event) -> KafkaResponse:
    """Recount the event's campaign; what is returned is published, and only then is the offset committed."""
    pool = app.context.get("pool")  # as an argument (`Context()`) it costs four hops to another thread: 0.8x (measured)
    async with pool.acquire() as db:
        data = await recount(db, event.data.campaign_id)
    if data is None:
        raise AckMessage  # there is no such campaign: nothing to publish
    return KafkaResponse(stats_updated(data, event), key=str(event.data.campaign_id).encode())


if __name__ == "__main__":
    asyncio.run(app.run())
