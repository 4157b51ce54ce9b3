"""An upstream at a steady pace, in a process of its own, and a receiver of the news that follow.

`python -m tests.benchmarks.upstream` moves prospects and publishes a hint for each after the commit, until SIGTERM.
What is due is moved in one transaction every 20 ms and handed on as a batch (every 5 ms costs the two servers 0.17 ms
more CPU for each hint, of 1.3 in all, on a slow machine). The id of a hint tells which stream it belongs to, its number
there (dense, from 0) and when it was made: the monotonic clock after the commit and before it is handed to the client,
which is the same clock in all processes of one machine. The news carry that id on as `causationid`, so that the
receiver knows how long each took and which are missing.

Settings from the environment: DATABASE_URL, KAFKA_BOOTSTRAP_SERVERS, TOPIC, STREAMS.
"""

import asyncio
import json
import math
import os
import re
import signal
import sys
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Final, NamedTuple
from uuid import UUID, uuid4

import asyncpg
import orjson
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition

from schemas import events
from schemas.topics import Topics
from tests.benchmarks import workload
from tests.benchmarks.stage import END_DEADLINE_S, LOOK_S, Contestant, Failed, Stage

TICK_S: Final = 0.02
PROSPECTS_EACH: Final = 500  # of a campaign with a stream of its own; elsewhere one moves to and fro
LATE_AT_MOST: Final = 0.02  # of the hints that were due may be missing
PRODUCING_DEADLINE_S: Final = 30.0
SETTLED_S: Final = 0.5  # without an event, once everything is published
FETCH_WAIT_MS: Final = 20  # a partition not read for a moment drops out of the next fetch, which then waits so long
BEGUN: Final = re.compile(r"^begun$", re.MULTILINE)
ENDED: Final = re.compile(r"^ended (\{.*\})$", re.MULTILINE)

# Each to and fro between two statuses: its campaign's counts differ from those before, and contacts and bounces do not.
MOVE: Final = """
UPDATE campaign_prospects
   SET updated_at = clock_timestamp(),
       status = CASE status WHEN 'sent' THEN 'replied' WHEN 'replied' THEN 'sent'
                            WHEN 'connection_sent' THEN 'connected' ELSE 'connection_sent' END
 WHERE id = ANY ($1::uuid[])
"""
# $1 uuid[]: only these campaigns, or null: all but $2 uuid[]. $3 int: prospects of each.
CHOOSE: Final = """
SELECT c.id AS campaign, p.id AS prospect
  FROM campaigns c
 CROSS JOIN LATERAL (SELECT id FROM campaign_prospects
                      WHERE campaign_id = c.id AND status IN ('sent', 'connection_sent') LIMIT $3) AS p
 WHERE CASE WHEN $1::uuid[] IS NULL THEN c.id <> ALL ($2::uuid[]) ELSE c.id = ANY ($1::uuid[]) END
 ORDER BY c.id
"""


@dataclass(frozen=True, slots=True)
class Stream:
    """Hints at a steady pace: for one campaign, or for all in turn that have no stream of their own."""

    name: str
    per_second: float
    campaign: str | None = None


class Due(NamedTuple):
    """A prospect to be moved now, the hint's place in its stream."""

    stream: str
    number: int
    campaign: UUID
    prospect: UUID


class Pace:
    """What a stream has to do, by the clock."""

    def __init__(self, stream: Stream, prospects: Sequence[tuple[UUID, UUID]]) -> None:
        if not prospects:
            raise SystemExit(f"nobody can be moved for {stream}")
        self.stream = stream
        self.made = 0
        self._prospects = prospects

    def due(self, elapsed_s: float) -> list[Due]:
        """What should have been made by now and is not yet."""
        until = int(elapsed_s * self.stream.per_second)
        numbers = range(self.made, until)
        self.made = max(self.made, until)
        return [Due(self.stream.name, number, *self._prospects[number % len(self._prospects)]) for number in numbers]


