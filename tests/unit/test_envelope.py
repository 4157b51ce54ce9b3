"""Bytes to events and back: every documented reason, both modes, and what must never happen whatever the bytes are."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, timezone
from uuid import UUID

import orjson
import pytest
from cloudevents.core.bindings.kafka import KafkaMessage, from_structured_event
from cloudevents.core.formats.json import JSONFormat
from hypothesis import given
from hypothesis import strategies as st

from consumer.envelope import (
    PLAIN_BYTES,
    Cause,
    DeadLetter,
    Decoded,
    Hints,
    Ignored,
    StatusHint,
    SyncRequest,
    dead_letter_headers,
    decode,
    encode,
    format_time,
    stub_headers,
)
from schemas.events import STATUS_CHANGED, SYNC_REQUESTED, DeadLetterReason

CAMPAIGN = "8c2b2d4e-e29b-41d4-a716-446655440000"
PROSPECT = "22222222-2222-2222-2222-222222222222"
USER = "11111111-1111-1111-1111-111111111111"
TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
NOW = datetime(2026, 4, 18, 15, 12, 0, 250_000, tzinfo=UTC)
ABSENT = object()
Headers = Sequence[tuple[str, bytes]]


@dataclass(frozen=True)
class Bytes:
    """A record as Kafka hands it out."""

    value: bytes | None
    headers: Headers = ()
    topic: str = "prospect.status-changed"
    partition: int = 3
    offset: int = 41
    key: bytes | None = None
    timestamp: int = 0


def merged(valid: dict[str, object], changes: dict[str, object]) -> dict[str, object]:
    return {name: value for name, value in {**valid, **changes}.items() if value is not ABSENT}


def hint_data(**changes: object) -> dict[str, object]:
    valid: dict[str, object] = {"campaign_id": CAMPAIGN, "prospect_id": PROSPECT, "to_status": "sent"}
    return merged(valid, changes)


def hint(**changes: object) -> dict[str, object]:
    valid: dict[str, object] = {
        "specversion": "1.0",
        "id": "h-1",
        "source": "engine",
        "type": STATUS_CHANGED,
        "data": hint_data(),
    }
    return merged(valid, changes)


def request(**data: object) -> dict[str, object]:
    return hint(type=SYNC_REQUESTED, data=merged({"campaign_id": CAMPAIGN}, data))


def structured(event: object) -> Bytes:
    return Bytes(json.dumps(event).encode())  # the standard library also writes NaN and lone surrogates


def binary(event: dict[str, object]) -> Bytes:
    attributes = [(f"ce_{name}", str(value).encode()) for name, value in event.items() if name != "data"]
    return Bytes(json.dumps(event["data"]).encode(), [*attributes, ("content-type", b"application/json")])


def one(record: Bytes) -> Decoded:
    [decoded] = decode([record])
    assert_collected_alike([record])
    assert_collected_alike([structured(hint(id="before")), record, structured(hint(id="after"))])
    return decoded


def assert_collected_alike(records: Sequence[Bytes]) -> None:
    """The hot path says of these records what `decode` says."""
    collected, one_by_one = Hints(), Hints()
    plain, others = collected.collect(records)
    decoded = decode(records)
    hints = [event for event in decoded if isinstance(event, StatusHint)]
    for event in hints:
        one_by_one.keep_last(event)
    assert collected.settled() == one_by_one.settled()
    told = {id(record): event for record, event in others}
    assert plain == len(records) - len(told)
    for record, said in zip(records, decoded, strict=True):
        if id(record) in told:
            assert told[id(record)] == said
        else:
            assert isinstance(said, StatusHint)
            assert not said.newer


def reason(record: Bytes) -> str:
    decoded = one(record)
    return decoded.reason if isinstance(decoded, DeadLetter) else type(decoded).__name__


GOOD_IDS = [
    *(f"8c2b2d4e-e29b-{version}1d4-a716-446655440000" for version in range(1, 9)),
    *(f"8c2b2d4e-e29b-41d4-{variant}716-446655440000" for variant in "89abAB"),
    CAMPAIGN.upper(),
    "00000000-0000-0000-0000-000000000000",
    "ffffffff-ffff-ffff-ffff-ffffffffffff",
    "FFFFFFFF-FFFF-FFFF-FFFF-FFFFFFFFFFFF",
]
BAD_IDS: list[object] = [
    "8c2b2d4e-e29b-01d4-a716-446655440000",  # version 0
    "8c2b2d4e-e29b-91d4-a716-446655440000",  # version 9
    "8c2b2d4e-e29b-41d4-7716-446655440000",  # not the RFC variant
    "8c2b2d4e-e29b-41d4-c716-446655440000",
    CAMPAIGN + "\n",
    " " + CAMPAIGN,
    CAMPAIGN.replace("-", ""),
    "{" + CAMPAIGN + "}",
    "urn:uuid:" + CAMPAIGN,
    "٨c2b2d4e-e29b-41d4-a716-446655440000",  # a digit, but no ASCII
    CAMPAIGN[:-1] + "\x00",
    CAMPAIGN[:-1] + "\ud800",
    "",
    5,
    None,
    [CAMPAIGN],
    {"id": CAMPAIGN},
    ABSENT,
]


@pytest.mark.parametrize("campaign_id", GOOD_IDS)
@pytest.mark.parametrize("mode", [structured, binary])
def test_a_campaign_id_of_rfc_9562_is_taken(mode: Callable[[dict[str, object]], Bytes], campaign_id: str) -> None:
    assert one(mode(hint(data=hint_data(campaign_id=campaign_id)))) == StatusHint(
        UUID(campaign_id), Cause("h-1", "h-1", None)
    )
    decoded = one(mode(request(campaign_id=campaign_id)))
    assert isinstance(decoded, SyncRequest)
    assert decoded.campaign_id == UUID(campaign_id)


@pytest.mark.parametrize("campaign_id", BAD_IDS)
@pytest.mark.parametrize("type_", [STATUS_CHANGED, SYNC_REQUESTED, "prospect.status_changed.v2"])
def test_any_other_campaign_id_is_refused(type_: str, campaign_id: object) -> None:
    event = hint(type=type_, data=hint_data(campaign_id=campaign_id))
    assert reason(structured(event)) == "invalid_campaign_id"
    assert reason(binary(event)) == "invalid_campaign_id"


@pytest.mark.parametrize("data", [ABSENT, None, 5, "text", [hint_data()], {}])
def test_data_that_is_no_object_has_no_campaign_id(data: object) -> None:
    assert reason(structured(hint(data=data))) == "invalid_campaign_id"


REFUSED_BYTES = [
    (b"", "not_json"),
    (b" ", "not_json"),
    (b"{", "not_json"),
    (b"{}{}", "not_json"),
    (b"{'id': 1}", "not_json"),
    (json.dumps(hint()).encode() + b"\x00", "not_json"),
    (b"\xef\xbb\xbf" + json.dumps(hint()).encode(), "not_json"),
    (json.dumps(hint()).encode("utf-16-le"), "not_json"),
    (json.dumps(hint()).encode("utf-16"), "not_utf8"),
    (b"\xff", "not_utf8"),
    (json.dumps(hint()).encode() + b"\xff", "not_utf8"),
    (b'{"a":"\xed\xa0\x80"}', "not_utf8"),  # a surrogate spelt in bytes
    (b'{"a":NaN,"b":"\xff"}', "not_utf8"),  # the first reason in the documented order
    (b"NaN", "not_json"),
    (b'{"a":"tab\t"}', "not_json"),
    (b"[" * 100_000 + b"]" * 100_000, "not_json"),
    (b"[]", "not_cloudevent"),
    (b"null", "not_cloudevent"),
    (b"5", "not_cloudevent"),
    (b'"text"', "not_cloudevent"),
    (b"{}", "not_cloudevent"),
    (json.dumps([hint()]).encode(), "not_cloudevent"),  # batch mode
]


@pytest.mark.parametrize(("value", "expected"), REFUSED_BYTES)
def test_bytes_that_are_no_event_get_the_documented_reason(value: bytes, expected: str) -> None:
    assert reason(Bytes(value)) == expected


@pytest.mark.parametrize("constant", [b"NaN", b"Infinity", b"-Infinity"])
def test_nan_and_infinity_are_not_json_even_in_a_field_nobody_looks_at(constant: bytes) -> None:
    value = json.dumps(hint()).encode().replace(b'"to_status"', b'"x":' + constant + b',"to_status"')
    assert reason(Bytes(value)) == "not_json"
    assert reason(Bytes(value.replace(b'"x"', b'"y":"\\ud800","x"'))) == "not_json"  # a lone surrogate hides nothing


NO_CLOUDEVENTS = [
    *({name: wrong} for name in ("id", "source", "type") for wrong in (ABSENT, None, "", 5, [], "a\x00b", "a\ud800b")),
    *({"specversion": wrong} for wrong in (ABSENT, None, "", "0.3", "1.0\n", 1.0)),
    {"data_base64": "e30="},
    {"data": ABSENT, "data_base64": "e30="},
    *(
        {name: wrong}
        for name in ("correlationid", "causationid", "traceparent")
        for wrong in ("\x00", "\ud800", "a\udfff")
    ),
    {"type": "", "id": ABSENT},
    {"source": "", "type": "nobody.knows.v1"},  # the envelope comes before the type
]


@pytest.mark.parametrize("changes", NO_CLOUDEVENTS)
def test_what_is_no_cloudevent_is_refused(changes: dict[str, object]) -> None:
    assert reason(structured(hint(**changes))) == "not_cloudevent"


@pytest.mark.parametrize(
    "type_",
    [
        "campaign.stats_updated.v1",
        "prospect.status_changed",
        "prospect.status_changed.v0",
        "prospect.status_changed.v01",
        "prospect.status_changed.v2.1",
        "prospect.status_changed.v1\n",
        "prospect.status_changed.v٢",
        "Prospect.Status_Changed.v1",
        "prospect-status_changed.v1",
    ],
)
def test_an_unknown_type_is_refused_whatever_its_data(type_: str) -> None:
    assert reason(structured(hint(type=type_))) == "unknown_type"
    assert reason(structured(hint(type=type_, data=ABSENT))) == "unknown_type"


@pytest.mark.parametrize(
    "type_", ["prospect.status_changed.v2", "campaign.sync_requested.v7", "prospect.status_changed.v12"]
)
def test_a_newer_version_is_a_hint_if_it_names_a_campaign(type_: str) -> None:
    event = hint(type=type_, data={"campaign_id": CAMPAIGN, "prospect_id": 5}, correlationid="c")
    cause = None if "sync" in type_ else Cause("h-1", "c", None)  # a request's id stands in its answers only
    expected = StatusHint(UUID(CAMPAIGN), cause, newer=True)
    assert one(structured(event)) == one(binary(event)) == expected


INVALID_HINTS = [
    *({"to_status": wrong} for wrong in (ABSENT, None, "", 5, ["sent"], "a\x00", "a\ud800")),
    *(
        {"prospect_id": wrong}
        for wrong in (ABSENT, None, "", 5, "x", PROSPECT + "\n", PROSPECT[:-1], f"{{{PROSPECT}}}")
    ),
    *({"from_status": wrong} for wrong in (5, ["sent"], {"sent": 1})),
]


@pytest.mark.parametrize("changes", INVALID_HINTS)
def test_a_hint_against_its_schema_is_invalid_data(changes: dict[str, object]) -> None:
    event = hint(data=hint_data(**changes))
    assert reason(structured(event)) == reason(binary(event)) == "invalid_data"


@pytest.mark.parametrize(
    "changes",
    [
        *({"user_id": anything} for anything in (5, "x", None, ["x"], "a\x00", "\ud800")),
        {"from_status": None},
        {"from_status": "pending"},
        {"to_status": "a status of next year"},
        {"prospect_id": "ABCDEF00-2222-f222-0222-222222222222"},
        {"unknown": {"deep": [1, None, "a\x00", "\ud800"]}},
        {"\ud800": 1},
    ],
)
def test_what_a_hint_carries_besides_does_not_matter(changes: dict[str, object]) -> None:
    event = hint(data=hint_data(**changes))
    expected = StatusHint(UUID(CAMPAIGN), Cause("h-1", "h-1", None))
    assert one(structured(event)) == one(binary(event)) == expected


@pytest.mark.parametrize(
    "changes",
    [
        *({"time": anything} for anything in ("2026-01-01T00:00:00Z", "yesterday", "", 5, None, "\x00", "\ud800")),
        *({"datacontenttype": anything} for anything in ("text/plain", "application/xml", 5)),
        {"dataschema": "a\x00"},
        {"subject": "another campaign"},
        {"subject": None},
        {"partitionkey": "x", "sequence": 5},
        {"causationid": "x"},
    ],
)
def test_what_the_envelope_carries_besides_does_not_matter(changes: dict[str, object]) -> None:
    assert one(structured(hint(**changes))) == StatusHint(UUID(CAMPAIGN), Cause("h-1", "h-1", None))


@pytest.mark.parametrize("user_id", [USER, USER.upper(), None, ABSENT])
def test_a_sync_request_keeps_its_asker(user_id: object) -> None:
    expected = UUID(user_id) if isinstance(user_id, str) else None
    assert one(structured(request(user_id=user_id, reason="why not", more=1))) == SyncRequest(
        UUID(CAMPAIGN), expected, "engine", Cause("h-1", "h-1", None)
    )


@pytest.mark.parametrize(
    "changes",
    [
        *({"user_id": wrong} for wrong in ("", "x", 5, [USER], USER + "\n", USER + "\x00")),
        {"reason": 5},
        {"reason": []},
    ],
)
def test_a_sync_request_against_its_schema_is_invalid_data(changes: dict[str, object]) -> None:
    assert reason(structured(request(**changes))) == "invalid_data"


@pytest.mark.parametrize(
    ("extensions", "expected"),
    [
        ({}, Cause("h-1", "h-1", None)),
        ({"correlationid": "c"}, Cause("h-1", "c", None)),
        ({"correlationid": ""}, Cause("h-1", "h-1", None)),
        ({"correlationid": None}, Cause("h-1", "h-1", None)),
        ({"traceparent": TRACE}, Cause("h-1", "h-1", TRACE)),
        ({"traceparent": TRACE, "correlationid": "c", "causationid": "older"}, Cause("h-1", "c", TRACE)),
        *(
            ({"traceparent": broken}, Cause("h-1", "h-1", None))
            for broken in ("", "x", TRACE + "\n", TRACE.upper(), TRACE[3:], 5, None, "00-" + "0" * 32 + TRACE[35:])
        ),
    ],
)
def test_ids_travel_and_broken_tracing_does_not_kill_a_good_event(
    extensions: dict[str, object], expected: Cause
) -> None:
    assert one(structured(hint(**extensions))) == StatusHint(UUID(CAMPAIGN), expected)
    decoded = one(structured({**request(), **extensions}))
    assert isinstance(decoded, SyncRequest)
    assert decoded.cause == expected


def test_a_null_value_is_a_tombstone_in_both_modes() -> None:
    assert one(Bytes(None)) == one(Bytes(None, [("ce_id", b"\xff")])) == Ignored("tombstone")


@pytest.mark.parametrize(
    "content_type", [b"application/json", b"text/plain", b"application/cloudevents-batch+json", b"\xff"]
)
def test_without_ce_headers_the_value_is_structured_whatever_the_content_type(content_type: bytes) -> None:
    headers = [("content-type", content_type), ("CE_ID", b"\xff"), ("trace", b"\xff")]
    assert reason(Bytes(json.dumps(hint()).encode(), headers)) == "StatusHint"
    assert reason(Bytes(json.dumps([hint()]).encode(), headers)) == "not_cloudevent"


@pytest.mark.parametrize("topic", ["campaign.sync-requested", "prospect.status-changed", "elsewhere"])
def test_the_type_decides_not_the_topic(topic: str) -> None:
    assert reason(Bytes(json.dumps(hint()).encode(), topic=topic)) == "StatusHint"
    assert reason(Bytes(json.dumps(request()).encode(), topic=topic)) == "SyncRequest"


GOOD = binary(hint())


@pytest.mark.parametrize(
    ("value", "more", "expected"),
    [
        (GOOD.value, [("ce_time", b"yesterday"), ("ce_more", "käse".encode())], "StatusHint"),
        (GOOD.value, [("content-type", b"application/xml")], "StatusHint"),
        (GOOD.value, [("ce_type", SYNC_REQUESTED.encode())], "SyncRequest"),  # of two the last counts
        (GOOD.value, [("ce_id", b"")], "not_cloudevent"),
        (GOOD.value, [("ce_id", b"a\x00")], "not_cloudevent"),
        (GOOD.value, [("ce_specversion", b"0.3")], "not_cloudevent"),
        (GOOD.value, [("ce_data", b"{}")], "not_cloudevent"),
        (GOOD.value, [("ce_data_base64", b"e30=")], "not_cloudevent"),
        (GOOD.value, [("ce_id", b"\xff")], "not_utf8"),
        (GOOD.value, [("other", b"\xff")], "StatusHint"),
        (GOOD.value, [("ce_type", b"nobody.knows.v1")], "unknown_type"),
        (b"", [], "not_json"),
        (b"<xml/>", [], "not_json"),
        (b"\xff", [], "not_utf8"),
        (b"\xff", [("ce_id", b"")], "not_utf8"),
        (b"{", [("ce_type", b"nobody.knows.v1")], "not_json"),
        (b"[]", [], "invalid_campaign_id"),
        (b'{"data":{}}', [], "invalid_campaign_id"),
    ],
)
def test_binary_mode_reads_attributes_from_headers_and_data_from_the_value(
    value: bytes, more: list[tuple[str, bytes]], expected: str
) -> None:
    assert reason(Bytes(value, [*GOOD.headers, *more])) == expected


def test_a_ce_header_without_a_value_is_absent() -> None:
    headers: list[tuple[str, bytes]] = [*GOOD.headers, ("ce_id", None)]  # type: ignore[list-item]  # Kafka allows it
    assert reason(Bytes(GOOD.value, headers)) == "not_cloudevent"


@pytest.mark.parametrize("name", ["specversion", "id", "source", "type"])
def test_binary_mode_needs_every_required_attribute(name: str) -> None:
    assert reason(binary(hint(**{name: ABSENT}))) == "not_cloudevent"


def test_of_two_equal_keys_the_last_counts() -> None:
    value = json.dumps(hint()).encode().replace(b'"id": "h-1"', b'"id": 5, "id": "h-2"')
    assert one(Bytes(value)) == StatusHint(UUID(CAMPAIGN), Cause("h-2", "h-2", None))


@pytest.mark.parametrize("size", [1, 5_000_000])
def test_a_valid_event_of_any_size_is_served(size: int) -> None:
    assert reason(structured(hint(data=hint_data(more="a" * size)))) == "StatusHint"
    assert reason(structured(hint(id="a" * size))) == "StatusHint"
    assert reason(structured(hint(more="a" * size))) == "StatusHint"


@pytest.mark.parametrize(
    "bad", [b"\xff", b"{", json.dumps(hint(data=hint_data(to_status=""))).encode(), b"[1,2", b'"}],[{"']
)
def test_neighbours_of_a_bad_record_are_served_in_their_places(bad: bytes) -> None:
    places = {0, 7, 198, 199, 200, 201, 555}
    records = [Bytes(bad) if place in places else structured(hint(id=f"h-{place}")) for place in range(600)]
    decoded = decode(records)
    assert len(decoded) == 600
    assert {place for place, event in enumerate(decoded) if isinstance(event, DeadLetter)} == places
    served = [event.cause.id for event in decoded if isinstance(event, StatusHint) and event.cause]
    assert served == [f"h-{place}" for place in range(600) if place not in places]


def test_two_broken_records_do_not_become_one_good_one() -> None:
    value = json.dumps(hint()).encode()
    assert [type(event) for event in decode([Bytes(value[:50]), Bytes(value[50:])])] == [DeadLetter, DeadLetter]


def test_nothing_to_decode_is_nothing() -> None:
    assert decode([]) == []


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(exclude_categories=())),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
some_headers = st.lists(
    st.tuples(st.sampled_from(["ce_id", "ce_type", "ce_specversion", "x"]) | st.text(), st.binary())
)


@given(st.lists(st.tuples(st.none() | st.binary(), some_headers), max_size=6))
def test_random_bytes_never_raise(records: list[tuple[bytes | None, list[tuple[str, bytes]]]]) -> None:
    given = [Bytes(value, headers) for value, headers in records]
    assert len(decode(given)) == len(records)
    assert_collected_alike(given)


@given(
    st.dictionaries(st.sampled_from([*hint(), "data_base64", "correlationid", "traceparent", "time", "x"]), anything),
    st.dictionaries(st.sampled_from([*hint_data(), "user_id", "from_status", "reason", "x"]), anything),
    st.sampled_from([STATUS_CHANGED, SYNC_REQUESTED, "prospect.status_changed.v2"]),
)
def test_random_json_never_raises_and_neighbours_change_nothing(
    attributes: dict[str, object], data: dict[str, object], type_: str
) -> None:
    record = structured({**hint(type=type_, data=hint_data(**data)), **attributes})
    alone = one(record)
    [beside_bad, _, beside_good, _] = decode(
        [record, structured(hint(data=hint_data(to_status=5))), record, structured(hint())]
    )
    assert alone == beside_bad == beside_good


MEMBERS = ["time", "subject", "user_id", "data_base64", "x", "correlationid", "traceparent", "id"]
PIECES = [
    "1e999",
    "1" * 400,
    "null",
    "[]",
    '"\\u0000"',
    '"\\ud800"',
    "{}",
    '"a"',
    '""',
    "01",
    '"\\""',
    '"' + TRACE + '"',
]
ODD_BYTES = [
    b"\x00",
    b"\n",
    b"\xff",
    b"\xed\xa0\x80",
    b"\xc3\xa9",
    b" ",
    b",",
    b"}",
    b'"',
    b"\\",
    b"\x1f",
    b"\xef\xbb\xbf",
]


@st.composite
def nearly_plain(draw: st.DrawFn) -> Bytes:
    """A plain hint of one of a few campaigns, some of them with a member more and a few bytes changed."""
    campaign = draw(st.sampled_from([CAMPAIGN, CAMPAIGN.upper(), USER, PROSPECT[:-1] + "3", ""]))
    value = json.dumps(hint(id=draw(st.sampled_from(["h-1", "h-2"])), data=hint_data(campaign_id=campaign))).encode()
    if draw(st.booleans()):
        member = f'"{draw(st.sampled_from(MEMBERS))}": {draw(st.sampled_from(PIECES))},'.encode()
        at = draw(st.sampled_from([1, value.index(b'{"campaign_id') + 1]))
        value = value[:at] + member + value[at:]
    for _ in range(draw(st.sampled_from([0, 0, 1, 2]))):
        at = draw(st.integers(0, len(value)))
        value = value[:at] + draw(st.sampled_from([b"", *ODD_BYTES])) + value[at + draw(st.integers(0, 2)) :]
    return Bytes(value, draw(st.sampled_from([(), (), (), [("x", b"y")], [("ce_id", b"i")]])))


@given(st.lists(nearly_plain(), max_size=8))
def test_the_hot_path_says_what_the_careful_path_says(records: list[Bytes]) -> None:
    assert_collected_alike(records)


@pytest.mark.parametrize("more", [{}, {"time": "x", "subject": "y", "correlationid": "z", "traceparent": TRACE}])
def test_a_plain_hint_takes_the_hot_path(more: dict[str, object]) -> None:
    assert Hints().collect([structured(hint(**more))]) == (1, [])


@pytest.mark.parametrize("first", [f"{PROSPECT},{PROSPECT}", PROSPECT[:-1], PROSPECT[:-1] + ",", ""])
@pytest.mark.parametrize("second", ["", PROSPECT, "0" + PROSPECT, PROSPECT[:-1] + "\n"])
def test_the_ids_of_neighbours_do_not_make_up_for_each_other(first: str, second: str) -> None:
    records = [structured(hint(data=hint_data(prospect_id=prospect))) for prospect in (first, second)]
    assert_collected_alike(records)
    assert Hints().collect(records)[0] == [first, second].count(PROSPECT)


def test_a_long_hint_is_not_kept_whole() -> None:
    record = structured(hint(source="/" + "s" * PLAIN_BYTES))
    hints = Hints()
    plain, [(_, told)] = hints.collect([record])
    assert (plain, hints.settled()) == (0, {told.campaign_id: told.cause} if isinstance(told, StatusHint) else None)


CANARY = "qzxjkvwpy"  # occurs in no message of ours


@pytest.mark.parametrize(
    "event",
    [
        *(hint(**{name: wrong}) for name in hint() for wrong in (CANARY, CANARY + "\x00", [CANARY], {CANARY: CANARY})),
        *(
            hint(data=hint_data(**{name: w}))
            for name in hint_data()
            for w in (CANARY + "\x00", [CANARY], {CANARY: CANARY})
        ),
        *(
            request(**{name: wrong})
            for name in ("user_id", "reason")
            for wrong in (CANARY + "\x00", [CANARY], {CANARY: 1})
        ),
        hint(data_base64=CANARY),
        hint(correlationid=CANARY + "\ud800"),
        [CANARY],
        CANARY,
    ],
)
def test_the_error_never_contains_what_was_sent(event: object) -> None:
    for record in (
        structured(event),
        Bytes(json.dumps(event).encode()[:-1]),
        Bytes(json.dumps(event).encode() + b"\xff"),
    ):
        decoded = one(record)
        if isinstance(decoded, DeadLetter):
            assert CANARY not in decoded.error


@pytest.mark.parametrize(
    ("event", "path"),
    [
        (hint(specversion="2"), "$.specversion"),
        (hint(id=""), "$.id"),
        (hint(source=5), "$.source"),
        (hint(type="x"), "$.type"),
        (hint(data_base64="x"), "$.data_base64"),
        (hint(correlationid="\x00"), "$.correlationid"),
        (hint(data={}), "$.data.campaign_id"),
        (hint(data=hint_data(to_status="")), "$.data.to_status"),
        (hint(data=hint_data(prospect_id="x")), "$.data.prospect_id"),
        (request(user_id="x"), "$.data.user_id"),
    ],
)
def test_the_error_names_the_path(event: dict[str, object], path: str) -> None:
    decoded = one(structured(event))
    assert isinstance(decoded, DeadLetter)
    assert decoded.error.startswith(path + ":")


causes = st.builds(
    Cause,
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), min_size=1),
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), min_size=1),
    st.none() | st.just(TRACE),
)


@given(causes, st.uuids(), st.none() | st.uuids())
def test_causes_and_requests_survive_json(cause: Cause, campaign_id: UUID, user_id: UUID | None) -> None:
    request = SyncRequest(campaign_id, user_id, "engine", cause)
    assert SyncRequest.from_json(json.loads(json.dumps(request.to_json()))) == request
    assert Cause.from_json(orjson.loads(orjson.dumps(cause.to_json()))) == cause


@given(causes, st.uuids(version=4), st.none() | st.uuids())
def test_what_is_encoded_is_decoded_in_both_modes(cause: Cause, campaign_id: UUID, user_id: UUID | None) -> None:
    data = {"campaign_id": str(campaign_id), "user_id": user_id and str(user_id)}
    value = encode(type=SYNC_REQUESTED, id=cause.id, time=NOW, subject=str(campaign_id), data=data, cause=cause)
    expected = SyncRequest(
        campaign_id, user_id, "campaign-stats", Cause(cause.id, cause.correlation_id, cause.traceparent)
    )
    assert one(Bytes(value)) == one(binary(orjson.loads(value))) == expected


def test_encoded_attributes_have_a_fixed_order_and_data_keeps_its_own() -> None:
    data = {"zebra": 1, "campaign_id": CAMPAIGN, "apple": {"total": 1, "sent": 0}}
    cause = Cause("r-1", "c-1", TRACE)
    assert encode(type="t.v1", id="1", time=NOW, subject=CAMPAIGN, data=data, cause=cause).decode() == (
        '{"specversion":"1.0","id":"1","source":"campaign-stats","type":"t.v1","time":"2026-04-18T15:12:00.250000Z",'
        f'"subject":"{CAMPAIGN}","datacontenttype":"application/json","causationid":"r-1","correlationid":"c-1",'
        f'"traceparent":"{TRACE}","data":{{"zebra":1,"campaign_id":"{CAMPAIGN}","apple":{{"total":1,"sent":0}}}}}}'
    )


def test_without_a_cause_or_a_trace_their_attributes_are_left_out() -> None:
    def keys(cause: Cause | None) -> list[str]:
        event = orjson.loads(encode(type="t.v1", id="1", time=NOW, subject=CAMPAIGN, data={}, cause=cause))
        return list(event)[7:]

    assert keys(None) == ["data"]
    assert keys(Cause("r-1", "r-1", None)) == ["causationid", "correlationid", "data"]


def test_an_independent_reader_reads_what_we_write() -> None:
    data: dict[str, object] = {"campaign_id": CAMPAIGN, "reason": "not_found"}
    value = encode(type="t.v1", id="1", time=NOW, subject=CAMPAIGN, data=data, cause=Cause("r-1", "c-1", TRACE))
    headers = {"content-type": b"application/cloudevents+json"}
    event = from_structured_event(KafkaMessage(headers=headers, key=CAMPAIGN.encode(), value=value), JSONFormat())
    assert (event.get_id(), event.get_source(), event.get_type()) == ("1", "campaign-stats", "t.v1")
    assert (event.get_specversion(), event.get_subject(), event.get_time()) == ("1.0", CAMPAIGN, NOW)
    assert event.get_datacontenttype() == "application/json"
    assert event.get_data() == data
    extensions = {name: event.get_extension(name) for name in ("causationid", "correlationid", "traceparent")}
    assert extensions == {"causationid": "r-1", "correlationid": "c-1", "traceparent": TRACE}


@pytest.mark.parametrize(
    ("moment", "text"),
    [
        (datetime(2026, 4, 18, 15, 12, tzinfo=UTC), "2026-04-18T15:12:00Z"),
        (datetime(2026, 4, 18, 15, 12, 0, 1, tzinfo=UTC), "2026-04-18T15:12:00.000001Z"),
        (datetime(2026, 4, 18, 15, 12, 0, 500_000, tzinfo=UTC), "2026-04-18T15:12:00.500000Z"),
        (datetime(2026, 4, 18, 1, 12, tzinfo=timezone(timedelta(hours=2))), "2026-04-17T23:12:00Z"),
        (datetime(999, 1, 1, tzinfo=UTC), "0999-01-01T00:00:00Z"),
    ],
)
def test_times_are_utc_with_a_fraction_only_if_not_zero(moment: datetime, text: str) -> None:
    assert format_time(moment) == text


def test_a_dead_letter_keeps_its_headers_and_gets_ours() -> None:
    record = Bytes(b"x", [("a", b"\xff"), ("a", b"2")], topic="in", partition=7, offset=99)
    letter = DeadLetter(DeadLetterReason.NOT_JSON, "line 1: expected JSON")
    ours = [
        ("dead-letter-topic", b"in"),
        ("dead-letter-partition", b"7"),
        ("dead-letter-offset", b"99"),
        ("dead-letter-reason", b"not_json"),
        ("dead-letter-error", b"line 1: expected JSON"),
        ("dead-letter-time", b"2026-04-18T15:12:00.250000Z"),
    ]
    assert dead_letter_headers(record, letter, NOW) == [("a", b"\xff"), ("a", b"2"), *ours]
    assert stub_headers("in", 7, 99, 99, letter, NOW) == ours
    assert stub_headers("in", 7, 99, 101, letter, NOW)[2] == ("dead-letter-offset", b"99-101")


def nested(depth: int, more: bytes = b"") -> Bytes:
    value = json.dumps(hint()).encode().replace(b'"to_status"', b'"x":' + b"[" * depth + b"]" * depth + b',"to_status"')
    return Bytes(value.replace(b'"x":', more + b'"x":'))


def deep_in_the_stack(frames: int, record: Bytes) -> str:
    return deep_in_the_stack(frames - 1, record) if frames else reason(record)


@pytest.mark.parametrize("more", [b"", b'"y":"\\ud800",', b'"y":"\\\\\\ud800\\ud83d\\ude00",'])
@pytest.mark.parametrize(("depth", "expected"), [(100, "StatusHint"), (980, "StatusHint"), (1_100, "not_json")])
def test_deep_nesting_gets_the_same_answer_wherever_it_is_decoded(depth: int, expected: str, more: bytes) -> None:
    assert reason(nested(depth, more)) == deep_in_the_stack(400, nested(depth, more)) == expected


@pytest.mark.parametrize("number", [b"1e999", b"-1e999", b"9" * 5_000, b"9" * 400])
def test_numbers_too_huge_for_the_parser_are_not_json(number: bytes) -> None:
    value = json.dumps(hint()).encode().replace(b'"to_status"', b'"x":' + number + b',"to_status"')
    assert reason(Bytes(value)) == reason(Bytes(value.replace(b'"x"', b'"y":"\\ud800","x"'))) == "not_json"


@pytest.mark.parametrize(
    ("escaped", "expected"),
    [
        (rb"\ud83d\ude00", "StatusHint"),  # a pair
        (rb"\\ud800", "StatusHint"),  # a backslash, then letters
        (rb"\\\ud800", "not_cloudevent"),
        (rb"\uD83D\uD83D\uDE00", "not_cloudevent"),
        (rb"\udc00", "not_cloudevent"),
        (rb"\ud800\n", "not_cloudevent"),
        (rb"\ud80", "not_json"),
        (rb"\ud800\x", "not_json"),
    ],
)
def test_lone_surrogates_are_found_among_other_escapes(escaped: bytes, expected: str) -> None:
    assert reason(Bytes(json.dumps(hint()).encode().replace(b"h-1", escaped))) == expected


def test_a_null_data_base64_is_absent() -> None:
    assert reason(structured(hint(data_base64=None))) == "StatusHint"


def test_ce_headers_beside_a_cloudevents_content_type_are_copies() -> None:
    headers = [("ce_type", b"x"), ("Content-Type", b"application/cloudevents+json; charset=UTF-8")]
    assert reason(Bytes(json.dumps(hint()).encode(), headers)) == "StatusHint"


@pytest.mark.parametrize(
    ("event", "place"),
    [
        (hint(id=""), "header ce_id"),
        (hint(type="x"), "header ce_type"),
        (hint(data={}), "$.campaign_id"),
        (hint(data=hint_data(to_status="")), "$.to_status"),
    ],
)
def test_in_binary_mode_the_error_names_the_header_or_the_path_in_the_value(
    event: dict[str, object], place: str
) -> None:
    decoded = one(binary(event))
    assert isinstance(decoded, DeadLetter)
    assert decoded.error.startswith(place + ":")


def test_an_extension_of_unknown_name_is_not_named() -> None:
    decoded = one(structured(hint(**{CANARY: "\x00"})))
    assert isinstance(decoded, DeadLetter)
    assert CANARY not in decoded.error
