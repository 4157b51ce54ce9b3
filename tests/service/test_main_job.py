"""The whole service as a process, through its doors: environment, Kafka, HTTP, signals."""

import asyncio
import json
import signal
import sys
from functools import partial
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest
from cloudevents.core.bindings.kafka import KafkaMessage, from_structured_event
from cloudevents.core.formats.json import JSONFormat

from consumer import broker
from schemas.topics import Topics
from tests.conftest import Bus, StartService, command, eventually
from tests.servers import REPOSITORY
from tests.world import (
    REFERENCE,
    USER,
    add_campaign,
    add_prospects,
    expected_stats,
    hint,
    stats_of,
    sync_request,
    truth,
)


async def events_of(bus: Bus, topic: str, campaign_id: UUID) -> list[dict[str, Any]]:
    return [event for event in await bus.events(topic) if event["subject"] == str(campaign_id)]


async def test_a_hint_becomes_counts_and_one_event(service: StartService, bus: Bus, db: asyncpg.Connection) -> None:
    campaign_id = await add_campaign(db, REFERENCE, stats={"total": 7, "sent": 99})
    await service()
    cause = hint(campaign_id, correlationid="order-1", traceparent=f"00-{'a' * 32}-{'b' * 16}-01")
    await bus.publish(bus.topics.prefix + "prospect.status-changed", cause, key=str(campaign_id))

    [event] = await eventually(lambda: events_of(bus, bus.topics.prefix + "campaign.stats-updated", campaign_id))
    data = event["data"]
    assert json.dumps(data["campaign"]["stats"]) == json.dumps({"total": 120, "sent": 34, "replied": 4, "bounced": 1})
    assert list(data["prospects_by_status"].items()) == list(REFERENCE.items())
    assert data["trigger"] == "status_changed"
    assert "drift" not in data
    assert (event["causationid"], event["correlationid"]) == (cause["id"], "order-1")
    assert event["traceparent"] == cause["traceparent"]
    row = await db.fetchrow("SELECT stats, last_synced_at, status FROM campaigns WHERE id = $1", campaign_id)
    assert row is not None
    assert row["stats"] == {"total": 120, "sent": 34, "replied": 4, "bounced": 1}
    assert row["last_synced_at"] is not None
    assert row["status"] == "active"


async def test_published_events_are_read_by_an_independent_reader(
    service: StartService, bus: Bus, db: asyncpg.Connection
) -> None:
    campaign_id = await add_campaign(db, REFERENCE)
    await service()
    await bus.publish(bus.topics.prefix + "prospect.status-changed", hint(campaign_id), key=str(campaign_id))
    topic = bus.topics.prefix + "campaign.stats-updated"
    [record] = await eventually(lambda: bus.read(topic))
    headers = dict(record.headers)
    assert headers["content-type"] == b"application/cloudevents+json"
    assert record.key == str(campaign_id).encode()
    event = from_structured_event(KafkaMessage(headers=headers, key=record.key, value=record.value), JSONFormat())
    assert event.get_type() == "campaign.stats_updated.v1"
    assert event.get_source() == "campaign-stats"
    assert event.get_subject() == str(campaign_id)


async def test_a_repeated_hint_changes_nothing_and_tells_nothing(
    service: StartService, bus: Bus, db: asyncpg.Connection
) -> None:
    campaign_id, last = await add_campaign(db, REFERENCE), await add_campaign(db, {"sent": 1})
    await service()
    topic, out = bus.topics.prefix + "prospect.status-changed", bus.topics.prefix + "campaign.stats-updated"
    event = hint(campaign_id)
    await bus.publish(topic, event, key=str(campaign_id))
    await eventually(lambda: events_of(bus, out, campaign_id))
    before = await db.fetchrow("SELECT updated_at, last_synced_at FROM campaigns WHERE id = $1", campaign_id)
    for _ in range(3):
        await bus.publish(topic, event, key=str(campaign_id))
    await bus.publish(topic, hint(last), key=str(campaign_id))  # same partition: read after the repeats
    await eventually(lambda: events_of(bus, out, last))
    assert len(await events_of(bus, out, campaign_id)) == 1
    after = await db.fetchrow("SELECT updated_at, last_synced_at FROM campaigns WHERE id = $1", campaign_id)
    assert before is not None
    assert after is not None
    assert after["updated_at"] == before["updated_at"]
    assert after["last_synced_at"] > before["last_synced_at"]


