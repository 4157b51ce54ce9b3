"""The relay on real servers while something is wrong with one topic, one row, the broker, or with nothing but the load.

Whatever happens: every row is acknowledged before it is deleted, nothing is set aside that fits, and whoever reads a
topic meets the first copies of a campaign's events in the order of the outbox.
"""

import asyncio
import gc
import sys
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from uuid import UUID

import asyncpg
import pytest
from prometheus_client import CollectorRegistry

from consumer import broker
from consumer.broker import Connection, Outgoing, Publisher
from consumer.database import Database
from consumer.envelope import CONTENT_TYPE
from consumer.health import Health
from consumer.metrics import Metrics
from consumer.outcome import OutboxRow
from consumer.relay import TURN_ROWS, Relay
from schemas.events import PAUSED, STATS_UPDATED
from schemas.topics import Topics
from tests.conftest import Bus, eventually
from tests.faults.edits import Edit, broken
from tests.faults.stage import SLACK
from tests.faults.strict import Strict
from tests.servers import ApacheKafka

pytestmark = pytest.mark.apache_kafka

SEND_DEADLINE_S = 10  # as the design says, with the second it takes to let go of a producer
IDLE_TIMEOUT_S = 20
FOLLOWS_S = 10 * SLACK  # after something was put right
CAMPAIGNS = [UUID(int=number << 64 | 1 << 63) for number in range(200)]


@dataclass
class Running:
    """A relay at work, as in a process of its own."""

    relay: Relay
    health: Health
    metrics: Metrics

    def published(self) -> float:
        """Events it was told were acknowledged."""
        samples = [sample for metric in self.metrics.published.collect() for sample in metric.samples]
        return sum(sample.value for sample in samples if sample.name.endswith("_total"))


@asynccontextmanager
async def relaying(database_url: str, topics: Topics, connection: Connection) -> AsyncIterator[Running]:
    """A relay with its own database sessions and producer; it must end by itself when told to, and hide no error."""
    told: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context))
    database, publisher, health = Database(database_url), Publisher(connection, idempotence=True), Health()
    metrics = Metrics(CollectorRegistry())

    async def publish(rows: Sequence[tuple[str, UUID, bytes]]) -> Sequence[broker.Sent]:
        return await publisher.publish(
            [Outgoing(topics.of(type_), str(key).encode(), event, CONTENT_TYPE) for type_, key, event in rows]
        )

    relay = Relay(database, publish, metrics, health)
    await database.open()
    task = asyncio.create_task(relay.run())
    try:
        yield Running(relay, health, metrics)
        health.stopping = True
        relay.wake()
        async with asyncio.timeout(15):
            await task
    finally:
        task.cancel()
        await asyncio.wait([task])
        await publisher.close(1)
        await database.close(1)
    assert told == []


@dataclass
class Outbox:
    """What was written to the outbox, by type and campaign, and what must have become of it."""

    db: asyncpg.Connection
    written: dict[str, dict[UUID, list[int]]] = field(default_factory=lambda: defaultdict(lambda: defaultdict(list)))
    count: int = 0

    async def fill(self, rows: int, type_: str = STATS_UPDATED, *, sizes: Mapping[int, int] | None = None) -> None:
        """Events of all campaigns in turn, about 600 bytes each; `sizes`: place -> another size."""

        def records() -> Iterator[tuple[int, UUID, str, bytes]]:
            for place in range(rows):
                campaign = CAMPAIGNS[place % len(CAMPAIGNS)]
                event = b"%d %s" % (self.count, b"x" * (sizes or {}).get(place, 600))
                row = OutboxRow(campaign, type_, event)
                self.written[type_][campaign].append(self.count)
                self.count += 1
                yield row.shard, row.campaign_id, row.type, row.event

        await self.db.copy_records_to_table(
            "outbox", schema_name="campaign_stats", records=records(), columns=["shard", "campaign_id", "type", "event"]
        )

    async def waiting(self, type_: str | None = None) -> int:
        """Rows not yet published."""
        query = (
            "SELECT count(*) FROM campaign_stats.outbox WHERE set_aside_at IS NULL AND ($1::text IS NULL OR type = $1)"
        )
        count: int = await self.db.fetchval(query, type_)
        return count

    async def drained(self, type_: str | None = None, *, within_s: float) -> float:
        """Wait until nothing of it waits; the seconds that took."""
        begun = time.monotonic()

        async def is_empty() -> bool:
            return await self.waiting(type_) == 0

        await eventually(is_empty, f"published: {type_ or 'everything'}", timeout_s=within_s)
        return time.monotonic() - begun

    async def set_aside(self) -> int:
        """Rows given up."""
        count: int = await self.db.fetchval("SELECT count(*) FROM campaign_stats.outbox WHERE set_aside_at IS NOT NULL")
        return count

    async def assert_published_in_order(self, bus: Bus, type_: str = STATS_UPDATED, without: Sequence[int] = ()) -> int:
        """First copies in the topic are exactly what was written, in order per campaign; how many records are there."""
        records = await bus.read(bus.topics.of(type_))
        found: dict[UUID, dict[int, None]] = defaultdict(dict)
        for record in records:
            found[UUID(record.key.decode())].setdefault(int(record.value[:12].split()[0]))
        for campaign, numbers in self.written[type_].items():
            in_order = list(found[campaign]) == [number for number in numbers if number not in without]
            assert in_order, f"lost or out of order: {campaign}"
        assert found.keys() == self.written[type_].keys()
        return len(records)


