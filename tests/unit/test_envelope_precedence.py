"""When several things are wrong with one record, the reason is the first of the documented order, in both modes."""

import json
from collections.abc import Callable
from itertools import combinations

import pytest

from consumer.envelope import DeadLetter, Record, decode
from tests.unit.builders import Bytes, hint_event, request_event

ORDER = ("not_utf8", "not_json", "not_cloudevent", "unknown_type", "invalid_campaign_id", "invalid_data")
PAIRS = list(combinations(ORDER, 2))


def flawed(flaws: tuple[str, ...], event: dict[str, object]) -> tuple[dict[str, object], bytes]:
    """Attributes and data with these flaws in them."""
    attributes = {name: value for name, value in event.items() if name != "data"}
    given = event["data"]
    assert isinstance(given, dict)
    data = dict(given)
    if "not_cloudevent" in flaws:
        attributes["specversion"] = "0.3"
    if "unknown_type" in flaws:
        attributes["type"] = "nobody.knows.v1"
    if "invalid_campaign_id" in flaws:
        data["campaign_id"] = "42"
    if "invalid_data" in flaws:
        data.pop("to_status", None)
        data["user_id"] = data["reason"] = 5  # against the schema of a sync request
    text = json.dumps(data).encode()
    if "not_json" in flaws:
        text = text[:-1] + b',"x":NaN}'
    if "not_utf8" in flaws:
        text = text[:-1] + b',"y":"\xff"}'
    return attributes, text


def structured(flaws: tuple[str, ...], event: dict[str, object]) -> Record:
    attributes, data = flawed(flaws, event)
    return Bytes(json.dumps(attributes).encode()[:-1] + b',"data":' + data + b"}")


def binary(flaws: tuple[str, ...], event: dict[str, object]) -> Record:
    attributes, data = flawed(flaws, event)
    return Bytes(data, tuple((f"ce_{name}", str(value).encode()) for name, value in attributes.items()))


@pytest.mark.parametrize("event", [hint_event(), request_event()], ids=["hint", "request"])
@pytest.mark.parametrize("mode", [structured, binary])
@pytest.mark.parametrize("flaws", [(flaw,) for flaw in ORDER] + PAIRS + [ORDER])
def test_the_first_reason_that_applies_stands(
    flaws: tuple[str, ...], mode: Callable[[tuple[str, ...], dict[str, object]], Record], event: dict[str, object]
) -> None:
    [decoded] = decode([mode(flaws, event)])
    assert isinstance(decoded, DeadLetter)
    assert decoded.reason == flaws[0]


@pytest.mark.parametrize("mode", [structured, binary])
def test_without_a_flaw_it_is_no_dead_letter(
    mode: Callable[[tuple[str, ...], dict[str, object]], Record],
) -> None:
    assert not any(isinstance(decoded, DeadLetter) for decoded in decode([mode((), hint_event())]))
