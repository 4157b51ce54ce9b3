"""Plain failures of the servers around the service; what is hard under faults has its own tests later."""

import asyncio
import hashlib
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from urllib.request import Request, urlopen
from uuid import uuid4

import asyncpg
import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, ConsumerRebalanceListener, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, RecordsToDelete
from aiokafka.coordinator.assignors.roundrobin import RoundRobinPartitionAssignor

from consumer import broker, migrations
from consumer.demo.servers import Postgres, Server
from schemas.topics import Topics
from tests.conftest import Bus, StartService, command, eventually
from tests.servers import ApacheKafka
from tests.world import REFERENCE, add_campaign, expected_stats, hint, stats_of, sync_request


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
            return await running.get("/readyz") == (200, '{"ready":true,"degraded":["database"]}')

        await eventually(degraded, "the database is degraded", running)
        server.start()

        async def healthy() -> bool:
            return await running.get("/readyz") == (200, '{"ready":true,"degraded":[]}')

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
        tokens = {hashlib.sha256(b"token").hexdigest(): "*"}
        running = await service(sweep_interval_s=0.2, api_port=0, api_tokens=json.dumps(tokens))
        server.stop()
        campaign_id = await add_campaign(db, REFERENCE)  # the sweep finds it; its news cannot go out

        async def degraded() -> bool:
            status, body = await running.get("/readyz")
            return status == 200 and "relay" in json.loads(body)["degraded"]

        await eventually(degraded, "the relay is degraded", running, timeout_s=40)

        async def kafka_is_degraded() -> bool:
            _, body = await running.get("/readyz")
            return "kafka" in json.loads(body)["degraded"]

        await eventually(kafka_is_degraded, "so is Kafka", running)
        assert await stats_of(db, campaign_id) == expected_stats(REFERENCE)
        await db.execute("UPDATE campaign_prospects SET status = 'replied' WHERE campaign_id = $1", campaign_id)
        assert await _call(running.api_port, campaign_id) == {"total": 120, "sent": 0, "replied": 120, "bounced": 0}
        assert await db.fetchval("SELECT count(*) FROM campaign_stats.outbox") == 2
        server.start()
        own = Bus(server.bootstrap, names)

        async def follow() -> list[str]:
            found = await own.events(names.prefix + "campaign.stats-updated")
            return [event["data"]["trigger"] for event in found if event["subject"] == str(campaign_id)]

        async def both() -> bool:
            return await follow() == ["reconciliation", "sync_requested"]

        await eventually(both, "the events follow", running, timeout_s=40)

        async def healthy() -> bool:
            return await running.get("/readyz") == (200, '{"ready":true,"degraded":[]}')

        await eventually(healthy, "healthy again", running, timeout_s=40)
        assert len([line for line in running.logs if line.get("logger", "").startswith("aiokafka")]) < 60
        running.terminate()
        assert await running.wait() == 0
    finally:
        server.stop()


async def _call(port: int, campaign_id: object) -> object:
    """The stats that a sync-stats call answers."""
    request = Request(
        f"http://127.0.0.1:{port}/api/campaigns/{campaign_id}/sync-stats",
        method="POST",
        headers={"Authorization": "Bearer token"},
    )

    def fetch() -> object:
        with urlopen(request, timeout=10) as response:
            return json.load(response)["campaign"]["stats"]

    return await asyncio.to_thread(fetch)


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


@pytest.mark.apache_kafka
async def test_what_was_left_is_published_before_the_group_lets_a_successor_in(
    service: StartService, environment: dict[str, str], bus: Bus, db: asyncpg.Connection
) -> None:
    released = asyncio.Event()

    class Stubborn(ConsumerRebalanceListener):  # type: ignore[misc]  # has no types
        async def on_partitions_revoked(self, revoked: object) -> None:
            if revoked:
                await released.wait()

        async def on_partitions_assigned(self, assigned: object) -> None:
            """Nothing is read."""

    member = AIOKafkaConsumer(
        bootstrap_servers=environment["KAFKA_BOOTSTRAP_SERVERS"],
        group_id="held-up",
        heartbeat_interval_ms=500,
        partition_assignment_strategy=[RoundRobinPartitionAssignor],
        rebalance_timeout_ms=60_000,
    )
    member.subscribe(topics=list(bus.topics.read), listener=Stubborn())
    await member.start()
    try:
        await db.execute(
            "INSERT INTO campaign_stats.outbox (shard, campaign_id, type, event) VALUES (0, $1, $2, $3)",
            uuid4(), "campaign.stats_updated.v1", b'{"left": true}',
        )  # fmt: skip
        running = await service(ready=False, group_id="held-up")
        out = bus.topics.prefix + "campaign.stats-updated"
        await eventually(lambda: bus.events(out), "what was left is published", running)
        assert (await running.get("/readyz"))[0] == 503
        released.set()
        await running.ready()
    finally:
        released.set()
        await member.stop()