async def test_every_sync_request_gets_its_own_answer(service: StartService, bus: Bus, db: asyncpg.Connection) -> None:
    campaign_id = await add_campaign(db, REFERENCE)
    await service()
    topic = bus.topics.prefix + "campaign.sync-requested"
    requests = [sync_request(campaign_id, data={"user_id": str(USER)}) for _ in range(3)]
    foreign = sync_request(campaign_id, data={"user_id": str(uuid4())})
    unknown = sync_request(uuid4())
    for request in [*requests, foreign, unknown]:
        await bus.publish(topic, request, key=request["subject"])

    async def answers() -> dict[Any, dict[str, Any]]:
        found = await bus.events(bus.topics.prefix + "campaign.stats-updated")
        found += await bus.events(bus.topics.prefix + "campaign.sync-rejected")
        by_cause = {event.get("causationid"): event for event in found}
        return by_cause if by_cause.keys() >= {r["id"] for r in [*requests, foreign, unknown]} else {}

    found = await eventually(answers)
    for request in requests:
        assert found[request["id"]]["type"] == "campaign.stats_updated.v1"
        assert found[request["id"]]["data"]["trigger"] == "sync_requested"
        assert found[request["id"]]["data"]["campaign"]["stats"] == {
            "total": 120,
            "sent": 34,
            "replied": 4,
            "bounced": 1,
        }
    for request in (foreign, unknown):
        assert found[request["id"]]["type"] == "campaign.sync_rejected.v1"
        assert found[request["id"]]["data"] == {"campaign_id": request["subject"], "reason": "not_found"}


async def test_the_guard_pauses_once_with_two_replicas_and_duplicate_hints(
    service: StartService, bus: Bus, db: asyncpg.Connection
) -> None:
    campaign_id = await add_campaign(db, {"pending": 50, "sent": 95, "bounced": 5})
    one, two = await service(), await service()
    topic = bus.topics.prefix + "prospect.status-changed"
    for partition in (0, 1, 2):
        for _ in range(5):
            await bus.publish(topic, hint(campaign_id), key=str(campaign_id), partition=partition)
    [pause] = await eventually(lambda: bus.events(bus.topics.prefix + "campaign.paused"))

    async def all_committed() -> bool:
        lag = 0.0
        for replica in (one, two):
            samples = await replica.metrics()
            lag += sum(value for name, value in samples.items() if name.startswith("campaign_stats_lag_records"))
        return lag == 0

    await eventually(all_committed)
    assert await bus.events(bus.topics.prefix + "campaign.paused") == [pause]
    assert pause["data"]["sent"] == 100
    assert pause["data"]["bounced"] == 5
    assert pause["data"]["pending"] == 50
    assert pause["data"]["rate_bp"] == 500
    assert pause["data"]["previous_status"] == "active"
    row = await db.fetchrow("SELECT status, pause_reason FROM campaigns WHERE id = $1", campaign_id)
    assert row is not None
    assert (row["status"], row["pause_reason"]) == ("paused", "bounce_rate")
    audit = await db.fetch("SELECT version, paused FROM campaign_stats.guard_decisions")
    assert [(entry["version"], entry["paused"]) for entry in audit] == [(pause["data"]["version"], True)]
    news = await events_of(bus, bus.topics.prefix + "campaign.stats-updated", campaign_id)
    assert [event["data"]["version"] for event in news] == [pause["data"]["version"]]
    assert news[0]["data"]["campaign"]["status"] == "paused"


