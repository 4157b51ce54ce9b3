"""The contracts against the running service: what it does with every example, and what it writes itself."""

import asyncio
import copy
import hashlib
import json
import os
import re
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import aiohttp
import asyncpg
import jsonschema_rs
import pytest
import yaml
from cloudevents.core.bindings.kafka import (
    KafkaMessage,
    from_kafka_event,
    from_structured_event,
    to_binary_event,
    to_structured_event,
)
from cloudevents.core.formats.json import JSONFormat
from cloudevents.core.v1.event import CloudEvent

from consumer import broker
from schemas import catalogue, door, events
from schemas.tools import examples
from schemas.tools.__main__ import SCHEMAS
from schemas.tools.json_schema import shaped
from tests.conftest import Bus, StartService, eventually
from tests.world import REFERENCE, USER, add_campaign, add_prospects, hint, sync_request

CAMPAIGN = UUID("8c2b2d4e-e29b-41d4-a716-446655440000")  # that of the examples
BAD = list(examples.bad())
TOKEN = "a-token"


def writers_schema(event_type: str) -> jsonschema_rs.Draft202012Validator:
    """What we promise to write, and not a field more."""
    text = (SCHEMAS / "json" / f"{event_type}.event.writer.json").read_text()
    return jsonschema_rs.Draft202012Validator(json.loads(text), validate_formats=True)


async def letters(bus: Bus) -> dict[str, dict[str, str]]:
    """Key of the record -> our headers of its dead letter."""
    found = {}
    for record in await bus.read(bus.topics.dead_letters):
        found[record.key.decode()] = {name: (value or b"").decode() for name, value in record.headers}
    return found


async def test_every_bad_example_becomes_exactly_the_dead_letter_it_is_said_to_become(
    service: StartService, bus: Bus, db: asyncpg.Connection
) -> None:
    await add_campaign(db, REFERENCE, id=CAMPAIGN)
    running = await service()
    for bad in BAD:
        topic = bad.type if bad.type in (events.STATUS_CHANGED, events.SYNC_REQUESTED) else events.STATUS_CHANGED
        await bus.publish(bus.topics.of(topic), bad.value, key=bad.name)
    last = sync_request(CAMPAIGN)
    await bus.publish(bus.topics.of(events.SYNC_REQUESTED), last, key=str(CAMPAIGN))

    async def all_there() -> dict[str, dict[str, str]]:
        found = await letters(bus)
        return found if len(found) >= len(BAD) else {}

    kept = await eventually(all_there, "every bad example is kept", running)
    expected = {bad.name: (bad.reason, bad.error) for bad in BAD}
    said = {name: (one["dead-letter-reason"], one["dead-letter-error"]) for name, one in kept.items()}
    assert said == expected
    assert all(set(catalogue.DEAD_LETTER_HEADERS) <= set(one) for one in kept.values())
    values = {record.key.decode(): record.value for record in await bus.read(bus.topics.dead_letters)}
    assert values == {bad.name: bad.value for bad in BAD}

    async def answered() -> bool:
        told = await bus.events(bus.topics.of(events.STATS_UPDATED))
        return any(event.get("causationid") == last["id"] for event in told)

    await eventually(answered, "the good request beside them is answered", running)


async def test_every_good_example_is_served_and_every_request_answered_in_both_modes(
    service: StartService, bus: Bus, db: asyncpg.Connection
) -> None:
    await add_campaign(db, REFERENCE, id=CAMPAIGN)
    running = await service()
    asked: dict[str, str] = {}
    for event_type in (events.STATUS_CHANGED, events.SYNC_REQUESTED):
        for name, event in examples.parsed(event_type).items():
            await bus.publish(bus.topics.of(event_type), event)
            binary = {**event, "id": f"{name}-binary"}
            headers = [(f"ce_{key}", str(value).encode()) for key, value in binary.items() if key != "data"]
            await bus.publish(bus.topics.of(event_type), event["data"], headers=headers)
            if event_type == events.SYNC_REQUESTED:
                gone = event["data"]["campaign_id"] != str(CAMPAIGN)
                for one in (event, binary):
                    asked[one["id"]] = events.SYNC_REJECTED if gone else events.STATS_UPDATED

    async def answers() -> bool:
        told = [
            event
            for kind in (events.STATS_UPDATED, events.SYNC_REJECTED)
            for event in await bus.events(bus.topics.of(kind))
        ]
        return {one["causationid"]: one["type"] for one in told if one.get("causationid") in asked} == asked

    await eventually(answers, "every request is answered as it should be", running)

    expected = {
        "status_hint": 2 * len(examples.good(events.STATUS_CHANGED)),
        "sync_request": 2 * len(examples.good(events.SYNC_REQUESTED)),
    }

    async def all_served() -> bool:
        metrics = await running.metrics()
        return {kind: metrics[f'campaign_stats_records_total{{kind="{kind}"}}'] for kind in expected} == expected

    await eventually(all_served, "every example is served", running)
    assert await bus.read(bus.topics.dead_letters) == []


