"""Change records: every shape Debezium writes becomes a hint for the right campaigns, the rest is told apart."""

import json
from dataclasses import dataclass
from typing import Any
from uuid import UUID, uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st

from consumer.changes import decode_changes
from consumer.envelope import TOMBSTONE, ChangeHint, DeadLetter
from schemas.events import DeadLetterReason

ONE, TWO = UUID("11111111-1111-1111-1111-111111111111"), uuid4()  # the first has no RFC variant: as tables hold it


@dataclass(frozen=True)
class Bytes:
    value: bytes | None
    headers: tuple[tuple[str, bytes | None], ...] = ()
    topic: str = "cdc"
    partition: int = 0
    offset: int = 0
    key: bytes | None = None
    timestamp: int = 0


def decoded(document: object) -> object:
    [found] = decode_changes([Bytes(json.dumps(document).encode())])
    return found


def row(campaign: object = str(ONE)) -> dict[str, Any]:
    return {"id": str(uuid4()), "campaign_id": campaign, "status": "sent", "email": "x@example.com"}


@pytest.mark.parametrize(
    ("document", "campaigns"),
    [
        ({"op": "c", "before": None, "after": row()}, (ONE,)),
        ({"op": "r", "before": None, "after": row(), "source": {"table": "campaign_prospects"}}, (ONE,)),
        ({"op": "u", "before": row(), "after": row()}, (ONE,)),
        ({"op": "u", "before": row(), "after": row(str(TWO))}, (ONE, TWO)),
        ({"op": "u", "before": {"id": "x"}, "after": row()}, (ONE,)),
        ({"op": "d", "before": row(), "after": None}, (ONE,)),
        ({"schema": {}, "payload": {"op": "c", "before": None, "after": row()}}, (ONE,)),
        (row(), (ONE,)),
        ({**row(), "__deleted": "true"}, (ONE,)),
        (row(str(TWO).upper()), (TWO,)),
    ],
)
def test_a_changed_row_is_a_hint_for_its_campaign_before_and_after(document: object, campaigns: object) -> None:
    assert decoded(document) == ChangeHint(campaigns)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "document",
    [
        {"op": "u", "before": None, "after": {"id": str(ONE), "stats": {}}, "source": {"table": "campaigns"}},
        {"op": "t", "before": None, "after": None},
        {"op": "m", "message": {}},
        {"schema": {}, "payload": None},
    ],
)
def test_what_is_about_no_prospect_is_ignored(document: object) -> None:
    assert decoded(document) is TOMBSTONE
    assert decode_changes([Bytes(None)]) == [TOMBSTONE]


@pytest.mark.parametrize(
    ("value", "reason", "said"),
    [
        (b"\xff", DeadLetterReason.NOT_UTF8, "UTF-8"),
        (b"{", DeadLetterReason.NOT_JSON, "JSON"),
        (b"[]", DeadLetterReason.INVALID_DATA, "$: expected a change record"),
        (b'{"schema":{},"payload":3}', DeadLetterReason.INVALID_DATA, "$.payload: expected a change record"),
        (b'{"op":"d","before":{"id":"x"},"after":null}', DeadLetterReason.INVALID_DATA, "REPLICA IDENTITY FULL"),
        (b'{"op":"c","after":{"campaign_id":7}}', DeadLetterReason.INVALID_CAMPAIGN_ID, "$.after.campaign_id"),
        (b'{"campaign_id":"s3cr3t"}', DeadLetterReason.INVALID_CAMPAIGN_ID, "$.campaign_id"),
    ],
)
def test_an_unusable_change_record_is_a_dead_letter_that_names_the_fix(
    value: bytes, reason: DeadLetterReason, said: str
) -> None:
    [found] = decode_changes([Bytes(value)])
    assert isinstance(found, DeadLetter)
    assert found.reason == reason
    assert said in found.error
    assert "s3cr3t" not in found.error


scalars = st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.just(str(ONE))
keys = st.sampled_from(["op", "before", "after", "payload", "schema", "source", "table", "campaign_id"]) | st.text()
documents = st.recursive(scalars, lambda one: st.lists(one, max_size=2) | st.dictionaries(keys, one, max_size=4))


@given(st.lists(documents.map(lambda one: json.dumps(one).encode()) | st.binary() | st.none(), max_size=5))
def test_whatever_the_bytes_are_it_never_raises_and_answers_each(values: list[bytes | None]) -> None:
    assert len(decode_changes([Bytes(value) for value in values])) == len(values)


@pytest.mark.parametrize("name", ["__table", "__source_table"])
@pytest.mark.parametrize("quote", ["", '"'])
def test_a_header_may_name_the_table_of_a_flattened_row(name: str, quote: str) -> None:
    value = json.dumps(row()).encode()
    for table, expected in (("campaign_prospects", ChangeHint((ONE,))), ("campaign_sender_accounts", TOMBSTONE)):
        [found] = decode_changes([Bytes(value, ((name, f"{quote}{table}{quote}".encode()), ("other", None)))])
        assert found == expected