async def test_a_locked_campaign_makes_nobody_wait(
    service: StartService, bus: Bus, db: asyncpg.Connection, database_url: str
) -> None:
    locked = await add_campaign(db, REFERENCE)
    others = [await add_campaign(db, {"sent": 3, "pending": 2}) for _ in range(100)]
    running = await service()
    topic, out = bus.topics.prefix + "prospect.status-changed", bus.topics.prefix + "campaign.stats-updated"
    product = await asyncpg.connect(database_url)
    held = product.transaction()
    await held.start()
    await product.execute("SELECT 1 FROM campaigns WHERE id = $1 FOR UPDATE", locked)
    begun = asyncio.get_running_loop().time()
    for campaign_id in [locked, *others]:
        await bus.publish(topic, hint(campaign_id), key=str(campaign_id))

    async def served() -> bool:
        return {event["subject"] for event in await bus.events(out)} == {str(other) for other in others}

    await eventually(served, "the others are served while the lock is held", timeout_s=9)
    metrics = await running.metrics()
    assert metrics['campaign_stats_deferred_total{reason="locked"}'] >= 1
    await asyncio.sleep(max(0.0, 10 - (asyncio.get_running_loop().time() - begun)))  # the lock is held for 10 s
    assert await events_of(bus, out, locked) == []
    await held.rollback()
    await product.close()
    await eventually(lambda: events_of(bus, out, locked), "the locked one is served once it is free")
    assert await stats_of(db, locked) == expected_stats(REFERENCE)


async def test_a_dead_letter_keeps_everything_and_the_neighbours_are_served(
    service: StartService, bus: Bus, db: asyncpg.Connection
) -> None:
    campaign_id = await add_campaign(db, REFERENCE)
    running = await service()
    topic = bus.topics.prefix + "prospect.status-changed"
    bad = await bus.publish(topic, b"{oops", key="k", headers=[("x", b"\x00y")], partition=0)
    await bus.publish(topic, None, key="k", partition=0)
    await bus.publish(topic, hint(campaign_id), key="k", partition=0)
    await eventually(lambda: events_of(bus, bus.topics.prefix + "campaign.stats-updated", campaign_id))
    [letter] = await eventually(lambda: bus.read(bus.topics.prefix + "campaign-stats.dead-letters"))
    headers = dict(letter.headers)
    assert (letter.key, letter.value, headers["x"]) == (b"k", b"{oops", b"\x00y")
    assert headers["dead-letter-topic"] == topic.encode()
    assert headers["dead-letter-partition"] == b"0"
    assert headers["dead-letter-offset"] == str(bad.offset).encode()
    assert headers["dead-letter-reason"] == b"not_json"
    assert b"oops" not in headers["dead-letter-error"]
    assert headers["dead-letter-time"].endswith(b"Z")
    metrics = await running.metrics()
    assert metrics['campaign_stats_dead_letters_total{reason="not_json"}'] == 1
    assert metrics['campaign_stats_records_total{kind="tombstone"}'] == 1


async def test_binary_mode_and_newer_are_hints(service: StartService, bus: Bus, db: asyncpg.Connection) -> None:
    binary, newer = await add_campaign(db, {"sent": 2}), await add_campaign(db, {"sent": 3})
    running = await service()
    topic, out = bus.topics.prefix + "prospect.status-changed", bus.topics.prefix + "campaign.stats-updated"
    event = hint(binary)
    headers = [(f"ce_{name}", event[name].encode()) for name in ("specversion", "id", "source", "type")]
    await bus.publish(
        topic, json.dumps(event["data"]).encode(), headers=[*headers, ("content-type", b"application/json")]
    )
    await bus.publish(topic, hint(newer, type="prospect.status_changed.v9", data={"to_status": 7}))
    [first] = await eventually(lambda: events_of(bus, out, binary))
    assert first["causationid"] == event["id"]
    await eventually(lambda: events_of(bus, out, newer))
    assert (await running.metrics())['campaign_stats_records_total{kind="newer_version"}'] == 1