async def test_all_that_is_published_keeps_to_the_writers_schema_and_is_read_by_the_cloudevents_package(
    service: StartService, bus: Bus, db: asyncpg.Connection
) -> None:
    bouncing = await add_campaign(db, {"pending": 10, "sent": 114, "bounced": 6})
    drifted = await add_campaign(db, {"sent": 3, "replied": 1}, stats={"total": 9, "sent": 9}, type="linkedin")
    empty = await add_campaign(db, {})
    await db.execute("UPDATE campaigns SET last_synced_at = now() - interval '1 hour' WHERE id = $1", drifted)
    running = await service(sweep_interval_s=0.5)
    for campaign in (bouncing, empty):
        cause = hint(campaign, correlationid="c-1", traceparent=f"00-{'a' * 32}-{'b' * 16}-01")
        await bus.publish(bus.topics.of(events.STATUS_CHANGED), cause, key=str(campaign))
    for campaign in (empty, uuid4()):
        await bus.publish(bus.topics.of(events.SYNC_REQUESTED), sync_request(campaign), key=str(campaign))

    async def told() -> dict[str, list[Any]]:
        found = {
            kind: await bus.read(bus.topics.of(kind))
            for kind in (events.STATS_UPDATED, events.SYNC_REJECTED, events.PAUSED)
        }
        triggers = {json.loads(one.value)["data"]["trigger"] for one in found[events.STATS_UPDATED]}
        return found if triggers == set(events.Trigger) and all(found.values()) else {}

    found = await eventually(told, "every kind of event with every trigger", running, timeout_s=30)
    for kind, records in found.items():
        judge = writers_schema(kind)
        for record in records:
            event = json.loads(record.value)
            assert [str(one) for one in judge.iter_errors(event)] == []
            assert record.key.decode() == event["subject"]
            read = from_structured_event(
                KafkaMessage(headers=dict(record.headers), key=record.key, value=record.value), JSONFormat()
            )
            assert (read.get_id(), read.get_type(), read.get_data()) == (event["id"], kind, event["data"])
    drifts = [json.loads(one.value)["data"].get("drift") for one in found[events.STATS_UPDATED]]
    assert any(drifts)


@pytest.mark.parametrize("mode", ["structured", "binary"])
async def test_what_the_cloudevents_package_writes_is_read(
    service: StartService, bus: Bus, db: asyncpg.Connection, mode: str
) -> None:
    campaign = await add_campaign(db, REFERENCE)
    running = await service()
    sent = CloudEvent(
        attributes={
            "specversion": "1.0",
            "id": f"by-the-package-{mode}",
            "source": "/elsewhere",
            "type": events.SYNC_REQUESTED,
            "time": datetime.now(UTC) - timedelta(days=3),
            "subject": str(campaign),
            "datacontenttype": "application/json",
            "correlationid": "theirs",
        },
        data={"campaign_id": str(campaign), "user_id": str(USER)},
    )
    message = (to_structured_event if mode == "structured" else to_binary_event)(sent, JSONFormat())
    assert from_kafka_event(message).get_id() == sent.get_id()
    value = message.value if isinstance(message.value, bytes) else str(message.value).encode()
    await bus.publish(bus.topics.of(events.SYNC_REQUESTED), value, headers=list(message.headers.items()))

    async def answer() -> Any:
        told = await bus.events(bus.topics.of(events.STATS_UPDATED))
        return [event for event in told if event.get("causationid") == sent.get_id()]

    [event, *_] = await eventually(answer, "the package's request is answered", running)
    assert event["correlationid"] == "theirs"


