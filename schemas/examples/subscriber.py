"""A neighbour that reacts once to each pause and follows numbers. `python -m schemas.examples.subscriber STATE.db`"""

import asyncio
import json
import os
import signal
import sqlite3
import sys
from contextlib import suppress
from itertools import chain

from aiokafka import AIOKafkaConsumer
from aiokafka.errors import CommitFailedError, IllegalStateError
from pydantic import BaseModel

from schemas.events import PAUSED, STATS_UPDATED, CampaignPausedV1, CampaignStatsUpdatedV1, Envelope
from schemas.topics import Topics

TOPICS = [Topics(os.environ.get("TOPIC_PREFIX", "")).of(kind) for kind in (PAUSED, STATS_UPDATED)]
TABLES = """CREATE TABLE IF NOT EXISTS pauses (id TEXT PRIMARY KEY);
CREATE TABLE IF NOT EXISTS campaigns (id TEXT PRIMARY KEY, version INTEGER NOT NULL, stats TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS reactions (line TEXT NOT NULL); -- in place of what you do, or of your list of what to do"""
HEARD = "INSERT INTO pauses VALUES (?) ON CONFLICT DO NOTHING"
NEWER = """INSERT INTO campaigns VALUES (?, ?, ?) ON CONFLICT (id) DO UPDATE
SET version = excluded.version, stats = excluded.stats WHERE excluded.version > campaigns.version"""


def react(db: sqlite3.Connection, value: bytes) -> list[str]:
    """Write what is new into the open transaction; the reaction to it. Raises ValueError: no event of the service."""
    kind = Envelope[BaseModel].model_validate_json(value).type  # the type decides, not the topic
    if kind == PAUSED:  # for whatever reason
        pause = Envelope[CampaignPausedV1].model_validate_json(value)
        if db.execute(HEARD, [pause.id]).rowcount:
            return [json.dumps({"reaction": "paused", "id": pause.id, "campaign_id": str(pause.data.campaign_id)})]
    if kind == STATS_UPDATED:
        news = Envelope[CampaignStatsUpdatedV1].model_validate_json(value).data
        known, stats = {"campaign_id": str(news.campaign.id), "version": news.version}, news.campaign.stats
        if db.execute(NEWER, [*known.values(), stats.model_dump_json(exclude_none=True)]).rowcount:
            return [json.dumps({"reaction": "stats", **known, "total": stats.total})]
    return []  # heard before, not newer, or of a type that a later release brings


async def main(path: str) -> None:
    """Until SIGTERM. SIGKILL harms as little: what was not committed to Kafka comes again, and the tables know it."""
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    db = sqlite3.connect(path)
    db.executescript(TABLES)
    async with AIOKafkaConsumer(  # leaves the group at the end, so that nobody waits for it
        *TOPICS,
        bootstrap_servers=os.environ["KAFKA_BOOTSTRAP_SERVERS"],
        group_id=os.environ.get("GROUP_ID", "neighbour"),  # all members of a group must share these tables
        enable_auto_commit=False,
        auto_offset_reset="earliest",  # an old pause late rather than one never: "latest" skips what came before
        fetch_max_wait_ms=100,
    ) as consumer:
        while not stop.is_set():
            batches, lines = await consumer.getmany(timeout_ms=500, max_records=500), []
            with db:  # that it was heard and what follows from it, in one transaction
                for record in chain.from_iterable(batches.values()):
                    try:
                        lines += react(db, record.value or b"")
                    except (ValueError, OverflowError) as error:  # nobody can read it: say so, and do not stop for it
                        problem = str(error).splitlines()[0]
                        print("no event:", record.topic, record.partition, record.offset, problem, file=sys.stderr)
                db.executemany("INSERT INTO reactions VALUES (?)", zip(lines, strict=True))
            print("".join(f"{line}\n" for line in lines), end="", flush=True)
            with suppress(CommitFailedError, IllegalStateError):  # partitions taken over: their next owner repeats
                await consumer.commit()  # after the transaction, never before


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