async def main() -> None:
    """Produce until SIGTERM; at the end say how many there are of each stream, in how many seconds."""
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    streams = [Stream(**stream) for stream in json.loads(os.environ["STREAMS"])]
    producer = AIOKafkaProducer(bootstrap_servers=os.environ["KAFKA_BOOTSTRAP_SERVERS"], acks="all")
    db = await asyncpg.connect(os.environ["DATABASE_URL"])
    await producer.start()
    try:
        paces = [await _pace(db, stream, streams) for stream in streams]
        print("begun", flush=True)
        begun = time.monotonic()
        sent = await _produce(db, producer, os.environ["TOPIC"], paces, stop)
        seconds = time.monotonic() - begun
        await asyncio.gather(*sent)
        made = {pace.stream.name: pace.made for pace in paces}
        print(f"ended {json.dumps({'made': made, 'seconds': seconds})}", flush=True)
    finally:
        await producer.stop()
        await db.close()


async def _pace(db: asyncpg.Connection, stream: Stream, streams: Sequence[Stream]) -> Pace:
    apart = [UUID(other.campaign) for other in streams if other.campaign is not None]
    only = None if stream.campaign is None else [UUID(stream.campaign)]
    rows = await db.fetch(CHOOSE, only, apart, 1 if only is None else PROSPECTS_EACH)
    return Pace(stream, [(row["campaign"], row["prospect"]) for row in rows])


async def _produce(
    db: asyncpg.Connection, producer: Any, topic: str, paces: Sequence[Pace], stop: asyncio.Event
) -> list[Any]:
    """Tick after tick; returns what the client has yet to have acknowledged."""
    sent = []
    begun = time.monotonic()
    while not stop.is_set():
        tick = time.monotonic()
        if due := [one for pace in paces for one in pace.due(tick - begun)]:
            await db.execute(MOVE, [one.prospect for one in due])
            made_ns = time.monotonic_ns()
            for one in due:
                key = str(one.campaign)
                sent.append(await producer.send(topic, _hint(one, key, made_ns), key=key.encode()))
        await asyncio.sleep(max(0.0, TICK_S - (time.monotonic() - tick)))
    return sent


def _hint(due: Due, campaign: str, made_ns: int) -> bytes:
    return (
        f'{{"specversion":"1.0","id":"{due.stream}/{due.number}/{made_ns}","source":"/engine/sender",'
        f'"type":"{events.STATUS_CHANGED}","time":"2026-04-18T15:12:00.123456Z","subject":"{campaign}",'
        f'"datacontenttype":"application/json","correlationid":"run-{uuid4()}",'
        f'"data":{{"campaign_id":"{campaign}","prospect_id":"{due.prospect}","from_status":"sent",'
        '"to_status":"replied"}}'
    ).encode()


class Upstream(Contestant):
    """The process above, watched from outside."""

    def __init__(self, stage: Stage, name: str, topics: Topics, database: str, streams: Sequence[Stream]) -> None:
        self.streams = streams
        super().__init__(
            name,
            stage.directory / name,
            [sys.executable, "-m", "tests.benchmarks.upstream"],
            {
                "DATABASE_URL": stage.postgres.url(database),
                "KAFKA_BOOTSTRAP_SERVERS": stage.kafka.bootstrap,
                "TOPIC": topics.of(events.STATUS_CHANGED),
                "STREAMS": json.dumps([asdict(stream) for stream in streams]),
            },
        )

    async def begun(self) -> None:
        """Wait until it produces. Raises Failed."""
        deadline = time.monotonic() + PRODUCING_DEADLINE_S
        while time.monotonic() < deadline and not self.has_ended:
            if BEGUN.search(self.log.read_text("utf-8")):
                return
            await asyncio.sleep(LOOK_S)
        raise Failed(f"the upstream did not begin:\n{self.last_lines()}")

    async def end(self) -> tuple[dict[str, int], list[str]]:
        """End it: how many hints it made of each stream, and what is wrong with that. Raises Failed."""
        if self.process is not None:
            self.process.terminate()
        code = await self.ended(END_DEADLINE_S)
        said = ENDED.search(self.log.read_text("utf-8"))
        if code != 0 or said is None:
            raise Failed(f"the upstream ended with {code}:\n{self.last_lines()}")
        told = json.loads(said[1])
        made: dict[str, int] = told["made"]
        return made, [
            f"the upstream made {made[stream.name]} of {stream.name} in {told['seconds']:.1f} s, too few"
            for stream in self.streams
            if made[stream.name] < told["seconds"] * stream.per_second * (1 - LATE_AT_MOST)
        ]