async def test_a_table_locked_for_longer_than_our_patience_costs_nothing_but_time(
    service: StartService, bus: Bus, db: asyncpg.Connection, database_url: str
) -> None:
    campaign_id = await add_campaign(db, REFERENCE)
    running = await service(sweep_interval_s=0.2)
    other = await asyncpg.connect(database_url)
    async with other.transaction():
        await other.execute("LOCK TABLE campaigns IN ACCESS EXCLUSIVE MODE")
        await bus.publish(bus.topics.prefix + "prospect.status-changed", hint(campaign_id), key=str(campaign_id))
        await asyncio.sleep(5)  # lock_timeout is 2 s
        assert running.process.returncode is None
    async with other.transaction():
        await other.execute("LOCK TABLE campaign_stats.outbox IN SHARE MODE")
        await asyncio.sleep(3)
        assert running.process.returncode is None
    await other.close()
    await eventually(lambda: _is_true(db, campaign_id), "recounted", running)
    await eventually(lambda: bus.events(bus.topics.prefix + "campaign.stats-updated"), "and told", running)
    assert await db.fetchval("SELECT coalesce(max(failures), 0) FROM campaign_stats.campaign_state") == 0


@pytest.mark.apache_kafka
async def test_offsets_follow_positions_past_transaction_markers_and_what_retention_took(
    service: StartService, bus: Bus, db: asyncpg.Connection
) -> None:
    campaign_id = await add_campaign(db, REFERENCE)
    topic = bus.topics.prefix + "prospect.status-changed"
    producer = AIOKafkaProducer(bootstrap_servers=bus.bootstrap, transactional_id=topic)
    await producer.start()
    async with producer.transaction():
        await producer.send_and_wait(topic, json.dumps(hint(campaign_id)).encode(), partition=0)
    await producer.stop()
    for _ in range(3):
        await bus.publish(topic, hint(campaign_id), partition=1)
    admin = AIOKafkaAdminClient(bootstrap_servers=bus.bootstrap)
    await admin.start()
    await admin.delete_records({TopicPartition(topic, 1): RecordsToDelete(before_offset=3)})
    await admin.close()
    running = await service("--until-caught-up", ready=False)
    assert await running.wait(30) == 0
    assert await stats_of(db, campaign_id) == expected_stats(REFERENCE)
    running = await service()

    async def no_lag() -> bool:
        metrics = await running.metrics()
        lags = [value for name, value in metrics.items() if name.startswith("campaign_stats_lag_records")]
        return len(lags) == 6 and not any(lags)

    await eventually(no_lag, "no lag is left that nobody can work off", running)


@pytest.mark.apache_kafka
async def test_a_missing_output_topic_holds_up_only_its_own_events(
    service: StartService, bus: Bus, db: asyncpg.Connection
) -> None:
    running = await service()
    await broker.delete_topics(broker.Connection(bus.bootstrap, {}), [bus.topics.prefix + "campaign.sync-rejected"])
    await bus.publish(bus.topics.prefix + "campaign.sync-requested", sync_request(uuid4()))
    bouncing = await add_campaign(db, {"sent": 95, "bounced": 5})
    await eventually(
        lambda: db.fetchval("SELECT count(*) = 1 FROM campaign_stats.outbox"), "a rejection waits", running
    )
    for campaign_id in [bouncing, *[await add_campaign(db, {"sent": 1}) for _ in range(20)]]:
        await bus.publish(bus.topics.prefix + "prospect.status-changed", hint(campaign_id), key=str(campaign_id))

    async def told() -> bool:
        return len(await bus.events(bus.topics.prefix + "campaign.stats-updated")) == 21

    await eventually(told, "all other events go out", running, timeout_s=30)
    assert len(await bus.events(bus.topics.prefix + "campaign.paused")) == 1
    assert await db.fetchval("SELECT array_agg(type) FROM campaign_stats.outbox") == ["campaign.sync_rejected.v1"]


