"""The generated documents: fresh, whole, taken by independent readers, and true of what the decoder does."""

import json
from collections.abc import Iterator
from typing import Any

import jsonschema_rs
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from openapi_spec_validator import OpenAPIV31SpecValidator
from typer.testing import CliRunner

from consumer.changes import decode_changes
from consumer.cli import app
from consumer.envelope import ChangeHint, DeadLetter, decode
from schemas import catalogue, door, events
from schemas.events import DeadLetterReason, Listed, PauseReason, RejectionReason, Trigger
from schemas.tools import examples
from schemas.tools.__main__ import SCHEMAS, generated
from schemas.tools.json_schema import Form, Side, documents, name_of, whole
from schemas.topics import TOPIC_OF, Topics
from tests.witnesses import node

TYPES = [channel.type for channel in catalogue.CHANNELS]
READ = [channel.type for channel in catalogue.CHANNELS if channel.is_read]
BAD = list(examples.bad())
LISTS = (DeadLetterReason, Trigger, RejectionReason, PauseReason)


class Bytes:
    """A record that never was in Kafka."""

    topic, partition, offset, key, timestamp = "t", 0, 0, None, 0
    headers: tuple[tuple[str, bytes], ...] = ()

    def __init__(self, value: bytes) -> None:
        self.value = value


def schema(event_type: str, form: Form = "event", side: Side = "reader") -> dict[str, Any]:
    document: dict[str, Any] = json.loads((SCHEMAS / "json" / name_of(event_type, form, side)).read_text())
    return document


def validator(event_type: str, form: Form = "event", side: Side = "reader") -> jsonschema_rs.Draft202012Validator:
    return jsonschema_rs.Draft202012Validator(schema(event_type, form, side), validate_formats=True)


def places(judge: jsonschema_rs.Draft202012Validator, document: object) -> set[str]:
    """JSON paths at which a document is wrong."""
    found = judge.iter_errors(document)
    return {"$" + "".join(f".{at}" if isinstance(at, str) else f"[{at}]" for at in one.instance_path) for one in found}


def test_what_is_checked_in_is_what_the_models_say() -> None:
    """If this fails: `make schemas`."""
    written = dict(generated())
    assert {name for name in written if (SCHEMAS / name).read_text() != written[name]} == set()
    assert {f"json/{path.name}" for path in SCHEMAS.glob("json/*")} == {name for name in written if "json/" in name}


def properties(node: Any, at: str = "$") -> Iterator[tuple[str, Any]]:
    """Every property of a schema with its place."""
    if isinstance(node, dict):
        for key, value in node.items():
            if key == "properties":
                yield from ((f"{at}.{name}", one) for name, one in value.items())
            yield from properties(value, f"{at}.{key}")
    elif isinstance(node, list):
        for value in node:
            yield from properties(value, at)


def test_every_schema_is_one_and_says_of_every_field_what_it_is() -> None:
    silent = []
    for name, document in documents():
        jsonschema_rs.meta.validate(document)
        assert document["$schema"] == "https://json-schema.org/draft/2020-12/schema", name
        assert document["description"], name
        silent += [f"{name} {at}" for at, one in properties(document) if not one.get("description")]
    assert silent == []
    assert len(list(documents())) == 4 * len(TOPIC_OF)


def closed_objects(node: Any) -> list[Any]:
    """Objects that list their fields and take no others."""
    below = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    found = [one for part in below for one in closed_objects(part)]
    if isinstance(node, dict) and node.get("type") == "object" and "properties" in node:
        found += [node] if node.get("additionalProperties") is False else []
    return found


def test_readers_schemas_stay_open_and_writers_are_closed() -> None:
    """What is released stays: a reader that once was closed would refuse every field that comes later."""
    for name, document in documents():
        assert bool(closed_objects(document)) == name.endswith(".writer.json"), name


def test_there_are_examples_enough_and_each_bad_one_is_explained() -> None:
    for event_type in TYPES:
        assert len(examples.good(event_type)) >= 2, event_type
        files = {f"{event_type}/bad/{path.name}" for path in (examples.EXAMPLES / event_type / "bad").iterdir()}
        explained = [one for one in BAD if one.type == event_type]
        assert {one.name for one in explained} == files
        assert len(explained) >= 10, event_type
        assert all(one.because and (one.at or one.reason in ("not_json", "not_utf8")) for one in explained)


