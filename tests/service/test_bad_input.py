"""Whatever stands in a topic: it is served, ignored, or kept as a dead letter; its neighbours are served beside it."""

import asyncio
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from uuid import UUID, uuid4

import asyncpg
import pytest
from aiokafka import AIOKafkaProducer

from consumer import broker
from schemas.topics import Topics
from tests.conftest import Bus, RunningService, StartService, eventually
from tests.servers import ApacheKafka
from tests.world import REFERENCE, USER, add_campaign, expected_stats, hint, stats_of, sync_request

SECRET = "s3cret"  # stands in much of the bad input, and in no error text
DEEP = 100_000


class Given(NamedTuple):
    """A record as an upstream might write it."""

    value: bytes | None
    key: bytes | None = None
    headers: tuple[tuple[str, bytes | None], ...] = ()


async def write_batch(bootstrap: str, topic: str, given: Sequence[Given], *, codec: str | None = None) -> None:
    """Write all of them into partition 0, as many in one batch as a topic takes by default."""
    producer = AIOKafkaProducer(
        bootstrap_servers=bootstrap, acks="all", max_batch_size=10**6, max_request_size=2**24, compression_type=codec
    )
    await producer.start()
    try:
        batch = producer.create_batch()
        for one in given:
            if batch.append(timestamp=None, key=one.key, value=one.value, headers=list(one.headers)) is None:
                await (await producer.send_batch(batch, topic, partition=0))
                batch = producer.create_batch()
                assert batch.append(timestamp=None, key=one.key, value=one.value, headers=list(one.headers)) is not None
        await (await producer.send_batch(batch, topic, partition=0))
    finally:
        await producer.stop()


async def all_read(running: RunningService, topic: str, records: int) -> None:
    """Wait until the service committed everything that was written to partition 0."""

    async def is_read() -> bool:
        metrics = await running.metrics()
        done = sum(value for name, value in metrics.items() if name.startswith("campaign_stats_records_total"))
        return done == records and metrics[f'campaign_stats_lag_records{{partition="0",topic="{topic}"}}'] == 0

    await eventually(is_read, "everything is read and committed", running, timeout_s=40)


def text(event: Mapping[str, Any], **more: str) -> bytes:
    """An event as JSON; keywords add fields to its data as they stand, also what is no JSON."""
    raw = json.dumps(event)
    for name, value in more.items():
        raw = f'{raw[:-2]}, "{name}": {value}}}}}'
    return raw.encode("utf-8", "surrogatepass")


def without(event: Mapping[str, Any], *names: str) -> bytes:
    """An event that lacks some attributes."""
    return text({name: value for name, value in event.items() if name not in names})


def binary(event: Mapping[str, Any], value: bytes | None = None, **headers: bytes | None) -> Given:
    """An event in binary mode; keywords replace headers."""
    attributes: dict[str, bytes | None] = {
        f"ce_{name}": str(content).encode() for name, content in event.items() if name != "data"
    }
    attributes |= {f"ce_{name}": content for name, content in headers.items()}
    return Given(json.dumps(event["data"]).encode() if value is None else value, None, tuple(attributes.items()))