async def test_every_change_record_does_what_it_is_said_to_do(
    service: StartService, bus: Bus, db: asyncpg.Connection
) -> None:
    expected = json.loads((examples.EXAMPLES / "change-records" / "expected.json").read_text())
    campaigns = {campaign for said in expected.values() for campaign in said.get("campaigns", ())}
    for campaign in campaigns:
        await add_campaign(db, id=UUID(campaign))
    topic = f"product-{uuid4().hex[:8]}.public.campaign_prospects"
    await broker.create_topics(broker.Connection(bus.bootstrap, {}), {topic: {}}, partitions=1, replication=1)
    running = await service(cdc_topic=topic)
    for name, said in expected.items():  # one after the other, so that each is seen to have its effect
        value = (examples.EXAMPLES / "change-records" / name).read_bytes()
        for campaign in said.get("campaigns", ()):
            await add_prospects(db, UUID(campaign), "sent", 1)
        before = await db.fetchval("SELECT coalesce(sum((stats ->> 'total')::int), 0) FROM campaigns")
        await bus.publish(topic, value, key=name)

        async def counted(more: int = len(said.get("campaigns", ())), before: int = before) -> bool:
            total: int = await db.fetchval("SELECT coalesce(sum((stats ->> 'total')::int), 0) FROM campaigns")
            return total == before + more

        await eventually(counted, f"{name} is counted", running)
    ignored = sum(said.get("campaigns") == [] for said in expected.values())
    hints = sum(bool(said.get("campaigns")) for said in expected.values())

    async def told_apart() -> bool:
        metrics = await running.metrics()
        return [metrics[f'campaign_stats_records_total{{kind="{kind}"}}'] for kind in ("change", "tombstone")] == [
            hints,
            ignored,
        ]

    await eventually(told_apart, "what is ignored is counted as such", running)

    async def all_refused() -> bool:
        return len(await letters(bus)) >= sum("reason" in said for said in expected.values())

    await eventually(all_refused, "every unusable record is kept", running)
    kept = {name: (one["dead-letter-reason"], one["dead-letter-error"]) for name, one in (await letters(bus)).items()}
    assert kept == {name: (one["reason"], one["error"]) for name, one in expected.items() if "reason" in one}


async def open_door(service: StartService, environment: dict[str, str], **settings: object) -> Any:
    environment |= {
        "CAMPAIGN_STATS_API_TOKENS": json.dumps({hashlib.sha256(TOKEN.encode()).hexdigest(): str(USER)}),
        "CAMPAIGN_STATS_API_PORT": "0",
    }
    return await service(**settings)


async def test_the_door_answers_nothing_that_its_document_does_not_name(
    service: StartService, environment: dict[str, str], db: asyncpg.Connection, tmp_path: Path
) -> None:
    """schemathesis: many calls made from the document, each answer held against it."""
    await add_campaign(db, REFERENCE, id=CAMPAIGN)
    running = await open_door(service, environment, api_rate_per_minute=0)
    document = yaml.safe_load((SCHEMAS / "openapi.yaml").read_text())

    async def judged(answers: set[str], seed: int) -> tuple[int, str]:
        """Exit code and report when the document names only these answers."""
        responses = document["paths"][door.PATH]["post"]["responses"]
        kept = {status: answer for status, answer in responses.items() if status in answers}
        changed = copy.deepcopy(document)
        changed["paths"][door.PATH]["post"]["responses"] = kept
        (tmp_path / "openapi.json").write_text(json.dumps(changed))
        process = await asyncio.create_subprocess_exec(
            Path(sys.executable).parent / "schemathesis", "run", "openapi.json",
            "--url", f"http://127.0.0.1:{running.api_port}", "--header", f"Authorization: Bearer {TOKEN}",
            "--checks", "all", "--max-examples", "50", "--phases", "examples,coverage,fuzzing",
            "--seed", str(seed), "--no-color",
            cwd=tmp_path, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
        )  # fmt: skip
        async with asyncio.timeout(180):
            report, _ = await process.communicate()
        return process.returncode or 0, report.decode()

    every = {"200", *(str(one.status) for one in door.REFUSALS)}
    seed = int(os.environ["CAMPAIGN_STATS_FAULT_SEED"])
    code, report = await judged(every, seed)
    assert code == 0, report[-6000:]
    cases = re.search(r"(\d+) generated", report)
    assert cases is not None, report[-2000:]
    assert int(cases[1]) >= 50
    for another in range(5):  # the control: one seed in many meets no unknown campaign
        code, report = await judged(every - {"404"}, seed + another)
        if code != 0:
            break
    assert code == 1
    assert "404" in report