class Answer(NamedTuple):
    """A hint and its news: when it was made and when they arrived, on the monotonic clock, in seconds."""

    made: float
    arrived: float

    @property
    def latency_s(self) -> float:
        """From one to the other."""
        return self.arrived - self.made


@dataclass(slots=True)
class Receiver:
    """What came on a topic of news, and when (monotonic ns). Events are read when it is over, not while it runs."""

    arrivals: list[tuple[int, bytes]] = field(default_factory=list)

    def moments(self) -> list[float]:
        """When something came, in seconds."""
        return [arrived / 1e9 for arrived, _ in self.arrivals]

    def answers(self) -> dict[str, dict[int, Answer]]:
        """Stream -> number of the hint -> the first news that name it as their cause."""
        found: dict[str, dict[int, Answer]] = {}
        for arrived, event in self.arrivals:
            stream, number, made = orjson.loads(event)["causationid"].split("/")
            found.setdefault(stream, {}).setdefault(int(number), Answer(int(made) / 1e9, arrived / 1e9))
        return found

    def news(self) -> workload.News:
        """As read from the topic."""
        news = workload.News(len(self.arrivals))
        for _, event in self.arrivals:
            data = orjson.loads(event)["data"]
            campaign = UUID(data["campaign"]["id"])
            if data["version"] >= news.latest.get(campaign, {}).get("version", 0):
                news.latest[campaign] = data
        return news

    async def settled(self) -> None:
        """Wait until nothing more comes; only when everything is published."""
        before = -1
        while len(self.arrivals) > before:
            before = len(self.arrivals)
            await asyncio.sleep(SETTLED_S)


@asynccontextmanager
async def receiving(bootstrap: str, topic: str) -> AsyncIterator[Receiver]:
    """Read a topic of news from its end on, as long as this is open."""
    consumer = AIOKafkaConsumer(bootstrap_servers=bootstrap, enable_auto_commit=False, fetch_max_wait_ms=FETCH_WAIT_MS)
    await consumer.start()
    receiver = Receiver()
    try:
        consumer.assign([TopicPartition(topic, number) for number in range(workload.PARTITIONS)])
        await consumer.seek_to_end()
        reading = asyncio.create_task(_receive(consumer, receiver))
        try:
            yield receiver
        finally:
            if reading.done():
                reading.result()
            reading.cancel()
            await asyncio.wait([reading])
    finally:
        await consumer.stop()


async def _receive(consumer: Any, receiver: Receiver) -> None:
    while True:
        found: Mapping[Any, Sequence[Any]] = await consumer.getmany(timeout_ms=1_000)
        arrived = time.monotonic_ns()
        receiver.arrivals += [(arrived, record.value) for records in found.values() for record in records]


def unanswered(made: Mapping[str, int], answers: Mapping[str, Mapping[int, Answer]], stream: str) -> list[str]:
    """What is wrong with the answers to a stream of which every hint is news; empty when nothing is."""
    missing = made[stream] - len(answers.get(stream, {}))
    return [f"{missing} of {made[stream]} hints of {stream} were not answered by news"] if missing else []


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that so many percent do not exceed; not a number without values."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)] if ordered else math.nan


if __name__ == "__main__":
    asyncio.run(main())