async def test_the_sweep_finds_what_was_never_hinted(service: StartService, bus: Bus, db: asyncpg.Connection) -> None:
    right = await add_campaign(db, REFERENCE, stats=expected_stats(REFERENCE), type="linkedin", status="completed")
    wrong = await add_campaign(db, REFERENCE, stats={"total": 120, "sent": "many", "replied": 4.5, "x": 1})
    await service(sweep_interval_s=0.2)
    out = bus.topics.prefix + "campaign.stats-updated"
    [published] = await eventually(lambda: events_of(bus, out, right))  # never published counts as different
    [healed] = await eventually(lambda: events_of(bus, out, wrong))
    assert "drift" not in published["data"]
    assert healed["data"]["trigger"] == "reconciliation"
    assert healed["data"]["drift"] == {"sent": 34, "replied": 4, "bounced": 1}
    assert "causationid" not in healed
    assert await stats_of(db, wrong) == expected_stats(REFERENCE)
    await db.execute("UPDATE campaigns SET stats = '[1]' WHERE id = $1", right)
    await eventually(lambda: _healed(db, right), "a manual edit heals")


async def _healed(db: asyncpg.Connection, campaign_id: UUID) -> bool:
    return bool(await stats_of(db, campaign_id) == expected_stats(await truth(db, campaign_id)))


async def test_until_caught_up_ends_with_all_done(service: StartService, bus: Bus, db: asyncpg.Connection) -> None:
    campaigns = [await add_campaign(db, {"sent": number}) for number in range(1, 30)]
    for campaign_id in campaigns * 3:
        await bus.publish(bus.topics.prefix + "prospect.status-changed", hint(campaign_id), key=str(campaign_id))
    running = await service("--until-caught-up", ready=False)
    assert await running.wait(30) == 0
    for number, campaign_id in enumerate(campaigns, start=1):
        assert await stats_of(db, campaign_id) == {"total": number, "sent": number, "replied": 0, "bounced": 0}
    told = {event["subject"] for event in await bus.events(bus.topics.prefix + "campaign.stats-updated")}
    assert told == {str(campaign_id) for campaign_id in campaigns}
    assert await db.fetchval("SELECT count(*) FROM campaign_stats.outbox") == 0
    again = await service("--until-caught-up", ready=False)  # nothing new: offsets were committed
    assert await again.wait(30) == 0
    assert again.messages("generation flushed") == []


async def test_a_failing_campaign_is_deferred_answered_and_healed(
    service: StartService, bus: Bus, db: asyncpg.Connection
) -> None:
    poisoned, good = await add_campaign(db, REFERENCE), await add_campaign(db, {"sent": 2})
    await db.execute(
        f"""CREATE FUNCTION poison() RETURNS trigger LANGUAGE plpgsql AS $$
            BEGIN IF NEW.id = '{poisoned}' THEN RAISE EXCEPTION 'product says no'; END IF; RETURN NEW; END $$;
            CREATE TRIGGER poison BEFORE UPDATE ON campaigns FOR EACH ROW EXECUTE FUNCTION poison();"""
    )
    running = await service()
    out = bus.topics.prefix + "campaign.stats-updated"
    request = sync_request(poisoned)
    await bus.publish(bus.topics.prefix + "campaign.sync-requested", request, key=str(poisoned))
    await bus.publish(bus.topics.prefix + "prospect.status-changed", hint(good), key=str(poisoned))
    await eventually(lambda: events_of(bus, out, good), "the good neighbour is served", running)
    await db.execute("UPDATE campaign_stats.campaign_state SET failures = 4 WHERE campaign_id = $1", poisoned)
    [rejected] = await eventually(lambda: bus.events(bus.topics.prefix + "campaign.sync-rejected"), "answered", running)
    assert rejected["causationid"] == request["id"]
    assert rejected["data"]["reason"] == "failed"
    await db.execute("DROP TRIGGER poison ON campaigns")
    await db.execute("UPDATE campaign_stats.campaign_state SET retry_at = now() WHERE campaign_id = $1", poisoned)
    await db.execute("UPDATE campaign_stats.deferred SET not_before = now()")
    await eventually(lambda: events_of(bus, out, poisoned), "healed once the cause is gone", running)
    assert await db.fetchval("SELECT failures FROM campaign_stats.campaign_state WHERE campaign_id = $1", poisoned) == 0
    assert len(await bus.events(bus.topics.prefix + "campaign.sync-rejected")) == 1