async def test_a_shutdown_that_overruns_its_deadline_ends_with_3_and_loses_nothing(
    service: StartService, bus: Bus, db: asyncpg.Connection
) -> None:
    campaign_id = await add_campaign(db, REFERENCE)
    await db.execute(
        """CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN PERFORM pg_sleep(6); RETURN NEW; END $$;
           CREATE TRIGGER slow BEFORE UPDATE ON campaigns FOR EACH ROW EXECUTE FUNCTION slow()"""
    )
    running = await service(shutdown_deadline_s=0.5)
    await bus.publish(bus.topics.prefix + "prospect.status-changed", hint(campaign_id), key=str(campaign_id))
    sleeping = "SELECT count(*) > 0 FROM pg_stat_activity WHERE wait_event = 'PgSleep'"
    await eventually(lambda: db.fetchval(sleeping), "the recount is under way", running)
    running.expected_exit = 3
    running.terminate()
    assert await running.wait(10) == 3
    assert running.messages("stopped")[0]["undone"] == ["running chunk"]
    await db.execute("DROP TRIGGER slow ON campaigns")
    await service()  # the next owner repeats it
    await eventually(lambda: _is_true(db, campaign_id), "recounted by the next owner")


async def test_a_stop_finishes_the_running_recount_and_commits_its_offset(
    service: StartService, bus: Bus, db: asyncpg.Connection
) -> None:
    campaign_id, topic = await add_campaign(db, REFERENCE), bus.topics.prefix + "prospect.status-changed"
    await db.execute(
        """CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN PERFORM pg_sleep(1); RETURN NEW; END $$;
           CREATE TRIGGER slow BEFORE UPDATE ON campaigns FOR EACH ROW EXECUTE FUNCTION slow()"""
    )
    running = await service()
    await bus.publish(topic, hint(campaign_id), key=str(campaign_id), partition=0)
    sleeping = "SELECT count(*) > 0 FROM pg_stat_activity WHERE wait_event = 'PgSleep'"
    await eventually(lambda: db.fetchval(sleeping), "the recount is under way", running)
    running.terminate()
    assert await running.wait() == 0
    assert await _is_true(db, campaign_id)
    group = f"{bus.topics.prefix}campaign-stats"
    async with broker.Group(broker.Connection(bus.bootstrap, {}), group, [topic]) as left:
        assert (await left.committed())[(topic, 0)] == 1


async def test_run_lists_missing_columns_rights_and_topics_at_once(
    environment: dict[str, str], db: asyncpg.Connection, database_url: str
) -> None:
    name = f"r{uuid4().hex[:8]}"
    await db.execute(
        f"""ALTER TABLE campaigns DROP COLUMN pause_reason; CREATE ROLE {name} LOGIN;
            GRANT USAGE ON SCHEMA campaign_stats TO {name}; GRANT SELECT ON campaign_prospects TO {name}"""
    )
    try:
        poor = {
            **environment,
            "DATABASE_URL": database_url.replace("postgres@", f"{name}@"),
            "CAMPAIGN_STATS_CDC_TOPIC": "nowhere",
        }
        code, _, error = await command(poor, "run")
    finally:
        await db.execute(f"DROP OWNED BY {name}; DROP ROLE {name}")
    assert code == 2
    for sentence in ("lacks pause_reason", "may not SELECT", "may not INSERT campaign_stats.outbox", "unset CAMPAIGN"):
        assert sentence in error