async def test_the_door_answers_and_refuses_in_the_words_of_its_document(
    service: StartService, environment: dict[str, str], db: asyncpg.Connection
) -> None:
    await add_campaign(db, REFERENCE, id=CAMPAIGN)
    account = await db.fetchval(
        "INSERT INTO accounts (user_id, type, email_address) VALUES ($1, 'gmail', 'a@example.com') RETURNING id", USER
    )
    await db.execute("INSERT INTO campaign_sender_accounts VALUES ($1, $2)", CAMPAIGN, account)
    running = await open_door(service, environment, api_rate_per_minute=4)
    refused = {one.status: one for one in door.REFUSALS}
    path = door.PATH.replace("{id}", str(CAMPAIGN))
    async with aiohttp.ClientSession(f"http://127.0.0.1:{running.api_port}") as session:

        async def call(path: str, method: str = "POST", token: str = TOKEN, **more: Any) -> tuple[int, Any, set[str]]:
            headers = {"Authorization": f"Bearer {token}"}
            async with session.request(method, path, headers=headers, **more) as response:
                return response.status, await response.json(), set(response.headers)

        status, answer, _ = await call(path)
        assert status == 200
        judge = jsonschema_rs.Draft202012Validator(shaped(door.SyncStatsAnswer, "writer"), validate_formats=True)
        assert [str(one) for one in judge.iter_errors(answer)] == []
        assert list(answer["campaign"]) == list(door.SyncedCampaign.model_fields)
        assert list(answer["campaign"]["sender_accounts"][0]) == list(door.SenderAccount.model_fields)
        calls = {
            401: await call(path, token="another"),
            405: await call(path, method="GET"),
            413: await call(path, data=b"x" * (door.MAX_BODY_BYTES + 1)),
            400: await call(door.PATH.replace("{id}", "42")),
            404: await call(door.PATH.replace("{id}", str(uuid4()))),
            429: await call(path),
        }
    for expected, (status, document, headers) in calls.items():
        assert (status, document["error"]) in {(expected, sentence) for sentence in refused[expected].sentences}
        assert refused[expected].header is None or refused[expected].header in headers


async def test_the_door_says_it_too_when_somebody_holds_the_campaign_and_when_bytes_are_no_http(
    service: StartService, environment: dict[str, str], db: asyncpg.Connection
) -> None:
    await add_campaign(db, REFERENCE, id=CAMPAIGN)
    running = await open_door(service, environment)
    headers = {"Authorization": f"Bearer {TOKEN}"}
    url = f"http://127.0.0.1:{running.api_port}{door.PATH.replace('{id}', str(CAMPAIGN))}"
    async with aiohttp.ClientSession() as session, db.transaction():
        await db.execute("SELECT FROM campaigns WHERE id = $1 FOR UPDATE", CAMPAIGN)
        async with session.post(url, headers=headers) as response:
            assert (response.status, await response.json()) == (503, {"error": door.LOCKED})
            assert int(response.headers["Retry-After"]) >= 1
    reader, writer = await asyncio.open_connection("127.0.0.1", running.api_port)
    writer.write(b"no http\r\n\r\n")
    answer = await asyncio.wait_for(reader.read(), 10)
    writer.close()
    assert answer.split(b" ", 2)[1] == b"400"
    assert answer.endswith(json.dumps({"error": door.NO_HTTP}, separators=(",", ":")).encode())
    slow, sender = await asyncio.open_connection("127.0.0.1", running.api_port)
    path = door.PATH.replace("{id}", str(CAMPAIGN))
    sender.write(f"POST {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\n".encode())
    sender.write(b"Content-Length: 5\r\n\r\n")
    answer = await asyncio.wait_for(slow.read(), 30)
    sender.close()
    assert answer.split(b" ", 2)[1] == b"408"
    assert answer.endswith(json.dumps({"error": door.TOO_SLOW}, separators=(",", ":")).encode())