async def test_health_and_metrics_answer(service: StartService) -> None:
    running = await service()
    assert await running.get("/livez") == (200, '{"alive":true}')
    status, body = await running.get("/readyz")
    assert (status, json.loads(body)) == (200, {"ready": True, "degraded": []})
    metrics = await running.metrics()
    for sample in (
        'campaign_stats_guard_decisions_total{mode="enforce",verdict="trip"}',
        'campaign_stats_dead_letters_total{reason="too_large"}',
        'campaign_stats_deferred_rows{reason="huge"}',
        'campaign_stats_degraded{dependency="kafka"}',
        'campaign_stats_published_total{type="campaign.paused.v1"}',
        "campaign_stats_outbox_oldest_seconds",
        "campaign_stats_drift_found_total",
    ):
        assert metrics[sample] == 0, sample


async def test_wrong_settings_and_missing_things_are_all_listed_with_exit_code_2(
    environment: dict[str, str], bus: Bus, db: asyncpg.Connection
) -> None:
    code, _, error = await command(
        {**environment, "CAMPAIGN_STATS_GUARD_MIN_SENT": "0", "CAMPAIGN_STATS_HTTP_PORT": "99999"}, "run"
    )
    assert code == 2
    assert "CAMPAIGN_STATS_HTTP_PORT" in error
    code, _, error = await command({**environment, "CAMPAIGN_STATS_TOPIC_PREFIX": "nowhere."}, "run")
    assert code == 2
    assert error.count("is missing: run `campaign-stats topics --create`") == 6
    await db.execute("ALTER TABLE accounts DROP COLUMN display_name; DROP TABLE campaign_sender_accounts")
    code, _, error = await command(environment, "run")
    assert code == 2
    assert "public.accounts lacks display_name" in error
    assert "public.campaign_sender_accounts is missing" in error


async def test_topics_that_appear_while_it_starts_are_waited_for(
    service: StartService, environment: dict[str, str], bus: Bus, db: asyncpg.Connection
) -> None:
    names = Topics(f"late-{uuid4().hex[:8]}.")
    running = await service(ready=False, topic_prefix=names.prefix)
    await eventually(
        lambda: any(line["event"] == "topics not there yet" for line in running.logs),
        "it looked and found nothing",
        running,
    )
    link = broker.Connection(bus.bootstrap, {})
    assert (await running.get("/readyz"))[0] == 503
    await broker.create_topics(link, {name: {} for name in names.all}, partitions=3, replication=1)
    await running.ready()
    assert running.messages("started")[0]["topics"] == names.read


async def test_the_service_runs_with_exactly_the_documented_rights_and_names_a_missing_one(
    service: StartService, environment: dict[str, str], bus: Bus, db: asyncpg.Connection
) -> None:
    role = f"svc_{uuid4().hex[:8]}"
    campaign_id = await add_campaign(db, {"sent": 95, "bounced": 5})
    await db.execute(f"CREATE ROLE {role} LOGIN")
    try:
        environment["DATABASE_URL"] = environment["DATABASE_URL"].replace("postgres@", f"{role}@", 1)
        code, _, error = await command(environment, "run")
        assert code == 2
        assert "GRANT USAGE ON SCHEMA campaign_stats" in error or "GRANT SELECT" in error
        await db.execute(
            f"""GRANT USAGE ON SCHEMA campaign_stats TO {role};
                GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA campaign_stats TO {role};
                GRANT SELECT ON campaigns, campaign_prospects TO {role};
                GRANT UPDATE (stats, last_synced_at, updated_at, status) ON campaigns TO {role}"""
        )
        code, _, error = await command(environment, "run")
        assert code == 2
        assert "may not UPDATE pause_reason of public.campaigns: GRANT UPDATE (pause_reason)" in error
        await db.execute(f"GRANT UPDATE (pause_reason) ON campaigns TO {role}")
        running = await service(sweep_interval_s=0.3)
        await bus.publish(bus.topics.prefix + "prospect.status-changed", hint(campaign_id), key=str(campaign_id))
        await eventually(lambda: bus.events(bus.topics.prefix + "campaign.paused"), "it pauses", running)
        running.terminate()
        assert await running.wait() == 0
        await db.execute("ALTER TABLE campaign_prospects ENABLE ROW LEVEL SECURITY")
        code, _, error = await command(environment, "run")
        assert code == 2
        assert "row security hides rows of campaign_prospects" in error
    finally:
        await db.execute(f"DROP OWNED BY {role}; DROP ROLE {role}")