@pytest.fixture(scope="module")
def kafka(strict: Strict) -> ApacheKafka:
    """Whoever uses its plain listener may do everything."""
    return strict.kafka


@pytest.fixture
def outbox(db: asyncpg.Connection) -> Outbox:
    """The outbox of this test's database."""
    return Outbox(db)


async def remade(bus: Bus, type_: str, config: Mapping[str, str] | None = None) -> None:
    """Make the topic of this type anew: deleting takes a moment."""
    link, topic = Connection(bus.bootstrap, {}), bus.topics.of(type_)

    async def created() -> bool:
        return bool(await broker.create_topics(link, {topic: dict(config or {})}, partitions=3, replication=1))

    await eventually(created, f"there is a topic {topic}")


@pytest.mark.parametrize("is_running", [False, True], ids=["from the start", "while running"])
async def test_rows_of_a_missing_topic_let_those_of_others_pass_and_follow_when_it_is_back(
    database_url: str, bus: Bus, outbox: Outbox, is_running: bool
) -> None:
    """An output topic missing with thousands of rows in front: the others pass, all follows when it is back."""
    link = Connection(bus.bootstrap, {})
    async with AsyncExitStack() as stack:
        if is_running:
            running = await stack.enter_async_context(relaying(database_url, bus.topics, link))
            await outbox.fill(100, PAUSED)
            await outbox.drained(within_s=10 * SLACK)
            outbox.written.pop(PAUSED)  # they go with their topic
        await broker.delete_topics(link, [bus.topics.of(PAUSED)])
        await outbox.fill(10 * TURN_ROWS, PAUSED)
        await outbox.fill(1_000)
        if not is_running:
            running = await stack.enter_async_context(relaying(database_url, bus.topics, link))
        await outbox.drained(STATS_UPDATED, within_s=FOLLOWS_S)
        assert running.health.degraded == ["relay"]
        await outbox.fill(1_000)
        running.relay.wake()
        assert await outbox.drained(STATS_UPDATED, within_s=FOLLOWS_S) < 3 * SLACK, (
            "a held type costs the others nothing"
        )
        assert await outbox.waiting(PAUSED) == 10 * TURN_ROWS
        assert running.health.degraded == ["relay"]

        await remade(bus, PAUSED)
        await eventually(lambda: running.health.degraded == [], "it recovered by itself", timeout_s=FOLLOWS_S)
        await outbox.drained(within_s=FOLLOWS_S)
        assert running.health.degraded == []
    assert await outbox.set_aside() == 0
    await outbox.assert_published_in_order(bus)
    await outbox.assert_published_in_order(bus, PAUSED)


async def test_one_row_that_is_too_large_is_set_aside_and_thousands_behind_it_go_out_in_batches(
    database_url: str, bus: Bus, outbox: Outbox
) -> None:
    """One row among 5 000 that the topic refuses: set aside alone, the others go out in batches."""
    link, topic = Connection(bus.bootstrap, {}), bus.topics.of(STATS_UPDATED)
    await broker.delete_topics(link, [topic])
    await remade(bus, STATS_UPDATED, {"max.message.bytes": "20000"})
    await outbox.fill(5_000, sizes={1_234: 40_000})
    async with relaying(database_url, bus.topics, link) as running:
        await outbox.drained(within_s=8 * SLACK)
        assert running.health.degraded == []
    assert await outbox.set_aside() == 1
    assert await outbox.assert_published_in_order(bus, without=[1_234]) == 4_999, "nothing went out twice"