async def test_wrong_addresses_and_an_empty_database_are_told_with_exit_code_2(
    environment: dict[str, str], database_url: str
) -> None:
    secret = {**environment, "DATABASE_URL": "postgresql://svc:s3cr3t/pw@h/db", "KAFKA_BOOTSTRAP_SERVERS": "h:abc"}
    for arguments in (["run"], ["migrate"], ["why", str(uuid4())]):
        code, out, error = await command(secret, *arguments)
        assert code == 2
        assert "s3cr3t" not in out + error
        assert "DATABASE_URL: is no URL" in error
    assert "KAFKA_BOOTSTRAP_SERVERS: must be host:port" in (await command(secret, "run"))[2]
    empty = database_url.replace(database_url.split("@/")[1].split("?")[0], "postgres")
    bare = {**environment, "DATABASE_URL": empty, "CAMPAIGN_STATS_TOPIC_PREFIX": "nowhere."}
    code, _, error = await command(bare, "run")
    assert code == 2
    assert (error.count("table public."), error.count("topic nowhere.")) == (4, 6)
    for arguments in (["drift"], ["why", str(uuid4())], ["reconcile", "--all"]):
        code, _, error = await command(bare, *arguments)
        assert (code, error.count("table public.")) == (2, 4)
    for arguments in (["tail"], ["sync", str(uuid4())], ["sync", str(uuid4()), "--wait"]):
        code, _, error = await command(bare, *arguments)
        assert code == 2
        assert "is missing: run `campaign-stats topics --create`" in error
    missing = {**environment, "DATABASE_URL": empty.replace("/postgres?", "/no_such_database?")}
    assert (await command(missing, "migrate"))[0] == 2


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("unused", "is no URL"),
        ("postgresql://u@127.0.0.1:1/db?sslmode=verify-full&sslrootcert=/no/such.pem", "sslrootcert names no file"),
        ("postgresql://u@127.0.0.1:1/db?sslmode=verify-full", 'root.crt" does not exist'),
        ("postgresql://u@127.0.0.1:1/db?sslmode=verify-ca&sslrootcert=/etc/passwd", "TLS fails"),
        ("postgresql://u@127.0.0.1:1/db?ssl_min_protocol_version=7", "No such TLS version"),
        ("postgresql://u:12#3@127.0.0.1/db", "is no URL"),
        ("{url}&connect_timeout=5", '"connect_timeout"; the driver knows no such option'),
        ("{url}&channel_binding=require", '"channel_binding"; the driver knows no such option'),
    ],
)
async def test_database_urls_that_can_never_work_end_with_a_sentence(
    environment: dict[str, str], tmp_path: Path, url: str, sentence: str
) -> None:
    wrong = {**environment, "DATABASE_URL": url.format(url=environment["DATABASE_URL"]), "HOME": str(tmp_path)}
    for arguments in (["run"], ["migrate"], ["drift"]):
        code, out, error = await command(wrong, *arguments)
        assert code == 2
        [line] = error.splitlines()
        assert line.startswith("campaign-stats: DATABASE_URL: ")
        assert sentence in line
        assert "Traceback" not in out


async def test_a_state_row_held_by_somebody_costs_only_its_campaign(
    service: StartService, bus: Bus, db: asyncpg.Connection, database_url: str
) -> None:
    held, others = await add_campaign(db, REFERENCE), [await add_campaign(db, {"sent": 1}) for _ in range(20)]
    topic, out = bus.topics.prefix + "prospect.status-changed", bus.topics.prefix + "campaign.stats-updated"
    running = await service()
    await bus.publish(topic, hint(held), key=str(held))
    await eventually(lambda: bus.events(out), "its state has a row", running)
    await db.execute("UPDATE campaign_prospects SET status = 'replied' WHERE campaign_id = $1", held)
    other = await asyncpg.connect(database_url)
    async with other.transaction():
        await other.execute("SELECT FROM campaign_stats.campaign_state WHERE campaign_id = $1 FOR UPDATE", held)
        for campaign_id in (held, *others):
            await bus.publish(topic, hint(campaign_id), key=str(campaign_id))

        async def others_are_told() -> bool:
            return len(await bus.events(out)) == 1 + len(others)

        await eventually(others_are_told, "nobody else waits for it", running)
        assert (await running.metrics())['campaign_stats_degraded{dependency="database"}'] == 0
    await other.close()

    async def told() -> bool:
        return len(await bus.events(out)) == 2 + len(others)

    await eventually(told, "recounted when it is free", running)
    assert await stats_of(db, held) == {"total": 120, "sent": 0, "replied": 120, "bounced": 0}
    assert await db.fetchval("SELECT max(failures) FROM campaign_stats.campaign_state") == 0


@pytest.mark.apache_kafka
async def test_many_dead_letters_too_large_for_their_topic_are_each_kept_once_and_stop_nobody(
    service: StartService, bus: Bus, db: asyncpg.Connection
) -> None:
    topic, letters = bus.topics.prefix + "prospect.status-changed", bus.topics.prefix + "campaign-stats.dead-letters"
    link = broker.Connection(bus.bootstrap, {})
    await broker.delete_topics(link, [letters])

    async def created() -> bool:  # deleting takes a moment
        return bool(
            await broker.create_topics(link, {letters: {"max.message.bytes": "3000"}}, partitions=1, replication=1)
        )

    await eventually(created, "a dead-letter topic for small records")
    for size in [200, 5_000, 4_500] * 200:
        await bus.publish(topic, b"x" * size, partition=0)
    campaign_id = await add_campaign(db, REFERENCE)
    await bus.publish(topic, hint(campaign_id), partition=0)
    running = await service()
    await eventually(lambda: _is_true(db, campaign_id), "the good one behind them is served", running)
    kept = [dict(record.headers)["dead-letter-offset"] for record in await bus.read(letters)]
    assert sorted(map(int, kept)) == list(range(600))
    assert [len(record.value) for record in await bus.read(letters)].count(200) == 200


