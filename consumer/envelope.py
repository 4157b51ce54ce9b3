"""Bytes <-> CloudEvents, structured and binary mode. The only reader of bytes, and pure: no clock, no server.

Hot path: one parse per record, one validation per list. Only records that are no plain, valid status hints in
structured mode take the careful path, which decides what they are in the documented order of dead-letter reasons.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from typing import Annotated, Final, Literal, NoReturn, NotRequired, Protocol, TypeVar
from uuid import UUID

import orjson
from pydantic import ConfigDict, StringConstraints, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict  # pydantic needs this one on Python 3.11

from consumer.errors import InvalidEvent
from schemas import events
from schemas.events import ANY_ID_PATTERN, CAMPAIGN_ID_PATTERN, DeadLetterReason

SOURCE: Final = "campaign-stats"
CONTENT_TYPE: Final = (("content-type", b"application/cloudevents+json"),)

_CAMPAIGN_ID: Final = re.compile(CAMPAIGN_ID_PATTERN)
_TYPE: Final = re.compile(r"(prospect\.status_changed|campaign\.sync_requested)\.v([1-9][0-9]{0,8})")
_TRACEPARENT: Final = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")


class Record(Protocol):
    """Bytes from Kafka with their coordinates; `timestamp` in milliseconds since 1970."""

    @property
    def topic(self) -> str: ...
    @property
    def partition(self) -> int: ...
    @property
    def offset(self) -> int: ...
    @property
    def key(self) -> bytes | None: ...
    @property
    def value(self) -> bytes | None: ...
    @property
    def headers(self) -> Sequence[tuple[str, bytes]]: ...
    @property
    def timestamp(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Cause:
    """What events that follow carry on. `correlation_id`: the event's correlationid or else its id."""

    id: str
    correlation_id: str
    traceparent: str | None = None

    def to_json(self) -> dict[str, str | None]:
        """As kept with deferred work."""
        return {"id": self.id, "correlation_id": self.correlation_id, "traceparent": self.traceparent}

    @classmethod
    def from_json(cls, kept: Mapping[str, str | None]) -> "Cause":
        """The reverse of to_json."""
        return cls(str(kept["id"]), str(kept["correlation_id"]), kept["traceparent"])


@dataclass(frozen=True, slots=True)
class StatusHint:
    """This campaign is dirty. `newer`: a later version of a known type; a hint, never answered, counted apart."""

    campaign_id: UUID
    cause: Cause
    newer: bool = False


@dataclass(frozen=True, slots=True)
class SyncRequest:
    """Recount this campaign and answer. `user_id`, if given, must own it. `source`, `cause.id` make the answer's id."""

    campaign_id: UUID
    user_id: UUID | None
    source: str
    cause: Cause

    def to_json(self) -> dict[str, object]:
        """As kept with deferred work."""
        return {
            "campaign_id": str(self.campaign_id),
            "user_id": self.user_id and str(self.user_id),
            "source": self.source,
            "cause": self.cause.to_json(),
        }

    @classmethod
    def from_json(cls, kept: Mapping[str, object]) -> "SyncRequest":
        """The reverse of to_json."""
        cause = kept["cause"]
        if not isinstance(cause, dict):
            raise TypeError("cause must be an object")
        return cls(
            UUID(str(kept["campaign_id"])),
            UUID(str(kept["user_id"])) if kept["user_id"] is not None else None,
            str(kept["source"]),
            Cause.from_json(cause),
        )


@dataclass(frozen=True, slots=True)
class Ignored:
    """Nothing to do: a tombstone."""

    why: Literal["tombstone"] = "tombstone"


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """Can never be read. `error` names JSON path, expectation and fix, never a value."""

    reason: DeadLetterReason
    error: str


Decoded = StatusHint | SyncRequest | Ignored | DeadLetter

_Attribute = Annotated[str, StringConstraints(pattern=r"\A[^\x00]+\z")]


@with_config(ConfigDict(strict=True))
class _HintData(TypedDict):
    campaign_id: Annotated[str, StringConstraints(pattern=rf"\A{CAMPAIGN_ID_PATTERN}\z")]
    prospect_id: Annotated[str, StringConstraints(pattern=rf"\A{ANY_ID_PATTERN}\z")]
    from_status: NotRequired[str | None]
    to_status: _Attribute


@with_config(ConfigDict(strict=True))
class _Hint(TypedDict):
    specversion: Literal["1.0"]
    id: _Attribute
    source: _Attribute
    type: Literal["prospect.status_changed.v1"]
    correlationid: NotRequired[_Attribute]
    traceparent: NotRequired[_Attribute]
    data: _HintData


Model = TypeVar("Model", bound=events.Read)

_HINTS: Final = TypeAdapter(list[_Hint])
_PLAIN_ATTRIBUTES: Final = frozenset(
    (
        "specversion",
        "id",
        "source",
        "type",
        "time",
        "subject",
        "datacontenttype",
        "correlationid",
        "traceparent",
        "data",
    )
)
_NOT_KEPT: Final = frozenset(
    ("data", "time", "subject", "datacontenttype", "dataschema")
)  # neither stored nor looked at