def unreadable(one: UUID) -> dict[str, list[Given]]:
    """Reason -> what must become a dead letter for it. `one` exists, but nothing here may be taken as its hint."""
    event, request = hint(one), sync_request(one)
    noted = hint(one, note=SECRET)
    structured: dict[str, list[bytes]] = {
        "not_utf8": [
            text(event)[:-2] + b', "x": "\xff"}}',
            text(event)[:-2] + b', "x": "\xc3"}}',
            text(event)[:-2] + b', "x": "\xed\xa0\x80"}}',  # a surrogate as bytes
            text(event).decode().encode("utf-16"),
            b"\x80" * 1000,
            b"\x00\x00\x00\x00\x07\xff\xfe",  # what a schema registry's writer might send
        ],
        "not_json": [
            b"", b" ", b"{oops", b"\x00", b"hello " + SECRET.encode(), b"{}{}", b"[1,]", b"{'a': 1}", b"// {}",
            b"NaN", b"-Infinity", b"[" * DEEP, b"[" * DEEP + b"]" * DEEP, b'{"a":' * DEEP + b"1" + b"}" * DEEP,
            b"\xef\xbb\xbf" + text(event),
            text(event)[:-1], text(event) + b"x", text(event) + b"\x00", text(event).replace(b"sent", b"se\x00nt"),
            text(event, x="NaN"), text(event, x="Infinity"), text(event, x="-Infinity"), text(event, x="1e400"),
            text(event, x="1" + "0" * 5000), text(event, x="01"), text(event, x="+1"), text(event, x=".5"),
            text(event, x="[" * DEEP + "]" * DEEP), text(event, x='"\\ud800" oops'), text(event, x='"\\x41"'),
        ],
        "not_cloudevent": [
            b"null", b"true", b"7", b'"' + SECRET.encode() + b'"', b"[]", b"{}", b"[" + text(event) + b"]",
            without(event, "specversion"), text({**event, "specversion": "0.3"}), text({**event, "specversion": 1.0}),
            without(event, "id"), text({**event, "id": ""}), text({**event, "id": 7}), text({**event, "id": None}),
            without(event, "source"), text({**event, "source": ["a"]}), text({**event, "source": "a\udfff"}),
            without(event, "type"), text({**event, "type": {}}), text({**event, "data_base64": "e30="}),
            text({**event, "id": f"{SECRET}\x00"}), text({**event, "id": "\ud800"}),
            text({**event, "correlationid": "\x00"}), text({**event, "traceparent": "\udc00"}),
            text({**event, "anything": "\x00"}), text({**request, "id": "\x00"}),
        ],
        "unknown_type": [
            text({**event, "type": SECRET}), text({**event, "type": "prospect.status_changed.v0"}),
            text({**event, "type": "prospect.status_changed.v01"}), text({**event, "type": "prospect.status_changed"}),
            text({**event, "type": "prospect.status_changed.v1\n"}), text({**event, "type": "campaign.paused.v1"}),
            text({**event, "type": "Prospect.Status_Changed.v1"}),
            text({**event, "type": "prospect.status_changed.v" + "9" * 5000}),
        ],
        "invalid_campaign_id": [
            without(event, "data"), text({**event, "data": None}), text({**event, "data": []}),
            text({**event, "data": "x"}), text({**event, "data": {}}),
            *(
                text(hint(one, data={"campaign_id": wrong}))
                for wrong in (
                    None, 7, [str(one)], "", SECRET, str(one).replace("-", ""), f"{{{one}}}", f"urn:uuid:{one}",
                    f"{one}\n", f" {one}", f"{one}\x00", "\ud800" + str(one)[1:], str(one)[:-1],
                    "8c2b2d4e-e29b-01d4-a716-446655440000", "8c2b2d4e-e29b-91d4-a716-446655440000",
                    "8c2b2d4e-e29b-41d4-c716-446655440000", "\uff18" + str(one)[1:],
                )
            ),
            text(hint("x", type="prospect.status_changed.v7")), text(sync_request("x")),
        ],
        "invalid_data": [
            *(text(hint(one, data={"to_status": wrong})) for wrong in (None, "", 7, ["sent"], "a\x00", "\ud800")),
            *(text(hint(one, data={"prospect_id": wrong})) for wrong in (None, 7, "", SECRET, f"{one}\n", "\ud800")),
            text(hint(one, data={"from_status": 7})),
            text(sync_request(one, data={"user_id": SECRET})), text(sync_request(one, data={"user_id": 7})),
            text(sync_request(one, data={"user_id": "\x00"})), text(sync_request(one, data={"reason": [SECRET]})),
        ],
    }  # fmt: skip
    in_headers = {
        "not_utf8": [
            binary(noted, id=b"\xff"), binary(noted, note=b"\xff" + SECRET.encode()), binary(noted, b'{"x": "\xff"}'),
        ],
        "not_json": [
            binary(noted, b""), binary(noted, b"NaN"), binary(noted, b"[" * DEEP), binary(noted, b"to_status=sent"),
        ],
        "not_cloudevent": [
            binary(noted, specversion=b"1.1"), binary(noted, specversion=None), binary(noted, id=b""),
            binary(noted, id=b"\x00"), binary(noted, source=None), binary(noted, note=b"\x00"),
            binary(noted, data=b"{}"), binary(noted, data_base64=b"e30="), Given(text(event), None, (("ce_", b""),)),
        ],
        "unknown_type": [binary(noted, type=b"nobody.knows.v1"), binary(noted, type=b"prospect.status_changed.v1 ")],
        "invalid_campaign_id": [
            binary(noted, b"null"), binary(noted, b"[]"), binary(noted, b"{}"), binary(noted, b'"x"'),
            binary(noted, text(event)),
        ],
        "invalid_data": [binary(noted, json.dumps({"campaign_id": str(one)}).encode())],
    }  # fmt: skip
    own = (("x", b"\x00\xff"), ("x", None), ("dead-letter-reason", b"mine"), ("\N{SNOWMAN}", b""), ("", b"empty name"))
    return {
        reason: [
            *(Given(value, b"\xff\x00key" if number % 2 else None, own) for number, value in enumerate(values)),
            *in_headers[reason],
        ]
        for reason, values in structured.items()
    }