@pytest.mark.parametrize("event_type", TYPES)
def test_good_examples_are_taken_by_both_sides_and_by_the_models(event_type: str) -> None:
    [channel] = [one for one in catalogue.CHANNELS if one.type == event_type]
    for name, event in examples.parsed(event_type).items():
        for side in ("writer", "reader"):
            assert places(validator(event_type, "event", side), event) == set(), name
            assert places(validator(event_type, "data", side), event["data"]) == set(), name
        assert getattr(whole(channel).model_validate_json(json.dumps(event)), "type", None) == event_type


def readable(value: bytes) -> Any:
    """As JSON; None for what is none."""
    try:
        return json.loads(value, parse_constant=lambda name: pytest.fail(name))
    except (ValueError, pytest.fail.Exception):
        return None


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: str(bad.name))
def test_a_bad_example_is_refused_where_it_is_said_to_be_wrong(bad: examples.Bad) -> None:
    document = readable(bad.value)
    assert (document is None) == (bad.reason in ("not_json", "not_utf8"))
    if document is not None:
        assert bad.at in places(validator(bad.type, "event", "writer"), document)
        assert bool(places(validator(bad.type, "event", "reader"), document)) == (bad.refused_by == "reader")


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: str(bad.name))
def test_check_event_says_of_a_bad_example_exactly_what_its_dead_letter_would(bad: examples.Bad) -> None:
    ran = CliRunner().invoke(app, ["check-event", "-", "--json"], input=bad.value)
    assert (ran.exit_code, json.loads(ran.stdout)) == (1, {"accepted": False, "reason": bad.reason, "error": bad.error})
    if bad.at and bad.type in READ:
        assert bad.error.startswith(bad.at)  # or a field below, which is missing there


@pytest.mark.parametrize("event_type", READ)
def test_check_event_accepts_the_good_examples_and_says_what_they_are(event_type: str) -> None:
    kind = "status_hint" if event_type == events.STATUS_CHANGED else "sync_request"
    for name, value in examples.good(event_type).items():
        ran = CliRunner().invoke(app, ["check-event", "-", "--json"], input=value)
        assert (ran.exit_code, json.loads(ran.stdout)["kind"]) == (0, kind), name


def test_check_event_knows_a_connectors_record_and_says_how_to_ask_about_it() -> None:
    value = (examples.EXAMPLES / "change-records" / "good" / "update.json").read_bytes()
    asked = CliRunner().invoke(app, ["check-event", "-"], input=value)
    assert (asked.exit_code, "--change-record" in asked.stdout) == (1, True)
    told = CliRunner().invoke(app, ["check-event", "-", "--change-record", "--json"], input=value)
    assert (told.exit_code, json.loads(told.stdout)["kind"]) == (0, "change_record")
    for bad in BAD:
        assert "--change-record" not in CliRunner().invoke(app, ["check-event", "-"], input=bad.value).stdout, bad.name


characters = st.characters(exclude_categories=["Cs"])  # a lone surrogate no JSON Schema can refuse
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(characters, max_size=4),
    lambda one: st.lists(one, max_size=2) | st.dictionaries(st.sampled_from(["id", "campaign_id"]), one, max_size=2),
)
fields = st.sampled_from(
    ["id", "source", "specversion", "correlationid", "traceparent", "time", "data_base64", "ext", "Ext", "data"]
)
data_fields = st.sampled_from(["campaign_id", "prospect_id", "from_status", "to_status", "user_id", "reason", "new"])
likely = st.sampled_from(["", "x", "a\x00", "1.0", events.STATUS_CHANGED, "11111111-1111-1111-1111-111111111111"])


@given(st.sampled_from(READ), st.data())
def test_the_readers_schema_takes_exactly_what_the_decoder_takes(event_type: str, data: st.DataObject) -> None:
    event = dict(data.draw(st.sampled_from([*examples.parsed(event_type).values()])))
    event["data"] = dict(event["data"])
    for _ in range(data.draw(st.integers(1, 2))):
        part = event["data"] if data.draw(st.booleans()) and isinstance(event.get("data"), dict) else event
        field = data.draw(fields if part is event else data_fields)
        if data.draw(st.booleans()):
            part[field] = data.draw(json_values | likely)
        else:
            part.pop(field, None)
    [decoded] = decode([Bytes(json.dumps(event).encode())])
    assert isinstance(decoded, DeadLetter) is bool(places(JUDGES[event_type], event)), (event, decoded)


JUDGES = {event_type: validator(event_type) for event_type in READ}


