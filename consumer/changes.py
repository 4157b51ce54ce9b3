"""Change records of `campaign_prospects` (Debezium) read as hints: whatever changed, its campaign is dirty. Pure.

Read as an envelope (before, after, op) or flattened to the row; in the {"schema", "payload"} wrapper, as a CloudEvent
of Debezium's converter, or as the outbox event router writes it (JSON within a string, or the payload as it is).
"""

import re
from collections.abc import Sequence
from typing import Final
from uuid import UUID

from consumer.envelope import TOMBSTONE, ChangeHint, DeadLetter, Ignored, Record, parse_json
from consumer.errors import InvalidEvent
from schemas.events import ANY_ID_PATTERN, DeadLetterReason

TABLE: Final = "campaign_prospects"
ANY_ID: Final = re.compile(ANY_ID_PATTERN)
NO_CAMPAIGN: Final = (
    "expected campaign_id in before or after; for deletes: ALTER TABLE campaign_prospects REPLICA IDENTITY FULL"
)

WRAPPERS: Final = 5  # more than converter, router and CloudEvent together

Changed = ChangeHint | Ignored | DeadLetter


def decode_changes(records: Sequence[Record]) -> list[Changed]:
    """What each change record is; same length and order. Never raises, whatever the bytes are."""
    return [_decode(record) for record in records]


def _decode(record: Record) -> Changed:
    if record.value is None:
        return TOMBSTONE
    try:
        return _understand(parse_json(record.value))
    except InvalidEvent as error:
        return DeadLetter(error.reason, error.detail)


def _understand(record: object) -> ChangeHint | Ignored:
    """Raises InvalidEvent."""
    where, change = _unwrapped(record)
    if change is None:
        return TOMBSTONE
    if not isinstance(change, dict):
        raise InvalidEvent(DeadLetterReason.INVALID_DATA, f"{where}: expected a change record as a JSON object")
    source = change.get("source")
    if isinstance(source, dict) and source.get("table", TABLE) != TABLE:
        return TOMBSTONE  # above all `campaigns`, which our own recounts change: each would cause the next
    rows = {"before": change.get("before"), "after": change.get("after")} if "op" in change else {"": change}
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
        if change.get("op") in ("t", "m"):
            return TOMBSTONE  # a truncated table or a logical message names no campaign; the sweep finds what changed
        raise InvalidEvent(DeadLetterReason.INVALID_DATA, f"{where}: {NO_CAMPAIGN}")
    return ChangeHint(tuple(campaigns))


def _unwrapped(change: object) -> tuple[str, object]:
    """The change record or row, and where it stands, below what converters and the outbox event router put around it.

    Raises InvalidEvent for a string that is no JSON.
    """
    where = "$"
    for _ in range(WRAPPERS):
        if isinstance(change, str):  # the router's payload, unless it was told to expand it
            try:
                change = parse_json(change.encode())
            except InvalidEvent as error:
                said = f"{where}: expected JSON within the string; write the payload as JSON"
                raise InvalidEvent(DeadLetterReason.INVALID_DATA, said) from error
        elif isinstance(change, dict) and not change.keys() & {"op", "campaign_id"}:
            inner = "payload" if "payload" in change else "data" if "specversion" in change else None
            if inner is None:
                break
            where, change = f"{where}.{inner}", change.get(inner)
        else:
            break
    return where, change