def decode(records: Sequence[Record]) -> list[Decoded]:
    """What each record is; same length and order. Never raises, whatever the bytes are."""
    decoded: list[Decoded | None] = [None] * len(records)
    places: list[int] = []
    plain: list[object] = []
    for place, record in enumerate(records):
        value = record.value
        if value is None:
            decoded[place] = Ignored()
        elif not record.headers or not _is_binary(record):
            try:
                event = orjson.loads(value)
            except orjson.JSONDecodeError:
                continue
            # Attributes we do not know may hold what must not be there: the careful path looks at them.
            if type(event) is dict and event.get("type") == events.STATUS_CHANGED and event.keys() <= _PLAIN_ATTRIBUTES:
                places.append(place)
                plain.append(event)
    try:
        hints = _HINTS.validate_python(plain)
    except ValidationError:
        pass
    else:
        for place, hint in zip(places, hints, strict=True):
            identity = hint["id"]
            traceparent = hint.get("traceparent")
            decoded[place] = StatusHint(
                _uuid(hint["data"]["campaign_id"]),
                Cause(identity, hint.get("correlationid", identity), traceparent and _well_formed(traceparent)),
            )
    return [_decode(records[place]) if event is None else event for place, event in enumerate(decoded)]


def _decode(record: Record) -> Decoded:
    """The careful path: what this record is, in the documented order of reasons."""
    if record.value is None:
        return Ignored()
    try:
        event = _binary(record, record.value) if _is_binary(record) else _json(record.value)
        return _interpret(event)
    except InvalidEvent as error:
        return DeadLetter(error.reason, error.detail)


def _interpret(event: object) -> StatusHint | SyncRequest:
    """What a parsed CloudEvent means. Raises InvalidEvent."""
    if not isinstance(event, dict):
        what = "batch mode is not read: send one event a record" if isinstance(event, list) else "send a JSON object"
        _refuse(DeadLetterReason.NOT_CLOUDEVENT, f"$: expected one CloudEvent; {what}")
    if event.get("specversion") != "1.0":
        _refuse(DeadLetterReason.NOT_CLOUDEVENT, '$.specversion: expected "1.0"; write CloudEvents 1.0')
    if "data_base64" in event:
        _refuse(DeadLetterReason.NOT_CLOUDEVENT, "$.data_base64: not read; put JSON into data")
    for name, value in event.items():
        if name not in _NOT_KEPT and isinstance(value, str) and not _storable(value):
            _refuse(DeadLetterReason.NOT_CLOUDEVENT, f"$.{_shown(name)}: must not contain U+0000 or a lone surrogate")
    for name in ("id", "source", "type"):
        if not isinstance(event.get(name), str) or not event[name]:
            _refuse(DeadLetterReason.NOT_CLOUDEVENT, f"$.{name}: expected a non-empty string; it is required")
    match = _TYPE.fullmatch(event["type"])
    if match is None:
        known = f"{events.STATUS_CHANGED} or {events.SYNC_REQUESTED}"
        _refuse(DeadLetterReason.UNKNOWN_TYPE, f"$.type: expected {known}; use one of these or another topic")
    data = event.get("data")
    campaign = data.get("campaign_id") if isinstance(data, dict) else None
    if not isinstance(campaign, str) or _CAMPAIGN_ID.fullmatch(campaign) is None:
        _refuse(
            DeadLetterReason.INVALID_CAMPAIGN_ID,
            "$.data.campaign_id: expected an RFC 9562 UUID (8-4-4-4-12 hex); send the campaign's id",
        )
    campaign_id = UUID(campaign)
    cause = _cause(event)
    if match.group(2) != "1":
        return StatusHint(campaign_id, cause, newer=True)
    if match.group(1) == "prospect.status_changed":
        _check(events.ProspectStatusChangedV1, data)
        return StatusHint(campaign_id, cause)
    request = _check(events.CampaignSyncRequestedV1, data)
    user_id = UUID(request.user_id) if request.user_id is not None else None
    return SyncRequest(campaign_id, user_id, event["source"], cause)


def _check(model: type[Model], data: object) -> Model:
    try:
        return model.model_validate(data)
    except ValidationError as error:
        problem = error.errors(include_input=False, include_url=False, include_context=False)[0]
        path = ".".join(str(part) for part in problem["loc"])
        expectation = problem["msg"].removeprefix("Value error, ").removeprefix("Input ")
    raise InvalidEvent(DeadLetterReason.INVALID_DATA, f"$.data.{path}: {expectation}; see schemas/README.md")


def _cause(event: Mapping[str, object]) -> Cause:
    identity = str(event["id"])
    correlation = event.get("correlationid")
    traceparent = event.get("traceparent")
    return Cause(
        identity,
        correlation if isinstance(correlation, str) and correlation else identity,
        _well_formed(traceparent) if isinstance(traceparent, str) else None,
    )


