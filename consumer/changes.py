"""Change records of `campaign_prospects` (Debezium) read as hints: whatever changed, its campaign is dirty. Pure.

Read as an envelope (before, after) or flattened to the row; in the {"schema", "payload"} wrapper, as a CloudEvent of
Debezium's converter, or as the outbox event router writes it (JSON within a string, or the payload as it is).
"""

import re
from collections.abc import Mapping, Sequence
from typing import Final
from uuid import UUID

from consumer.envelope import TOMBSTONE, ChangeHint, Content, DeadLetter, Ignored, parse_json
from consumer.errors import InvalidEvent
from schemas.events import ANY_ID_PATTERN, DeadLetterReason

TABLE: Final = "campaign_prospects"
OURS: Final = "campaign_stats"  # our own schema, whose rows have a campaign_id too: each recount would cause the next
ANY_ID: Final = re.compile(ANY_ID_PATTERN)
NO_CAMPAIGN: Final = "expected campaign_id in the row; send rows of campaign_prospects with that column"
NO_CAMPAIGN_BEFORE: Final = "expected campaign_id in before; ALTER TABLE campaign_prospects REPLICA IDENTITY FULL"
TABLE_NAMES: Final = ("iodebeziumtable", "__table", "__source_table")  # of a CloudEvent; added to a flattened row
SCHEMA_NAMES: Final = ("iodebeziumschema", "__schema", "__source_schema")
NAMES: Final = frozenset((*TABLE_NAMES, *SCHEMA_NAMES))
WRAPPERS: Final = 5  # more than converter, router and CloudEvent together

Changed = ChangeHint | Ignored | DeadLetter


def decode_changes(records: Sequence[Content]) -> list[Changed]:
    """What each change record is; same length and order. Never raises, whatever the bytes are."""
    return [_decode(record) for record in records]


def _decode(record: Content) -> Changed:
    if record.value is None:
        return TOMBSTONE
    try:
        return _understand(parse_json(record.value), record.headers)
    except InvalidEvent as error:
        return DeadLetter(error.reason, error.detail)


def _understand(document: object, headers: Sequence[tuple[str, bytes | None]]) -> ChangeHint | Ignored:
    """Raises InvalidEvent."""
    said = {name: (text or b"").decode(errors="replace").strip('"') for name, text in headers if name in NAMES}
    where, change, around = _unwrapped(document)
    if change is None:
        return TOMBSTONE
    if not isinstance(change, dict):
        raise InvalidEvent(DeadLetterReason.INVALID_DATA, f"{where}: expected a change record as a JSON object")
    is_row = "campaign_id" in change
    source = change.get("source")
    origin: Mapping[str, object] = source if isinstance(source, dict) and not is_row else {}
    places: Sequence[Mapping[str, object]] = (said, around, change)
    tables = [origin.get("table"), *(place.get(name) for name in TABLE_NAMES for place in places)]
    schemas = [origin.get("schema"), *(place.get(name) for name in SCHEMA_NAMES for place in places)]
    if OURS in schemas or any(isinstance(table, str) and table != TABLE for table in tables):
        return TOMBSTONE  # above all `campaigns`, which our own recounts change
    rows = {"": change} if is_row else {"before": change.get("before"), "after": change.get("after")}
    campaigns: dict[UUID, None] = {}  # two when a prospect was moved
    for name, row in rows.items():
        campaign = row.get("campaign_id") if isinstance(row, dict) else None
        if campaign is None or campaign == "":  # the placeholder of a column that the log did not hold
            continue
        if not isinstance(campaign, str) or ANY_ID.fullmatch(campaign) is None:
            at = ".".join(part for part in (where, name, "campaign_id") if part)
            raise InvalidEvent(
                DeadLetterReason.INVALID_CAMPAIGN_ID, f"{at}: expected a UUID (8-4-4-4-12 hex); send the column as text"
            )
        campaigns[UUID(campaign)] = None
    if not campaigns:
        if any(op in ("t", "m") for op in (change.get("op"), around.get("iodebeziumop"))):
            return TOMBSTONE  # a truncated table or a logical message names no campaign; the sweep finds what changed
        is_delete = isinstance(change.get("before"), dict) and change.get("after") is None
        fix = NO_CAMPAIGN_BEFORE if is_delete else NO_CAMPAIGN
        raise InvalidEvent(DeadLetterReason.INVALID_DATA, f"{where}: {fix}")
    return ChangeHint(tuple(campaigns))


def _unwrapped(change: object) -> tuple[str, object, Mapping[str, object]]:
    """Where the change record or row stands, itself, and the attributes of the CloudEvent around it.

    Below what converters and the outbox event router put around it. Raises InvalidEvent for a string that is no JSON.
    """
    where = "$"
    attributes: Mapping[str, object] = {}
    for _ in range(WRAPPERS):
        if isinstance(change, str):  # the router's payload, unless it was told to expand it
            try:
                change = parse_json(change.encode())
            except InvalidEvent as error:
                said = f"{where}: expected JSON within the string; write the payload as JSON"
                raise InvalidEvent(DeadLetterReason.INVALID_DATA, said) from error
        elif isinstance(change, dict) and not change.keys() & {"before", "after", "campaign_id"}:
            inner = "payload" if "payload" in change else "data" if "specversion" in change else None
            if inner is None:
                break
            attributes = change if inner == "data" else attributes
            where, change = f"{where}.{inner}", change.get(inner)
        else:
            break
    return where, change, attributes
