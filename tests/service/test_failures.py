"""Plain failures of the servers around the service; what is hard under faults has its own tests later."""

import asyncio
import json
from collections.abc import Callable
from pathlib import Path

import asyncpg
import pytest

from consumer import broker, migrations
from consumer.demo.servers import Postgres
from schemas.topics import Topics
from tests.conftest import Bus, StartService, eventually
from tests.servers import ApacheKafka
from tests.world import REFERENCE, add_campaign, expected_stats, hint, stats_of


async def connect(url: str) -> asyncpg.Connection:
    connection = await asyncpg.connect(url)
    await connection.set_type_codec("jsonb", schema="pg_catalog", encoder=json.dumps, decoder=json.loads)
    return connection


async def test_without_its_database_it_stays_alive_and_ready_and_recovers_by_itself(
    service: StartService, environment: dict[str, str], bus: Bus, servers_directory: Path
) -> None:
    server = Postgres(servers_directory / "own", options={"fsync": "off"}, tcp=True)
    try:
        server.start()
        await migrations.migrate(server.url(), reference_schema=True)
        db = await connect(server.url())
        campaign_id = await add_campaign(db, REFERENCE)
        await db.close()
        environment["DATABASE_URL"] = server.url()
        running = await service()
        server.stop()
        await bus.publish(bus.topics.prefix + "prospect.status-changed", hint(campaign_id), key=str(campaign_id))

        async def degraded() -> bool:
            return await running.get("/readyz") == (200, '{"ready": true, "degraded": ["database"]}')

        await eventually(degraded, "the database is degraded", running)
        server.start()

        async def healthy() -> bool:
            return await running.get("/readyz") == (200, '{"ready": true, "degraded": []}')

        await eventually(healthy, "healthy again", running)
        db = await connect(server.url())
        await eventually(lambda: _is_true(db, campaign_id), "the hint was kept", running)
        await eventually(lambda: bus.events(bus.topics.prefix + "campaign.stats-updated"), "and told", running)
        assert await bus.read(bus.topics.prefix + "campaign-stats.dead-letters") == []
        assert await db.fetchval("SELECT count(*) FROM campaign_stats.deferred") == 0
        await db.close()
        running.terminate()
        assert await running.wait() == 0
    finally:
        server.stop()


async def _is_true(db: asyncpg.Connection, campaign_id: object) -> bool:
    return bool(await stats_of(db, campaign_id) == expected_stats(REFERENCE))  # type: ignore[arg-type]


@pytest.mark.apache_kafka
async def test_without_kafka_events_wait_in_the_outbox_and_follow_when_it_is_back(
    service: StartService, environment: dict[str, str], db: asyncpg.Connection, servers_directory: Path
) -> None:
    server = ApacheKafka(servers_directory / "own-kafka")
    try:
        server.start()
        names = Topics("own.")
        link = broker.Connection(server.bootstrap, {})
        await broker.create_topics(link, {name: {} for name in names.all}, partitions=1, replication=1)
        environment |= {"KAFKA_BOOTSTRAP_SERVERS": server.bootstrap, "CAMPAIGN_STATS_TOPIC_PREFIX": names.prefix}
        running = await service(sweep_interval_s=0.2)
        server.stop()
        campaign_id = await add_campaign(db, REFERENCE)  # the sweep finds it; its news cannot go out

        async def degraded() -> bool:
            status, body = await running.get("/readyz")
            return status == 200 and "relay" in json.loads(body)["degraded"]

        await eventually(degraded, "the relay is degraded", running, timeout_s=40)
        assert await stats_of(db, campaign_id) == expected_stats(REFERENCE)
        assert await db.fetchval("SELECT count(*) FROM campaign_stats.outbox") == 1
        server.start()
        own = Bus(server.bootstrap, names)
        [event] = await eventually(
            lambda: own.events(names.prefix + "campaign.stats-updated"), "the event follows", running, timeout_s=40
        )
        assert event["subject"] == str(campaign_id)

        async def healthy() -> bool:
            return await running.get("/readyz") == (200, '{"ready": true, "degraded": []}')

        await eventually(healthy, "healthy again", running, timeout_s=40)
        running.terminate()
        assert await running.wait() == 0
    finally:
        server.stop()


@pytest.mark.apache_kafka
@pytest.mark.kcat
async def test_bytes_the_client_cannot_hand_out_become_a_stub_and_the_rest_is_served(
    service: StartService, bus: Bus, db: asyncpg.Connection
) -> None:
    before, after = await add_campaign(db, {"sent": 1}), await add_campaign(db, {"sent": 2})
    topic = bus.topics.prefix + "prospect.status-changed"
    await bus.publish(topic, hint(before), partition=0)
    process = await asyncio.create_subprocess_exec(
        b"kcat", b"-P", b"-b", bus.bootstrap.encode(), b"-t", topic.encode(), b"-p", b"0", b"-H", b"\xff\xfe=x",
        stdin=asyncio.subprocess.PIPE,
    )  # fmt: skip
    await process.communicate(b"a header key that is not UTF-8")
    assert process.returncode == 0
    await bus.publish(topic, hint(after), partition=0)
    running = await service()
    out = bus.topics.prefix + "campaign.stats-updated"

    async def served() -> bool:
        return {event["subject"] for event in await bus.events(out)} == {str(before), str(after)}

    await eventually(served, "both neighbours are served", running)
    [stub] = await eventually(lambda: bus.read(bus.topics.prefix + "campaign-stats.dead-letters"), "a stub", running)
    headers = dict(stub.headers)
    assert headers["dead-letter-reason"] == b"unreadable"
    assert (headers["dead-letter-partition"], headers["dead-letter-offset"]) == (b"0", b"1")

    async def caught_up() -> bool:
        metrics = await running.metrics()
        return metrics[f'campaign_stats_lag_records{{partition="0",topic="{topic}"}}'] == 0

    await eventually(caught_up, "offsets went past it", running)


@pytest.mark.parametrize("end", [lambda one: one.terminate(), lambda one: one.kill()], ids=["SIGTERM", "SIGKILL"])
async def test_another_replica_goes_on_after_one_ends(
    service: StartService, bus: Bus, db: asyncpg.Connection, end: Callable[[object], None]
) -> None:
    campaigns = [await add_campaign(db, {"sent": number % 7}) for number in range(40)]
    first, second = await service(), await service()
    for number, campaign_id in enumerate(campaigns):
        await bus.publish(bus.topics.prefix + "prospect.status-changed", hint(campaign_id), key=str(campaign_id))
        if number == 20:
            end(first)
    out = bus.topics.prefix + "campaign.stats-updated"

    async def all_told() -> bool:
        return {event["subject"] for event in await bus.events(out)} == {str(one) for one in campaigns}

    await eventually(all_told, "the other one takes over", second, timeout_s=40)
    for number, campaign_id in enumerate(campaigns):
        assert await stats_of(db, campaign_id) == {"total": number % 7, "sent": number % 7, "replied": 0, "bounced": 0}