def _well_formed(traceparent: str) -> str | None:
    """Broken tracing must not kill a good event: what is no W3C traceparent is left out."""
    return traceparent if _TRACEPARENT.fullmatch(traceparent) else None


def _is_binary(record: Record) -> bool:
    return any(name.startswith("ce_") for name, _ in record.headers)


def _binary(record: Record, value: bytes) -> dict[str, object]:
    """Binary mode: attributes in ce_ headers (of two with one name the last counts), data in the value."""
    event: dict[str, object] = {}
    for name, content in record.headers:
        if name.startswith("ce_"):
            try:
                event[name.removeprefix("ce_")] = (content or b"").decode("utf-8")
            except UnicodeDecodeError:
                _refuse(DeadLetterReason.NOT_UTF8, f"header {_shown(name)}: expected UTF-8; encode it so")
    if "data" in event or "data_base64" in event:  # neither is an attribute: the data is the value
        _refuse(DeadLetterReason.NOT_CLOUDEVENT, "header ce_data: not an attribute; put JSON into the value")
    event["data"] = _json(value)
    return event


def _json(value: bytes) -> object:
    """Parse; orjson first, then the standard library, which alone takes lone surrogates in fields nobody looks at."""
    try:
        return orjson.loads(value)
    except orjson.JSONDecodeError:
        pass
    try:
        text = value.decode("utf-8")
    except UnicodeDecodeError as error:
        _refuse(DeadLetterReason.NOT_UTF8, f"byte {error.start}: expected UTF-8; encode it so")
    try:
        return json.loads(text, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        _refuse(DeadLetterReason.NOT_JSON, f"line {error.lineno} column {error.colno}: expected JSON; {error.msg}")
    except (ValueError, RecursionError) as error:
        what = "nested too deeply" if isinstance(error, RecursionError) else "NaN, Infinity or a number too long"
        _refuse(DeadLetterReason.NOT_JSON, f"$: {what}; write JSON as in RFC 8259")


def _no_constant(_: str) -> NoReturn:
    raise ValueError


def _refuse(reason: DeadLetterReason, detail: str) -> NoReturn:
    raise InvalidEvent(reason, detail)


def _storable(text: str) -> bool:
    """PostgreSQL stores neither U+0000 nor a lone surrogate."""
    return "\x00" not in text and not any("\ud800" <= character <= "\udfff" for character in text)


def _shown(name: str) -> str:
    """Names of attributes are the sender's too: shown only when they are what CloudEvents allows."""
    return name if re.fullmatch(r"[a-z0-9_]{1,32}", name) else "(attribute)"


@lru_cache(maxsize=65_536)
def _uuid(text: str) -> UUID:
    return UUID(text)


def encode(
    *, type: str, id: str, time: datetime, subject: str, data: Mapping[str, object], cause: Cause | None = None
) -> bytes:
    """A structured-mode CloudEvent; keys of `data` keep their order."""
    event: dict[str, object] = {
        "specversion": "1.0",
        "id": id,
        "source": SOURCE,
        "type": type,
        "time": format_time(time),
        "subject": subject,
        "datacontenttype": "application/json",
    }
    if cause is not None:
        event["causationid"] = cause.id
        event["correlationid"] = cause.correlation_id
        if cause.traceparent is not None:
            event["traceparent"] = cause.traceparent
    event["data"] = data
    return orjson.dumps(event)


def format_time(moment: datetime) -> str:
    """YYYY-MM-DDTHH:MM:SS[.ffffff]Z, a fraction only if not zero."""
    return moment.astimezone(UTC).replace(tzinfo=None).isoformat() + "Z"


def dead_letter_headers(record: Record, letter: DeadLetter, now: datetime) -> list[tuple[str, bytes]]:
    """The record's own headers, then ours: where it came from, why it is here, since when."""
    return [*record.headers, *_coordinates(record.topic, record.partition, str(record.offset), letter, now)]


def stub_headers(
    topic: str, partition: int, first: int, last: int, letter: DeadLetter, now: datetime
) -> list[tuple[str, bytes]]:
    """Headers of a stub for records nobody can hand out; `dead-letter-offset` is `first` or `first-last`."""
    return _coordinates(topic, partition, str(first) if first == last else f"{first}-{last}", letter, now)


def _coordinates(topic: str, partition: int, offset: str, letter: DeadLetter, now: datetime) -> list[tuple[str, bytes]]:
    return [
        ("dead-letter-topic", topic.encode()),
        ("dead-letter-partition", str(partition).encode()),
        ("dead-letter-offset", offset.encode()),
        ("dead-letter-reason", letter.reason.encode()),
        ("dead-letter-error", letter.error.encode("utf-8", "replace")),
        ("dead-letter-time", format_time(now).encode()),
    ]