async def test_what_can_never_be_read_is_kept_whole_under_its_reason_and_its_neighbours_are_served(
    service: StartService, bus: Bus, db: asyncpg.Connection
) -> None:
    never, neighbours = await add_campaign(db, REFERENCE), [await add_campaign(db, {"sent": n}) for n in range(1, 6)]
    bad = [(reason, one) for reason, some in unreadable(never).items() for one in some]
    bad += bad[:40]  # the same bytes get the same answer each time
    given, reasons = list[Given](), list[str | None]()
    for number, (reason, one) in enumerate(bad):
        if number % 40 == 0:
            given.append(Given(text(hint(neighbours[number // 40 % 5]))))
            reasons.append(None)
        given.append(one)
        reasons.append(reason)
    given.append(Given(text(hint(neighbours[-1]))))
    topic = bus.topics.prefix + "prospect.status-changed"
    await write_batch(bus.bootstrap, topic, given)
    running = await service()
    await all_read(running, topic, len(given))

    letters: dict[int, list[Any]] = {}
    for letter in await bus.read(bus.topics.prefix + "campaign-stats.dead-letters"):
        headers = dict(letter.headers)
        assert (headers["dead-letter-topic"], headers["dead-letter-partition"]) == (topic.encode(), b"0")
        letters.setdefault(int(headers["dead-letter-offset"]), []).append(letter)
    assert sorted(letters) == [offset for offset, reason in enumerate(reasons) if reason is not None]
    for offset, [letter] in letters.items():
        one, headers = given[offset], dict(letter.headers)
        assert headers["dead-letter-reason"].decode() == reasons[offset], (one, headers["dead-letter-error"])
        assert (letter.value, letter.key) == (one.value, one.key)
        assert letter.headers[: len(one.headers)] == one.headers
        assert [name for name, _ in letter.headers[len(one.headers) :]] == [
            f"dead-letter-{name}" for name in ("topic", "partition", "offset", "reason", "error", "time")
        ]
        assert SECRET not in headers["dead-letter-error"].decode()
        assert "\n" not in headers["dead-letter-error"].decode()
    metrics = await running.metrics()
    for name in unreadable(never):
        assert metrics[f'campaign_stats_dead_letters_total{{reason="{name}"}}'] == reasons.count(name)
    for number, campaign_id in enumerate(neighbours, start=1):
        assert await stats_of(db, campaign_id) == {"total": number, "sent": number, "replied": 0, "bounced": 0}
    assert await stats_of(db, never) == {}
    assert SECRET not in "".join(running.raw)
    assert {line["level"] for line in running.logs if line["logger"].startswith("consumer")} == {"info"}


async def test_what_is_odd_but_right_is_served_and_what_asks_for_nothing_is_counted(
    service: StartService, bus: Bus, db: asyncpg.Connection
) -> None:
    campaigns: list[UUID] = []

    async def fresh() -> UUID:
        campaigns.append(await add_campaign(db, {"sent": 1}))
        return campaigns[-1]

    other = uuid4()
    odd = [
        Given(text(hint(await fresh()), x='{"deep": ' + "[" * 500 + "]" * 500 + "}")),
        Given(text(hint(await fresh()), x=str(2**70), y="1e308", z="-0", campaign="1" + "0" * 300)),
        Given(text(hint(await fresh()), x='"\\ud800 \\u0000"', user_id='"\\udfff"')),
        Given(text(hint(other), campaign_id=f'"{await fresh()}"')),  # of two keys the last counts
        Given(text({**hint(await fresh()), "time": [7], "subject": None, "dataschema": {}, "datacontenttype": "x/y"})),
        Given(text(hint(await fresh(), traceparent="broken", correlationid=7, data_base64=None))),
        Given(text(hint(str(await fresh()).upper()))),
        Given(text(hint(await fresh(), data={"user_id": 7, "from_status": None, "to_status": "\U0001f600"}))),
        Given(b"\r\n\t " + text(hint(await fresh())) + b"\n"),
        Given(text(hint(await fresh())), b"\xff\xfe\x00", (("content-type", None), ("\U0001f600", b"\xff"))),
        Given(text(hint(await fresh(), id="\U0001f600" * 5000, source=" "))),
        Given(text(hint(await fresh(), type="prospect.status_changed.v999999999", data={"to_status": {}}))),
        Given(text(sync_request(await fresh(), type="campaign.sync_requested.v2", data={"user_id": 7}))),
        binary(hint(await fresh())),
        binary(hint(await fresh()), **{"\U0001f600": b"x", "": b"y"}),
        Given(text(hint(await fresh())), None, (("Content-Type", b"APPLICATION/CloudEvents+json"), ("ce_id", b"\xff"))),
        Given(text(sync_request(await fresh(), data={"user_id": None, "more": [1]}))),
    ]  # fmt: skip
    nothing = [
        Given(None), Given(None, b"\xff"), Given(None, None, (("ce_id", b"\xff"),)),
        Given(text(hint(uuid4()))), Given(text(hint("00000000-0000-0000-0000-000000000000"))),
        Given(text(hint("ffffffff-ffff-ffff-ffff-ffffffffffff"))),
    ]  # fmt: skip
    topic = bus.topics.prefix + "prospect.status-changed"
    await write_batch(bus.bootstrap, topic, odd + nothing)
    running = await service()
    await all_read(running, topic, len(odd + nothing))
    for campaign_id in campaigns:
        assert await stats_of(db, campaign_id) == expected_stats({"sent": 1}), campaigns.index(campaign_id)
    out = bus.topics.prefix + "campaign.stats-updated"

    async def told() -> bool:
        return {event["subject"] for event in await bus.events(out)} == {str(one) for one in campaigns}

    await eventually(told, "all of them are told", running)
    assert await bus.read(bus.topics.prefix + "campaign-stats.dead-letters") == []
    metrics = await running.metrics()
    counted = {kind: metrics[f'campaign_stats_records_total{{kind="{kind}"}}'] for kind in (
        "status_hint", "newer_version", "sync_request", "tombstone", "dead_letter")}  # fmt: skip
    assert counted == {
        "status_hint": len(odd) - 3 + 3, "newer_version": 2, "sync_request": 1, "tombstone": 3, "dead_letter": 0,
    }  # fmt: skip
    assert metrics["campaign_stats_campaigns_missing_total"] == 3


async def test_requests_for_nobody_and_by_strangers_are_answered_not_found(
    service: StartService, bus: Bus, db: asyncpg.Connection
) -> None:
    own = await add_campaign(db, REFERENCE)
    requests = [
        (sync_request(uuid4()), "not_found"),
        (sync_request("00000000-0000-0000-0000-000000000000"), "not_found"),
        (sync_request("FFFFFFFF-FFFF-FFFF-FFFF-FFFFFFFFFFFF"), "not_found"),
        (sync_request(own, data={"user_id": str(uuid4())}), "not_found"),
        (sync_request(own, data={"user_id": "00000000-0000-0000-0000-000000000000"}), "not_found"),
        (sync_request(own, data={"user_id": str(USER).upper()}), None),
    ]
    topic = bus.topics.prefix + "campaign.sync-requested"
    await write_batch(bus.bootstrap, topic, [Given(text(request)) for request, _ in requests])
    running = await service()

    async def answers() -> dict[str, str | None]:
        found = {
            event["causationid"]: event["data"]["reason"]
            for event in await bus.events(bus.topics.prefix + "campaign.sync-rejected")
        }
        told = await bus.events(bus.topics.prefix + "campaign.stats-updated")
        return found | {event["causationid"]: None for event in told if "causationid" in event}

    async def all_answered() -> bool:
        return await answers() == {request["id"]: reason for request, reason in requests}

    assert await eventually(all_answered, "everybody has the right answer", running)


@pytest.mark.apache_kafka
async def test_hints_in_every_compression_are_served(service: StartService, bus: Bus, db: asyncpg.Connection) -> None:
    topic = bus.topics.prefix + "prospect.status-changed"
    campaigns = []
    for codec in (None, "gzip", "snappy", "lz4", "zstd"):
        some = [await add_campaign(db, {"sent": 1}) for _ in range(3)]
        campaigns += some
        await write_batch(bus.bootstrap, topic, [Given(text(hint(one))) for one in some], codec=codec)
    running = await service()
    await all_read(running, topic, len(campaigns))
    assert await bus.read(bus.topics.prefix + "campaign-stats.dead-letters") == []
    for campaign_id in campaigns:
        assert await stats_of(db, campaign_id) == expected_stats({"sent": 1})


async def own_topics(environment: dict[str, str], bus: Bus, settings: Mapping[str, Mapping[str, str]]) -> Bus:
    """The bus with topics of its own, made with these settings (by name without prefix)."""
    names = Topics(f"own{bus.topics.prefix}")
    environment["CAMPAIGN_STATS_TOPIC_PREFIX"] = names.prefix
    wanted = {name: settings.get(name.removeprefix(names.prefix), {}) for name in names.all}
    await broker.create_topics(broker.Connection(bus.bootstrap, {}), wanted, partitions=1, replication=1)
    return Bus(bus.bootstrap, names)


@pytest.mark.apache_kafka
async def test_five_megabytes_are_served_or_kept_as_a_stub_where_the_dead_letter_topic_takes_less(
    service: StartService, environment: dict[str, str], bus: Bus, db: asyncpg.Connection
) -> None:
    own = await own_topics(environment, bus, {"prospect.status-changed": {"max.message.bytes": str(8 * 2**20)}})
    big, in_headers, after = [await add_campaign(db, {"sent": number}) for number in (1, 2, 3)]
    padding = "x" * 5 * 2**20
    given = [
        Given(text(hint(big, data={"padding": padding}))),
        Given(b"{" + padding.encode(), b"key"),
        Given(text(hint("x", data={"padding": padding})), b"key"),
        binary({**hint(in_headers), "padding": padding}),
        Given(b"{", None, (("padding", padding.encode()),)),
        Given(b"{", padding.encode()),
        Given(text(hint(after))),
    ]
    topic = own.topics.prefix + "prospect.status-changed"
    for one in given:
        await write_batch(bus.bootstrap, topic, [one])
    running = await service()
    await all_read(running, topic, len(given))
    for number, campaign_id in enumerate((big, in_headers, after), start=1):
        assert await stats_of(db, campaign_id) == expected_stats({"sent": number})
    stubs = {}
    for stub in await own.read(own.topics.prefix + "campaign-stats.dead-letters"):
        headers = dict(stub.headers)
        assert (stub.key, stub.value, len(stub.headers)) == (None, b"", 6)
        stubs[headers["dead-letter-offset"]] = headers["dead-letter-reason"]
    assert stubs == {b"1": b"not_json", b"2": b"invalid_campaign_id", b"4": b"not_json", b"5": b"not_json"}


@pytest.mark.apache_kafka
async def test_many_dead_letters_that_their_topic_refuses_hold_nothing_up_and_are_kept_once(
    service: StartService, environment: dict[str, str], bus: Bus, db: asyncpg.Connection
) -> None:
    own = await own_topics(environment, bus, {"campaign-stats.dead-letters": {"max.message.bytes": "2000"}})
    before, after = await add_campaign(db, {"sent": 1}), await add_campaign(db, {"sent": 2})
    bad = [Given(b"{" + b"x" * (3_000 if number % 10 else 10)) for number in range(300)]
    topic = own.topics.prefix + "prospect.status-changed"
    await write_batch(bus.bootstrap, topic, [Given(text(hint(before))), *bad, Given(text(hint(after)))])
    running = await service()
    await all_read(running, topic, len(bad) + 2)
    assert await stats_of(db, before) == expected_stats({"sent": 1})
    assert await stats_of(db, after) == expected_stats({"sent": 2})
    letters = await own.read(own.topics.prefix + "campaign-stats.dead-letters")
    offsets = [int(dict(letter.headers)["dead-letter-offset"]) for letter in letters]
    assert sorted(offsets) == list(range(1, 301))
    for letter, offset in zip(letters, offsets, strict=True):
        assert letter.value == (b"" if (offset - 1) % 10 else bad[offset - 1].value)


@pytest.mark.apache_kafka
async def test_a_batch_with_a_wrong_checksum_becomes_a_stub_and_the_batches_beside_it_are_served(
    service: StartService, environment: dict[str, str], db: asyncpg.Connection, servers_directory: Path
) -> None:
    server = ApacheKafka(servers_directory / "crc-kafka")
    try:
        server.start()
        names = Topics("crc.")
        link = broker.Connection(server.bootstrap, {})
        await broker.create_topics(link, {name: {} for name in names.all}, partitions=1, replication=1)
        environment |= {"KAFKA_BOOTSTRAP_SERVERS": server.bootstrap, "CAMPAIGN_STATS_TOPIC_PREFIX": names.prefix}
        before, broken, after = [await add_campaign(db, {"sent": number}) for number in (1, 2, 3)]
        topic = names.prefix + "prospect.status-changed"
        await write_batch(server.bootstrap, topic, [Given(text(hint(before)))])
        await write_batch(server.bootstrap, topic, [Given(text(hint(broken, id="flip me"))) for _ in range(3)])
        await write_batch(server.bootstrap, topic, [Given(text(hint(after)))])
        server.stop()  # in order, so that the broker looks into no segment when it starts again
        [segment] = (server.directory / "log" / f"{topic}-0").glob("*.log")
        content = segment.read_bytes()
        assert content.count(b"flip me") == 3
        segment.write_bytes(content.replace(b"flip me", b"flap me", 1))
        server.start()
        running = await service()
        await eventually(lambda: _has(db, after, 3), "what comes after is served", running, timeout_s=40)
        assert await stats_of(db, before) == expected_stats({"sent": 1})
        assert await stats_of(db, broken) == {}
        own = Bus(server.bootstrap, names)
        [stub] = await own.read(names.prefix + "campaign-stats.dead-letters")
        headers = dict(stub.headers)
        assert (stub.key, stub.value, headers["dead-letter-reason"]) == (None, b"", b"unreadable")
        assert (headers["dead-letter-topic"], headers["dead-letter-partition"]) == (topic.encode(), b"0")
        assert headers["dead-letter-offset"] == b"1-3"
        assert (await running.metrics())['campaign_stats_dead_letters_total{reason="unreadable"}'] == 1
        running.terminate()
        assert await running.wait() == 0
        sweeping = await service(sweep_interval_s=0.2)
        await eventually(lambda: _has(db, broken, 2), "the sweep repairs what it said", sweeping)
        assert len(await own.read(names.prefix + "campaign-stats.dead-letters")) == 1
        sweeping.terminate()
        assert await sweeping.wait() == 0
    finally:
        await asyncio.to_thread(server.stop)


async def _has(db: asyncpg.Connection, campaign_id: UUID, sent: int) -> bool:
    return bool(await stats_of(db, campaign_id) == expected_stats({"sent": sent}))
