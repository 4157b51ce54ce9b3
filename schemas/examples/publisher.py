"""A neighbour that publishes: changes prospects in its own transaction, and hints at it after its own commit.

`python -m schemas.examples.publisher [--binary] [STATUS PROSPECT...]`; without them lines "PROSPECT STATUS" on stdin.
"""

import asyncio
import json
import os
import sys
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

import asyncpg
from aiokafka import AIOKafkaProducer, errors

from schemas.events import STATUS_CHANGED, ProspectStatusChangedV1
from schemas.topics import Topics

TOPIC = Topics(os.environ.get("TOPIC_PREFIX", "")).of(STATUS_CHANGED)
BEFORE = "SELECT campaign_id::text, status FROM campaign_prospects WHERE id = $1 FOR NO KEY UPDATE"


async def change(db: asyncpg.Connection, prospect: str, status: str) -> dict[str, Any]:
    """Change a prospect and commit; the hint at it, made before the commit: what cannot be told is not done either."""
    async with db.transaction():
        if (row := await db.fetchrow(BEFORE, prospect)) is None:
            raise LookupError(f"there is no prospect {prospect}")
        await db.execute("SELECT update_prospect_with_stat($1, $2)", prospect, status)
        campaign_id, from_status = row  # the id in lower case, as PostgreSQL writes it: it is the key
        data = {"campaign_id": campaign_id, "prospect_id": prospect, "from_status": from_status, "to_status": status}
        event = {"specversion": "1.0", "id": str(uuid4()), "source": "/neighbour", "type": STATUS_CHANGED}
        event |= {"time": datetime.now(UTC).isoformat(), "subject": campaign_id}
        return {**event, "data": ProspectStatusChangedV1.model_validate(data).model_dump(exclude_unset=True)}


def encode(event: dict[str, Any], is_binary: bool) -> tuple[bytes, list[tuple[str, bytes]]]:
    """Value and headers. Structured: the event is the value. Binary: its data is, and each attribute a header."""
    if not is_binary:
        whole = {**event, "datacontenttype": "application/json"}
        return json.dumps(whole).encode(), [("content-type", b"application/cloudevents+json")]
    headers = [(f"ce_{name}", text.encode()) for name, text in event.items() if name != "data"]
    return json.dumps(event["data"]).encode(), [*headers, ("content-type", b"application/json")]


async def publish(producer: AIOKafkaProducer, event: dict[str, Any], is_binary: bool) -> AIOKafkaProducer:
    """Until it is acknowledged, by this producer or, if that is None or fails, a new one; the one to go on with."""
    value, headers = encode(event, is_binary)
    while True:
        try:
            if producer is None:
                servers, idempotent = os.environ["KAFKA_BOOTSTRAP_SERVERS"], os.environ.get("IDEMPOTENCE") != "false"
                producer = AIOKafkaProducer(bootstrap_servers=servers, acks="all", enable_idempotence=idempotent)
                await producer.start()
            await producer.send_and_wait(TOPIC, value, key=event["subject"].encode(), headers=headers)
            return producer
        except errors.KafkaError as error:  # it may be there all the same: with the same id it is the same event again
            print(f"hint {event['id']} is not acknowledged: {error!r}", file=sys.stderr)
            with suppress(TimeoutError, errors.KafkaError):
                await asyncio.wait_for(producer.stop(), 5)
            producer = None  # after a failed send its sequence may have a gap, which the broker would never take
            await asyncio.sleep(1)


async def main(is_binary: bool, words: list[str]) -> None:
    """One transaction and one hint for each prospect; after a bulk change one hint per campaign is enough."""
    lines = iter([f"{prospect} {words[0]}" for prospect in words[1:]] or sys.stdin)
    db, producer = await asyncpg.connect(os.environ["DATABASE_URL"]), None
    try:
        while line := await asyncio.to_thread(next, lines, ""):
            event = await change(db, *line.split())
            # A crash here loses the hint: the service's sweep finds the campaign within minutes. If that is too late,
            # write the hint into an outbox table in the same transaction, and publish from there.
            producer = await publish(producer, event, is_binary)
    finally:
        if producer is not None:
            await producer.stop()
        await db.close()


if __name__ == "__main__":
    asyncio.run(main("--binary" in sys.argv, [word for word in sys.argv[1:] if word != "--binary"]))