async def test_a_server_that_refuses_what_the_url_asks_of_it_is_an_outage(
    service: StartService, environment: dict[str, str], bus: Bus, servers_directory: Path
) -> None:
    server = Postgres(servers_directory / "failover", options={"fsync": "off"}, tcp=True)
    try:
        server.start()
        await migrations.migrate(server.url(), reference_schema=True)
        db = await connect(server.url())
        campaign_id = await add_campaign(db, REFERENCE)
        url = server.url()
        environment["DATABASE_URL"] = f"{url}{'&' if '?' in url else '?'}target_session_attrs=read-write"
        running = await service()
        await db.execute("ALTER SYSTEM SET default_transaction_read_only = on")
        await db.execute("SELECT pg_reload_conf()")
        await db.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'campaign-stats'"
        )
        await bus.publish(bus.topics.prefix + "prospect.status-changed", hint(campaign_id), key=str(campaign_id))

        async def degraded() -> bool:
            return "database" in (await running.get("/readyz"))[1]

        await eventually(degraded, "an outage, as in a failover", running)
        await db.execute("SET default_transaction_read_only = off")
        await db.execute("ALTER SYSTEM RESET default_transaction_read_only")
        await db.execute("SELECT pg_reload_conf()")
        await eventually(lambda: _is_true(db, campaign_id), "recovered by itself", running)
        await db.close()
        running.terminate()
        assert await running.wait() == 0
    finally:
        server.stop()


@pytest.mark.parametrize("and_kafka", [False, pytest.param(True, marks=pytest.mark.apache_kafka)])
async def test_silent_servers_do_not_keep_a_process_from_ending_in_time(
    service: StartService, environment: dict[str, str], servers_directory: Path, and_kafka: bool
) -> None:
    database, kafka = Postgres(servers_directory / "silent", options={"fsync": "off"}, tcp=True), None
    stopped: list[int] = []
    try:
        database.start()
        await migrations.migrate(database.url(), reference_schema=True)
        environment["DATABASE_URL"] = database.url()
        if and_kafka:
            kafka = ApacheKafka(servers_directory / "silent-kafka")
            kafka.start()
            names = Topics("silent.")
            link = broker.Connection(kafka.bootstrap, {})
            await broker.create_topics(link, {name: {} for name in names.all}, partitions=1, replication=1)
            environment |= {"KAFKA_BOOTSTRAP_SERVERS": kafka.bootstrap, "CAMPAIGN_STATS_TOPIC_PREFIX": names.prefix}
        running = await service(sweep_interval_s=0.2, shutdown_deadline_s=3)
        for server in (database, kafka):
            if server is not None:
                stopped += [pid for pid in family(server) if _signal(pid, signal.SIGSTOP)]
        silent = asyncio.get_running_loop().time()

        async def noticed() -> bool:
            return asyncio.get_running_loop().time() - silent > 3

        await eventually(noticed, "every engine waits for them", running)
        begun = asyncio.get_running_loop().time()
        running.expected_exit = None
        running.terminate()
        assert await running.wait(20) in (0, 3)
        assert asyncio.get_running_loop().time() - begun < 3 + 4
    finally:
        for pid in stopped:
            _signal(pid, signal.SIGCONT)
        database.stop()
        if kafka is not None:
            kafka.stop()


def family(server: Server) -> list[int]:
    """A server's process and its children: PostgreSQL has one for every session."""
    found = [server.pid]
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(stat.read_text().rpartition(")")[2].split()[1]) == server.pid:
                found.append(int(stat.parent.name))
        except OSError:
            continue
    return found


def _signal(pid: int, number: signal.Signals) -> bool:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


async def test_a_hint_with_an_enormous_id_does_not_make_a_pause_too_large_to_tell(
    service: StartService, bus: Bus, db: asyncpg.Connection
) -> None:
    campaign_id = await add_campaign(db, {"sent": 95, "bounced": 10})
    await service()
    await bus.publish(
        bus.topics.prefix + "prospect.status-changed", hint(campaign_id, id="x" * 600_000), key=str(campaign_id)
    )
    [pause] = await eventually(lambda: bus.events(bus.topics.prefix + "campaign.paused"), "the pause is told")
    assert "causationid" not in pause
    request = sync_request(campaign_id, id="y" * 400_000)
    await bus.publish(bus.topics.prefix + "campaign.sync-requested", request, key=str(campaign_id))

    async def answered() -> bool:
        events = await bus.events(bus.topics.prefix + "campaign.stats-updated")
        return [event for event in events if event.get("causationid") == request["id"]] != []

    await eventually(answered, "a request is answered under its id, however long it is")