def test_the_decoder_reads_every_change_record_as_expected() -> None:
    directory = examples.EXAMPLES / "change-records"
    expected = json.loads((directory / "expected.json").read_text())
    assert {f"{path.parent.name}/{path.name}" for path in directory.glob("*/*.json")} == set(expected)
    for name, said in expected.items():
        [found] = decode_changes([Bytes((directory / name).read_bytes())])
        if isinstance(found, DeadLetter):
            assert (found.reason, found.error) == (said["reason"], said["error"]), name
        else:
            campaigns = [str(one) for one in found.campaign_ids] if isinstance(found, ChangeHint) else []
            assert campaigns == said["campaigns"], name


def test_the_official_asyncapi_parser_finds_no_fault() -> None:
    read = node("asyncapi.cjs", str(SCHEMAS / "asyncapi.yaml"))
    assert [one for one in read["diagnostics"] if one["severity"] <= 1] == []  # neither errors nor warnings
    assert {address for address in read["found"]["channels"] if address} == set(Topics().all)
    actions = {f"{'receive' if one in READ else 'send'} {'receive' if one in READ else 'send'}.{one}" for one in TYPES}
    assert set(read["found"]["operations"]) >= actions
    assert set(read["found"]["schemes"]) == {"plain", "scramSha256", "scramSha512", "oauth2", "X509"}
    broken = node("asyncapi.cjs", str(SCHEMAS / "openapi.yaml"))  # the control: it does refuse
    assert [one for one in broken["diagnostics"] if one["severity"] == 0]


def test_a_validator_in_another_language_agrees_on_every_example() -> None:
    asked, ours, names = [], [], []
    for event_type in TYPES:
        candidates = {**examples.good(event_type), **{one.name: one.value for one in BAD if one.type == event_type}}
        read = {name: readable(value) for name, value in candidates.items()}
        known = {name: document for name, document in read.items() if document is not None}
        for side in ("writer", "reader"):
            one = schema(event_type, "event", side)
            asked.append({"schema": one, "documents": list(known.values())})
            judge = jsonschema_rs.Draft202012Validator(one, validate_formats=True)
            ours.append([judge.is_valid(document) for document in known.values()])
            names.append([f"{side} {name}" for name in known])
    theirs = [[not wrong for wrong in verdicts] for verdicts in node("validate.cjs", given=asked)]
    differing = [
        name
        for group, mine, other in zip(names, ours, theirs, strict=True)
        for name, one, two in zip(group, mine, other, strict=True)
        if one != two
    ]
    assert differing == []
    assert {False, True} == {verdict for verdicts in ours for verdict in verdicts}


def test_the_openapi_document_is_valid_and_names_every_answer() -> None:
    document = yaml.safe_load((SCHEMAS / "openapi.yaml").read_text())
    OpenAPIV31SpecValidator(document).validate()
    responses = document["paths"][door.PATH]["post"]["responses"]
    assert set(responses) == {"200", *(str(one.status) for one in door.REFUSALS)}
    assert all(one["description"] for _, one in properties(document["components"]["schemas"]))


def lists(node: Any) -> Iterator[list[str]]:
    """Every list of values in a document."""
    if isinstance(node, dict):
        yield from ([node["x-listed"]] if "x-listed" in node else [])
        for value in node.values():
            yield from lists(value)
    elif isinstance(node, list):
        for value in node:
            yield from lists(value)


def test_closed_lists_are_documented_to_the_last_value() -> None:
    readme = (SCHEMAS / "README.md").read_text()
    listed = list(lists(yaml.safe_load((SCHEMAS / "asyncapi.yaml").read_text())))
    assert set(LISTS) == set(Listed.__subclasses__())
    for values in LISTS:
        assert [str(value) for value in values] in listed, values
        for value in values:
            assert f"`{value}`" in readme, value
            assert value.meaning.endswith("."), value
            assert value.meaning in readme, value
    without_file = {"unreadable", "too_large"}  # batches that Kafka's client refuses: tests/service/test_bad_input.py
    assert {one.reason for one in BAD} == set(DeadLetterReason) - without_file


def test_a_reader_takes_values_of_a_list_that_it_does_not_know() -> None:
    unknown = [one for one in BAD if one.name.rpartition("/")[2].startswith("unknown-") and one.refused_by == "writer"]
    assert {one.type for one in unknown} == {events.STATS_UPDATED, events.SYNC_REJECTED, events.PAUSED}
    for one in unknown:
        [channel] = [channel for channel in catalogue.CHANNELS if channel.type == one.type]
        assert getattr(whole(channel).model_validate_json(one.value), "type", None) == one.type
    known = events.Envelope[events.CampaignPausedV1].model_validate_json(examples.good(events.PAUSED)["six-of-120"])
    assert isinstance(known.data.reason, Listed)
