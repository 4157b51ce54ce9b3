"""The product beside the service: changes rows, and publishes only after its own commit, until it is acknowledged."""

import asyncio
import json
import random
from collections.abc import Mapping, Sequence
from typing import Any, Final
from uuid import UUID

import asyncpg
from aiokafka import AIOKafkaProducer
from aiokafka.errors import KafkaError

from schemas.topics import Topics
from tests.world import add_campaign, hint, sync_request

SEND_DEADLINE_S: Final = 10.0
PAUSE_S: Final = 0.2
AWAY: Final = (
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
    OSError,
    TimeoutError,
)


class Upstream:
    """Has sessions of its own and talks to the servers past every proxy.

    `requested`: (source, id) -> campaign of each sync request acknowledged; `garbage`: (topic, value) of what nobody
    can read; `records`: how many records were acknowledged at least once; `bouncing`: campaigns some of whose mail has
    bounced, the only ones that may be paused.
    """

    def __init__(self, database_url: str, bootstrap: str, topics: Topics, seed: int) -> None:
        self.requested: dict[tuple[str, str], UUID] = {}
        self.garbage: list[tuple[str, bytes]] = []
        self.records = 0
        self.bouncing: set[UUID] = set()
        self._database_url = database_url
        self._bootstrap = bootstrap
        self._topics = topics
        self._random = random.Random(seed)
        self._producer: Any = None
        self._db: asyncpg.Connection | None = None
        self._changing, self._publishing = asyncio.Lock(), asyncio.Lock()  # one session, one producer, several callers

    async def campaigns(self, count: int, prospects: Mapping[str, int], **fields: Any) -> list[UUID]:
        """New campaigns, each with these prospects."""
        db = await self._connected()  # beside whatever else is going on
        try:
            async with db.transaction():
                made = [await add_campaign(db, prospects, **fields) for _ in range(count)]
            if prospects.get("bounced"):
                self.bouncing.update(made)
            return made
        finally:
            await db.close()

    async def change(
        self, campaigns: Sequence[UUID], to_status: str, *, of: str = "pending", prospects: int = 1
    ) -> None:
        """Move prospects of each campaign, commit, then publish one hint for each campaign, the last word on it."""
        await self.change_quietly(campaigns, to_status, of=of, prospects=prospects)
        await self.publish(
            [
                (self._topics.of("prospect.status_changed.v1"), str(one), hint(one, data={"to_status": to_status}))
                for one in campaigns
            ]
        )

    async def change_quietly(
        self, campaigns: Sequence[UUID], to_status: str, *, of: str = "pending", prospects: int = 1
    ) -> None:
        """The same without a word; when the database is away, again until it is done once."""
        if to_status == "bounced":
            self.bouncing.update(campaigns)
        for campaign_id in campaigns:
            async with self._changing:
                await self._move(campaign_id, to_status, of, prospects)

    async def _move(self, campaign_id: UUID, to_status: str, of: str, prospects: int) -> None:
        wanted: list[UUID] | None = None
        while True:
            try:
                db = await self._session()
                if wanted is None:  # the same ones again, should the answer to the COMMIT be lost
                    wanted = [
                        row["id"]
                        for row in await db.fetch(
                            "SELECT id FROM campaign_prospects WHERE campaign_id = $1 AND status = $2 ORDER BY id"
                            " LIMIT $3",
                            campaign_id,
                            of,
                            prospects,
                        )
                    ]
                async with db.transaction():
                    for prospect in wanted:
                        await db.execute("SELECT update_prospect_with_stat($1, $2)", prospect, to_status)
                return
            except AWAY:
                self._end_session()
                await asyncio.sleep(PAUSE_S)

    async def request(self, campaigns: Sequence[UUID], **data: Any) -> None:
        """Ask for a recount of each."""
        asked = [(one, sync_request(one, data=data)) for one in campaigns]
        await self.publish([(self._topics.of("campaign.sync_requested.v1"), str(one), event) for one, event in asked])
        self.requested |= {(event["source"], event["id"]): one for one, event in asked}

    async def babble(self, count: int) -> None:
        """Records that nobody can read."""
        topic = self._topics.of("prospect.status_changed.v1")
        babble = [f"no JSON {self._random.getrandbits(64):x}".encode() for _ in range(count)]
        await self.publish([(topic, f"k{number}", value) for number, value in enumerate(babble)])
        self.garbage += [(topic, value) for value in babble]

    async def publish(self, records: Sequence[tuple[str, str, dict[str, Any] | bytes]]) -> None:
        """Send (topic, key, value) until each is acknowledged; some may so be there twice."""
        async with self._publishing:
            await self._publish(list(records))

    async def _publish(self, waiting: list[tuple[str, str, dict[str, Any] | bytes]]) -> None:
        while waiting:
            futures = []
            try:
                async with asyncio.timeout(SEND_DEADLINE_S):
                    producer = await self._ready()
                    for topic, key, value in waiting:
                        content = value if isinstance(value, bytes) else json.dumps(value).encode()
                        futures.append(await producer.send(topic, content, key=key.encode()))
                    await asyncio.wait(futures)
            except (KafkaError, TimeoutError, OSError):
                pass
            done = [future.done() and not future.cancelled() and future.exception() is None for future in futures]
            done += [False] * (len(waiting) - len(done))
            self.records += sum(done)
            waiting = [record for record, is_done in zip(waiting, done, strict=True) if not is_done]
            if waiting:
                await self._forget_producer()
                await asyncio.sleep(PAUSE_S)

    async def close(self) -> None:
        """End the session and the producer."""
        await self._forget_producer()
        self._end_session()

    def _end_session(self) -> None:
        if self._db is not None:
            self._db.terminate()
            self._db = None

    async def _session(self) -> asyncpg.Connection:
        if self._db is None or self._db.is_closed():
            self._db = await self._connected()
        return self._db

    async def _connected(self) -> asyncpg.Connection:
        db = await asyncpg.connect(self._database_url, timeout=5, command_timeout=30)
        try:
            await db.set_type_codec("jsonb", schema="pg_catalog", encoder=json.dumps, decoder=json.loads)
        except BaseException:
            db.terminate()
            raise
        return db

    async def _ready(self) -> Any:
        if self._producer is None:
            producer = AIOKafkaProducer(
                bootstrap_servers=self._bootstrap, acks="all", enable_idempotence=True, request_timeout_ms=8_000
            )
            try:
                await producer.start()
            except BaseException:
                await _closed(producer)
                raise
            self._producer = producer
        return self._producer

    async def _forget_producer(self) -> None:
        producer, self._producer = self._producer, None
        if producer is not None:
            await _closed(producer)


async def _closed(producer: Any) -> None:
    """Stop it; it may hang while brokers are away."""
    task = asyncio.ensure_future(producer.stop())
    await asyncio.wait([task], timeout=3)
    if not task.done():
        task.cancel()
        await asyncio.wait([asyncio.ensure_future(producer.client.close()), task], timeout=2)
    elif not task.cancelled():
        task.exception()