async def test_sigterm_while_waiting_for_servers_ends_with_0(service: StartService) -> None:
    running = await service(ready=False)
    await eventually(lambda: running.port > 0, "listens", running)
    running.terminate()
    assert await running.wait(10) == 0


@pytest.mark.kcat
async def test_a_hint_and_a_request_by_hand_with_kcat(service: StartService, bus: Bus, db: asyncpg.Connection) -> None:
    campaign_id = await add_campaign(db, REFERENCE)
    await service()
    for event, name in (
        (hint(campaign_id), "prospect.status-changed"),
        (sync_request(campaign_id), "campaign.sync-requested"),
    ):
        process = await asyncio.create_subprocess_exec(
            "kcat", "-P", "-b", bus.bootstrap, "-t", bus.topics.prefix + name, "-k", str(campaign_id),
            stdin=asyncio.subprocess.PIPE,
        )  # fmt: skip
        await process.communicate(json.dumps(event).encode())
        assert process.returncode == 0

    async def both() -> bool:
        found = await events_of(bus, bus.topics.prefix + "campaign.stats-updated", campaign_id)
        return {event["data"]["trigger"] for event in found} >= {"sync_requested"} and len(found) >= 2

    await eventually(both)


async def test_commands_sync_why_drift_reconcile_tail(
    service: StartService, environment: dict[str, str], bus: Bus, db: asyncpg.Connection
) -> None:
    campaign_id = await add_campaign(db, {"pending": 50, "sent": 114, "bounced": 5}, stats={"total": 1})
    code, out, _ = await command(environment, "drift", "--json")
    assert code == 1
    assert json.loads(out)[0]["drift"] == {"total": 168, "sent": 114, "bounced": 5}
    running = await service()
    code, out, _ = await command(environment, "sync", str(campaign_id), "--wait", "20")
    assert code == 0
    assert json.loads(out)["campaign"]["stats"] == {"total": 169, "sent": 114, "replied": 0, "bounced": 5}
    code, out, _ = await command(environment, "sync", str(uuid4()), "--wait")
    assert (code, json.loads(out)["reason"]) == (1, "not_found")
    for arguments in (
        ["--wait=20", str(campaign_id)],
        ["--wait", "20", str(campaign_id)],
        ["--wait", str(campaign_id)],
    ):
        assert (await command(environment, "sync", *arguments))[0] == 0
    for arguments in ([str(campaign_id), "20"], ["00000000-0000-0000-0000-000000000001"]):
        assert (await command(environment, "sync", *arguments))[0] == 2
    assert (await command(environment, "drift"))[0] == 0

    code, out, _ = await command(environment, "why", str(campaign_id), "--json")
    assert code == 0
    assert json.loads(out) == {
        "campaign_id": str(campaign_id), "type": "email", "status": "active", "mode": "enforce",
        "sent": 119, "bounced": 5, "rate_bp": 420, "threshold_bp": 500, "min_sent": 100, "window": 500,
        "verdict": "below_rate", "bounces_left": 1, "last_pause": None,
    }  # fmt: skip
    code, out, _ = await command(environment, "why", str(campaign_id))
    assert code == 0
    assert "119 mailed, 5 bounced: 4.2 %" in out
    assert (await command(environment, "why", str(uuid4())))[0] == 1

    code, out, _ = await command(environment, "reconcile", str(campaign_id), "--now")
    assert (code, out.strip()) == (0, "1")
    topic = bus.topics.prefix + "campaign.stats-updated"

    async def published_again() -> bool:
        found = await events_of(bus, topic, campaign_id)
        return any(event["data"]["trigger"] == "reconciliation" for event in found)

    await eventually(published_again, "reconcile publishes again though nothing changed", running)
    assert (await command(environment, "reconcile", str(uuid4())))[0] == 1
    assert (await command(environment, "reconcile"))[0] == 2