@pytest.mark.faults
@pytest.mark.parametrize("relays", [1, 5])
async def test_a_large_backlog_is_drained_in_order_and_in_little_memory(
    database_url: str, bus: Bus, outbox: Outbox, relays: int
) -> None:
    """A backlog of 100 000 rows after an outage, drained by one relay and by five at once."""
    await outbox.fill(100_000)
    gc.collect()
    before = most = sys.getallocatedblocks()
    begun = time.monotonic()
    async with AsyncExitStack() as stack:
        running = [
            await stack.enter_async_context(relaying(database_url, bus.topics, Connection(bus.bootstrap, {})))
            for _ in range(relays)
        ]

        async def is_empty() -> bool:
            nonlocal most
            most = max(most, sys.getallocatedblocks())
            return await outbox.waiting() == 0

        await eventually(is_empty, "the backlog is published", timeout_s=60)
        seconds = time.monotonic() - begun
    assert sum(one.published() for one in running) == 100_000
    print(f"{relays} relays: {100_000 / seconds:,.0f} rows/s, {most - before:,} more objects at most")
    assert most - before < 200_000, "what is in memory is a turn, not the backlog"
    assert await outbox.set_aside() == 0
    await outbox.assert_published_in_order(bus)


class Proxy:
    """Passes bytes between clients and the broker; while it stalls it accepts connections and keeps the bytes."""

    def __init__(self, port: int, target: int) -> None:
        self._port = port
        self.passing = asyncio.Event()
        self.passing.set()
        self._target = target
        self._tasks = set[asyncio.Task[None]]()

    @asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        """Listen as long as the context lasts."""
        server = await asyncio.start_server(self._connected, "127.0.0.1", self._port)
        try:
            yield
        finally:
            server.close()
            for task in self._tasks:
                task.cancel()
            if self._tasks:
                await asyncio.wait(self._tasks)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", self._target)
        for source, sink in ((reader, back), (there, writer)):
            task = asyncio.create_task(self._pass(source, sink))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _pass(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        try:
            with suppress(OSError):
                while content := await source.read(2**16):
                    await self.passing.wait()
                    sink.write(content)
                    await sink.drain()
        finally:
            sink.close()


@pytest.mark.faults
async def test_a_broker_that_accepts_and_never_answers_keeps_rows_and_gives_the_shards_back_in_time(
    database_url: str, strict: Strict, bus: Bus, outbox: Outbox, db: asyncpg.Connection
) -> None:
    """A sender that stalls: the turn ends in time, the shards are free, all follows in order."""
    proxy = Proxy(strict.proxy_port, strict.kafka.ports["PROXIED"])
    link = Connection(f"127.0.0.1:{strict.proxy_port}", {})
    async with proxy.open(), relaying(database_url, bus.topics, link) as running:
        await outbox.fill(1_000)
        running.relay.wake()
        await outbox.drained(within_s=10 * SLACK)
        proxy.passing.clear()
        await outbox.fill(3_000)
        running.relay.wake()

        async def is_sending() -> bool:
            return not await db.fetch("SELECT shard FROM campaign_stats.outbox_shards FOR UPDATE SKIP LOCKED")

        await eventually(is_sending, "the relay holds the shards")
        begun = time.monotonic()
        await db.execute(f"SET lock_timeout = '{IDLE_TIMEOUT_S}s'")
        await db.execute("SELECT FROM campaign_stats.outbox_shards FOR UPDATE")  # as another relay that waits
        held_s = time.monotonic() - begun
        assert held_s < SEND_DEADLINE_S + 2, f"the shards were held for {held_s:.0f} s"
        assert await outbox.waiting() == 3_000
        await eventually(lambda: running.health.degraded == ["relay"], "the relay is degraded")
        proxy.passing.set()
        assert await outbox.drained(within_s=FOLLOWS_S + SEND_DEADLINE_S) < FOLLOWS_S
        await eventually(lambda: running.health.degraded == [], "it recovered")
    assert await outbox.set_aside() == 0
    await outbox.assert_published_in_order(bus)


async def test_a_right_that_is_taken_away_holds_up_its_topic_only_and_all_follows_when_it_is_back(
    database_url: str, strict: Strict, bus: Bus, outbox: Outbox
) -> None:
    """The right to write one topic lost and regained: only its events wait."""
    topics, service = bus.topics, ("--allow-principal", "User:service")
    await strict.acl(
        "--add", *service, "--operation", "Write", "--operation", "Describe",
        "--topic", topics.prefix, "--resource-pattern-type", "prefixed",
    )  # fmt: skip
    denied = ("--deny-principal", "User:service", "--operation", "Write", "--topic", topics.of(PAUSED))
    async with relaying(database_url, topics, strict.as_user()) as running:
        await outbox.fill(100, PAUSED)
        await outbox.fill(100)
        await outbox.drained(within_s=10 * SLACK)
        await strict.acl("--add", *denied)
        await outbox.fill(2 * TURN_ROWS, PAUSED)
        await outbox.fill(1_000)
        await outbox.drained(STATS_UPDATED, within_s=FOLLOWS_S)
        assert running.health.degraded == ["relay"]
        assert await outbox.waiting(PAUSED) == 2 * TURN_ROWS

        await strict.acl("--remove", *denied)
        await outbox.drained(within_s=FOLLOWS_S)
        await eventually(lambda: running.health.degraded == [], "it recovered by itself")
    assert await outbox.set_aside() == 0
    await outbox.assert_published_in_order(bus)
    await outbox.assert_published_in_order(bus, PAUSED)


A_MISSING_TOPIC_IS_A_FAILURE = Edit("consumer.relay:Relay._pass", "if sent.closed or row.type == probe:", "if False:")
A_LOST_RIGHT_IS_A_FAILURE = Edit(
    "consumer.broker.publisher:Publisher._failed", "isinstance(error, TopicAuthorizationFailedError)", "False"
)
NO_HALVES = Edit("consumer.broker.publisher:Publisher._attempt", "if len(batch.places) > 1:", "if False:")
NO_ELDER_FIRST = Edit("consumer.broker.publisher:_Requests._tracked", "self._broken & batches.keys()", "()")
NO_DEADLINE = Edit("consumer.broker.publisher:Publisher.publish", "+ SEND_DEADLINE_S", "+ 60")
NO_SHARD_LOCK = Edit("relay_lock.sql", "FOR UPDATE OF s SKIP LOCKED", "")


@pytest.mark.faults
@pytest.mark.parametrize(
    ("edit", "test", "due"),
    [
        (A_MISSING_TOPIC_IS_A_FAILURE, "missing", "published: campaign.stats_updated"),
        (NO_HALVES, "too large", "== 1"),
        (NO_ELDER_FIRST, "too large", "out of order"),
        (NO_DEADLINE, "stalls", "lock timeout|were held for"),
        (A_LOST_RIGHT_IS_A_FAILURE, "right lost", "published: campaign.stats_updated"),
        (NO_SHARD_LOCK, "five at once", "== 100000"),
    ],
    ids=[
        "a missing topic is a failure", "no halves", "no elder first", "no deadline", "a lost right is a failure",
        "no shard lock",
    ],
)  # fmt: skip
async def test_the_same_troubles_find_a_relay_that_is_broken(
    edit: Edit,
    test: str,
    due: str,
    database_url: str,
    strict: Strict,
    bus: Bus,
    outbox: Outbox,
    db: asyncpg.Connection,
) -> None:
    """Breakage found by the relay's troubles"""
    troubles = {
        "missing": partial(
            test_rows_of_a_missing_topic_let_those_of_others_pass_and_follow_when_it_is_back,
            database_url, bus, outbox, is_running=False,
        ),
        "too large": partial(
            test_one_row_that_is_too_large_is_set_aside_and_thousands_behind_it_go_out_in_batches,
            database_url, bus, outbox,
        ),
        "stalls": partial(
            test_a_broker_that_accepts_and_never_answers_keeps_rows_and_gives_the_shards_back_in_time,
            database_url, strict, bus, outbox, db,
        ),
        "right lost": partial(
            test_a_right_that_is_taken_away_holds_up_its_topic_only_and_all_follows_when_it_is_back,
            database_url, strict, bus, outbox,
        ),
        "five at once": partial(
            test_a_large_backlog_is_drained_in_order_and_in_little_memory, database_url, bus, outbox, relays=5
        ),
    }  # fmt: skip
    with broken([edit]), pytest.raises((AssertionError, asyncpg.PostgresError), match=due):
        await troubles[test]()