async def test_nothing_personal_goes_onto_the_bus(service: StartService, bus: Bus, db: asyncpg.Connection) -> None:
    campaign_id = await add_campaign(db, {"sent": 95, "bounced": 5})
    secrets = ("jane@example.org", "Jane", "Doe", "ACME", "kind regards")
    await db.execute("UPDATE campaigns SET signature = $1", secrets[4])
    await db.execute(
        "UPDATE campaign_prospects SET email = $1, first_name = $2, last_name = $3, company = $4", *secrets[:4]
    )
    running = await service(sweep_interval_s=0.2)
    for request in (hint(campaign_id), sync_request(campaign_id), sync_request(uuid4())):
        name = "campaign.sync-requested" if "sync" in request["type"] else "prospect.status-changed"
        await bus.publish(bus.topics.prefix + name, request, key=request["subject"])
    for topic in bus.topics.written:
        records = await eventually(partial(bus.read, topic), topic, running)
        written = b"".join(record.value for record in records)
        assert not [secret for secret in secrets if secret.encode() in written]
    assert not [secret for secret in secrets if secret in "".join(running.raw)]


async def test_tail_follows_what_is_published(
    service: StartService, environment: dict[str, str], bus: Bus, db: asyncpg.Connection
) -> None:
    campaign_id = await add_campaign(db, {"sent": 95, "bounced": 5})
    await service()
    tail = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "consumer", "tail", env=environment, cwd=REPOSITORY,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert tail.stderr is not None
    assert tail.stdout is not None
    async with asyncio.timeout(20):
        assert b"following" in await tail.stderr.readline()
        topic = bus.topics.prefix + "prospect.status-changed"
        await bus.publish(topic, hint(campaign_id), key=str(campaign_id))
        await bus.publish(topic, b"oops", key=str(campaign_id), headers=[("h", None)])
        await bus.publish(bus.topics.prefix + "campaign.paused", {"type": "campaign.paused.v1", "data": {}})
        lines = {(await tail.stdout.readline()).decode().rstrip() for _ in range(4)}
        deep = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "consumer", "tail", "--json", env=environment, cwd=REPOSITORY,
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        assert deep.stderr is not None
        assert deep.stdout is not None
        await deep.stderr.readline()
        await bus.publish(topic, b"[\n" * 1_010 + b"]" * 1_010, key=str(campaign_id))
        line = await deep.stdout.readline()
        assert line.count(b"[") == 1_010
        assert b'"dead-letter-reason":"not_cloudevent"' in line
        deep.send_signal(signal.SIGINT)
        await deep.communicate()
    tail.send_signal(signal.SIGINT)
    await tail.communicate()
    assert tail.returncode == 130
    assert f"paused  {campaign_id}  5 of 100 bounced (5.00 %)" in lines
    stats = '{"total":100,"sent":95,"replied":0,"bounced":5}'
    assert f"stats  {campaign_id}  paused  {stats}  status_changed" in lines
    assert any(line.startswith("dead letter  not_json: ") for line in lines)
    assert f"{bus.topics.prefix}campaign.paused  (no event of this service)" in lines


async def test_prospects_added_meanwhile_are_counted(service: StartService, bus: Bus, db: asyncpg.Connection) -> None:
    campaign_id = await add_campaign(db, {"pending": 1})
    await service()
    for _ in range(20):
        prospects = await add_prospects(db, campaign_id, "pending", 2)
        await db.execute("SELECT update_prospect_with_stat($1, 'sent')", prospects[0])
        await bus.publish(bus.topics.prefix + "prospect.status-changed", hint(campaign_id), key=str(campaign_id))
    await eventually(lambda: _healed(db, campaign_id))
    assert await stats_of(db, campaign_id) == {"total": 41, "sent": 20, "replied": 0, "bounced": 0}
