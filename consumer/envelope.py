"""Bytes <-> CloudEvents, structured and binary mode. The only reader of bytes, and pure: no clock, no server.

Hot path: a status hint that holds nothing but what we know is checked while it is parsed (`collect`); one with more in
it costs a parse and an exact look. All else takes the careful path, which decides what it is in the documented order of
dead-letter reasons.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from itertools import islice, repeat
from operator import attrgetter, contains
from typing import Annotated, Final, Literal, NamedTuple, NoReturn, Protocol, TypeAlias, TypeVar
from uuid import UUID

import msgspec
import orjson
from pydantic import ValidationError

from consumer.errors import InvalidEvent
from schemas import events
from schemas.events import ANY_ID_PATTERN, CAMPAIGN_ID_PATTERN, DeadLetterReason, storable

SOURCE: Final = "campaign-stats"
CONTENT_TYPE: Final = (("content-type", b"application/cloudevents+json"),)

MAX_CARRIED: Final = 1_024  # characters of an id; longer ones would make a pause too large for its topic

_CAMPAIGN_ID: Final = re.compile(CAMPAIGN_ID_PATTERN)
_ID_AND_COMMA: Final = 37  # characters
_ANY_IDS: Final = re.compile(f"(?:{ANY_ID_PATTERN},)*")
_ANY_ID: Final = re.compile(ANY_ID_PATTERN)
_TYPE: Final = re.compile(r"(prospect\.status_changed|campaign\.sync_requested)\.v([1-9][0-9]{0,8})")
TRACEPARENT: Final = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")


_SURROGATE: Final = re.compile(rb"\\u[dD][89a-fA-F]")
_ESCAPE: Final = re.compile(  # group 1: a lone surrogate; pairs and all other escapes are taken whole
    rb"\\(?:u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|(u[dD][89a-fA-F][0-9a-fA-F]{2})|.)", re.DOTALL
)


class Content(Protocol):
    """A record of a batch, which says topic and partition once for all; `timestamp` in milliseconds since 1970."""

    @property
    def offset(self) -> int: ...
    @property
    def key(self) -> bytes | None: ...
    @property
    def value(self) -> bytes | None: ...
    @property
    def headers(self) -> Sequence[tuple[str, bytes | None]]: ...
    @property
    def timestamp(self) -> int: ...


class Record(Content, Protocol):
    """Bytes from Kafka with all of their coordinates."""

    @property
    def topic(self) -> str: ...
    @property
    def partition(self) -> int: ...


class Placed(NamedTuple):
    """A record of a batch as a Record."""

    topic: str
    partition: int
    offset: int
    key: bytes | None
    value: bytes | None
    headers: Sequence[tuple[str, bytes | None]]
    timestamp: int


def placed(topic: str, partition: int, content: Content) -> Placed:
    """The same with its coordinates."""
    return Placed(topic, partition, content.offset, content.key, content.value, content.headers, content.timestamp)


class Cause(msgspec.Struct, frozen=True, gc=False):  # made in a fifth of the time of a named tuple
    """What events that follow carry on. `correlation_id`: the event's correlationid or else its id; "" = too long."""

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


class StatusHint(msgspec.Struct, frozen=True, gc=False):
    """This campaign is dirty. `newer`: a later version of a known type; a hint, never answered, counted apart.

    `cause` is None for a newer sync request: a request's id stands as causationid only in its answers.
    """

    campaign_id: UUID
    cause: Cause | None
    newer: bool = False


class ChangeHint(NamedTuple):
    """These campaigns are dirty because one of their rows changed; nobody is named as the cause."""

    campaign_ids: tuple[UUID, ...]


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
    """Nothing to do: a tombstone, or a change record that is about no prospect."""

    why: Literal["tombstone"] = "tombstone"


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """Can never be read. `error` names JSON path, expectation and fix, never a value."""

    reason: DeadLetterReason
    error: str


Decoded = StatusHint | SyncRequest | Ignored | DeadLetter

TOMBSTONE: Final = Ignored()

_Text: TypeAlias = Annotated[str, msgspec.Meta(min_length=1)]


class _HintData(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    """Data of a status hint in which everything is text. Both ids are still to be looked at."""

    campaign_id: str
    prospect_id: str
    to_status: _Text
    from_status: str | None = None
    user_id: str | None = None


class _PlainHint(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    """A status hint with nothing in it that we do not know, every attribute text."""

    specversion: Literal["1.0"]
    id: Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_CARRIED)]
    source: _Text
    type: Literal["prospect.status_changed.v1"]
    data: _HintData
    time: str | None = None
    subject: str | None = None
    datacontenttype: str | None = None
    dataschema: str | None = None
    correlationid: str | None = None
    causationid: str | None = None
    traceparent: str | None = None
    tracestate: str | None = None

    def cause(self) -> Cause:
        """What events that follow carry on; the same as `_cause` says."""
        kept, traceparent = self.correlationid or self.id, self.traceparent
        return Cause(
            self.id,
            kept if len(kept) <= MAX_CARRIED else "",
            None if traceparent is None else _well_formed(traceparent),
        )


BACKSLASH: Final = ord("\\")  # JSON without one holds neither U+0000 nor a lone surrogate
PLAIN_BYTES: Final = 1_000  # of a plain hint; usual ones have less than half

_headers: Final = attrgetter("headers")
_NOT_PLAIN: Final = (msgspec.DecodeError, UnicodeDecodeError)  # which says nothing about its being right
_parse_plain: Final = msgspec.json.Decoder(_PlainHint).decode

Model = TypeVar("Model", bound=events.Read)

_NOT_KEPT: Final = frozenset(
    ("data", "time", "subject", "datacontenttype", "dataschema")
)  # neither stored nor looked at
_KNOWN_ATTRIBUTES: Final = frozenset(
    ("specversion", "id", "source", "type", "correlationid", "causationid", "traceparent", "tracestate", *_NOT_KEPT)
)
_EXPECTED: Final[Mapping[str, str]] = {
    "prospect_id": "expected 8-4-4-4-12 hex digits; send the prospect's id",
    "from_status": "expected a string; leave it out when the prospect is new",
    "to_status": "expected a non-empty string without U+0000 or a lone surrogate; send the status after the change",
    "user_id": "expected 8-4-4-4-12 hex digits; send the owner's id or leave it out",
    "reason": "expected a string; leave it out if there is none",
}


@dataclass(frozen=True, slots=True)
class _Parsed:
    """A record's JSON, in the shape of structured mode, and how to name its parts to the sender."""

    event: object
    is_binary: bool

    def attribute(self, name: str) -> str:
        """Where an attribute stands. Names are the sender's too: an unknown one may hold anything and is not shown."""
        shown = name if name in _KNOWN_ATTRIBUTES or name == "data_base64" else "(extension)"
        return f"header ce_{shown}" if self.is_binary else f"$.{shown}"

    def field(self, name: str) -> str:
        """Where a field of the data stands."""
        return f"$.{name}" if self.is_binary else f"$.data.{name}"


class Hints:
    """Dirty campaigns, each with the ids of its last hint.

    A plain hint is kept whole until it is settled, so it must be short.
    """

    def __init__(self) -> None:
        # By id as text, which is hashed faster, the bytes of the last: one object to keep and to free, where a parsed
        # hint is a dozen (measured: a third of the cost). Its Cause is made when it is settled.
        self._plain: dict[str, bytes] = {}
        self._settled: dict[UUID, Cause | None] = {}

    def __len__(self) -> int:
        """How many campaigns at most."""
        return len(self._plain) + len(self._settled)

    def collect(self, records: Sequence[Content]) -> tuple[int, list[tuple[Content, Decoded]]]:
        """Take in the status hints among `records`.

        Returns how many were plain hints, and of all the others what they are, in order (hints among them are taken in
        too). Says the same as `decode` and `keep_last` for every record, at a third of the cost. Never raises.
        """
        if self._all_plain(records):
            return len(records), []
        latest, others = self._plain, list[tuple[Content, Decoded]]()
        for record in records:  # the same once more, for each by itself
            value = record.value
            if value is not None and len(value) <= PLAIN_BYTES and not record.headers and BACKSLASH not in value:
                try:
                    hint = _parse_plain(value).data
                except _NOT_PLAIN:
                    pass
                else:
                    campaign, prospect = hint.campaign_id, hint.prospect_id
                    if (campaign in latest or _canonical(campaign)) and _ANY_ID.fullmatch(prospect) is not None:
                        latest[campaign] = value
                        continue
            event = _decode(record)
            others.append((record, event))
            if type(event) is StatusHint:
                self.keep_last(event)
        return len(records) - len(others), others

    def _all_plain(self, records: Sequence[Content]) -> bool:
        """Take in all of `records` if each is a plain hint, else none of them. One look at all costs less than many."""
        values = [record.value or b"" for record in records]
        if not values or max(map(len, values)) > PLAIN_BYTES or any(map(_headers, records)):
            return False
        if any(map(contains, values, repeat(BACKSLASH))):
            return False
        try:
            hints = [_parse_plain(value).data for value in values]
        except _NOT_PLAIN:
            return False
        prospects = "".join([f"{hint.prospect_id}," for hint in hints])
        if len(prospects) != len(hints) * _ID_AND_COMMA or not _ANY_IDS.fullmatch(prospects):
            return False  # by their length no id has a comma of its own
        latest = dict(zip([hint.campaign_id for hint in hints], values, strict=True))
        are_known = latest.keys() <= self._plain.keys()
        if not are_known and not all(campaign in self._plain or _canonical(campaign) for campaign in latest):
            return False
        self._plain.update(latest)
        return True

    def keep_last(self, hint: StatusHint) -> None:
        """A campaign is dirty; the ids of a later hint replace those of an earlier one."""
        campaigns = self.settled()
        if hint.cause is not None or hint.campaign_id not in campaigns:
            campaigns[hint.campaign_id] = hint.cause

    def add(self, campaign_id: UUID) -> None:
        """A campaign is dirty, and no hint says why."""
        self._settled.setdefault(campaign_id, None)

    def settled(self) -> dict[UUID, Cause | None]:
        """All of them."""
        self._settle(len(self._plain))
        return self._settled

    def take_first(self, most: int) -> dict[UUID, Cause | None]:
        """Up to `most` of them, the oldest as a rule; they are no longer in here."""
        self._settle(most - len(self._settled))
        return {campaign: self._settled.pop(campaign) for campaign in list(islice(self._settled, most))}

    def _settle(self, most: int) -> None:
        for campaign in list(islice(self._plain, max(0, most))):
            plain = self._plain.pop(campaign)
            if (campaign_id := _canonical(campaign)) is not None:  # it always is: only such are in there
                self._settled[campaign_id] = _parse_plain(plain).cause()


def decode(records: Sequence[Content]) -> list[Decoded]:
    """What each record is; same length and order. Never raises, whatever the bytes are."""
    return [_decode(record) for record in records]


def _decode(record: Content) -> Decoded:
    value = record.value
    if value is None:
        return TOMBSTONE  # in binary mode too
    is_binary = bool(record.headers) and _is_binary(record)
    try:
        event = _binary(record, value) if is_binary else parse_json(value)
    except InvalidEvent as error:
        return DeadLetter(error.reason, error.detail)
    if not is_binary and b"\\" not in value and (hint := _plain_hint(event)):
        return hint
    return _interpret(_Parsed(event, is_binary))


def _plain_hint(event: object) -> StatusHint | None:
    """A status hint in which everything is plainly right, else None: about all others the careful path decides.

    What passes here the careful path takes too, and reads the same; it only costs less. JSON without a backslash holds
    neither U+0000 nor a lone surrogate, so the caller saves us from looking for them in every attribute.
    """
    if type(event) is not dict or event.get("type") != events.STATUS_CHANGED or event.get("specversion") != "1.0":
        return None
    data = event.get("data")
    identity = event.get("id")
    if type(data) is not dict or type(identity) is not str or "data_base64" in event:
        return None
    source, campaign, prospect = event.get("source"), data.get("campaign_id"), data.get("prospect_id")
    from_status, to_status = data.get("from_status"), data.get("to_status")
    if not (
        type(source) is type(campaign) is type(prospect) is type(to_status) is str and identity and source and to_status
    ):
        return None
    if from_status is not None and type(from_status) is not str:
        return None
    campaign_id = campaign_uuid(campaign)
    if campaign_id is None or _ANY_ID.fullmatch(prospect) is None or len(identity) > MAX_CARRIED:
        return None
    if "correlationid" in event or "traceparent" in event:
        return StatusHint(campaign_id, _cause(event))
    return StatusHint(campaign_id, Cause(identity, identity))


def _interpret(parsed: _Parsed) -> Decoded:
    """The careful path: what this event is, in the documented order of reasons."""
    try:
        return _understand(parsed)
    except InvalidEvent as error:
        return DeadLetter(error.reason, error.detail)


def _understand(parsed: _Parsed) -> StatusHint | SyncRequest:
    """What a parsed CloudEvent means. Raises InvalidEvent."""
    event = parsed.event
    if not isinstance(event, dict):
        what = "batch mode is not read: send one event a record" if isinstance(event, list) else "send a JSON object"
        _refuse(DeadLetterReason.NOT_CLOUDEVENT, f"$: expected one CloudEvent; {what}")
    if event.get("specversion") != "1.0":
        where = parsed.attribute("specversion")
        _refuse(DeadLetterReason.NOT_CLOUDEVENT, f'{where}: expected "1.0"; write CloudEvents 1.0')
    if event.get("data_base64") is not None:  # null is the same as absent (CloudEvents JSON format, section 2.1)
        where = parsed.attribute("data_base64")
        _refuse(DeadLetterReason.NOT_CLOUDEVENT, f"{where}: expected nothing; put JSON into data")
    for name, value in event.items():
        if name not in _NOT_KEPT and isinstance(value, str) and not storable(value):
            where = parsed.attribute(name)
            _refuse(
                DeadLetterReason.NOT_CLOUDEVENT,
                f"{where}: expected text without U+0000 or a lone surrogate; remove them",
            )
    for name in ("id", "source", "type"):
        if not isinstance(event.get(name), str) or not event[name]:
            where = parsed.attribute(name)
            _refuse(DeadLetterReason.NOT_CLOUDEVENT, f"{where}: expected a non-empty string; it is required")
    match = _TYPE.fullmatch(event["type"])
    if match is None:
        known = f"{events.STATUS_CHANGED} or {events.SYNC_REQUESTED}"
        where = parsed.attribute("type")
        _refuse(DeadLetterReason.UNKNOWN_TYPE, f"{where}: expected {known}; use one of these or another topic")
    data = event.get("data")
    if not isinstance(data, dict):
        _refuse(
            DeadLetterReason.INVALID_CAMPAIGN_ID,
            f"{'$' if parsed.is_binary else '$.data'}: expected an object; send the data as JSON, with campaign_id",
        )
    campaign = data.get("campaign_id")
    if not isinstance(campaign, str) or _CAMPAIGN_ID.fullmatch(campaign) is None:
        _refuse(
            DeadLetterReason.INVALID_CAMPAIGN_ID,
            f"{parsed.field('campaign_id')}: expected an RFC 9562 UUID (8-4-4-4-12 hex); send the campaign's id",
        )
    campaign_id = UUID(campaign)
    cause = _cause(event) if len(event["id"]) <= MAX_CARRIED else None
    if match.group(2) != "1":
        is_request = match.group(1) == "campaign.sync_requested"
        return StatusHint(campaign_id, None if is_request else cause, newer=True)
    if match.group(1) == "prospect.status_changed":
        _check(events.ProspectStatusChangedV1, data, parsed)
        return StatusHint(campaign_id, cause)
    request = _check(events.CampaignSyncRequestedV1, data, parsed)
    user_id = UUID(request.user_id) if request.user_id is not None else None
    return SyncRequest(campaign_id, user_id, event["source"], cause or _cause(event))


def _check(model: type[Model], data: object, parsed: _Parsed) -> Model:
    try:
        return model.model_validate(data)
    except ValidationError as error:
        problem = error.errors(include_input=False, include_url=False, include_context=False)[0]
    field = str(problem["loc"][0])
    raise InvalidEvent(DeadLetterReason.INVALID_DATA, f"{parsed.field(field)}: {_EXPECTED[field]}")


def _cause(event: Mapping[str, object]) -> Cause:
    identity = str(event["id"])
    correlation = event.get("correlationid")
    traceparent = event.get("traceparent")
    kept = correlation if isinstance(correlation, str) and correlation else identity
    return Cause(
        identity,
        kept if len(kept) <= MAX_CARRIED else "",
        _well_formed(traceparent) if isinstance(traceparent, str) else None,
    )


def _well_formed(traceparent: str) -> str | None:
    """Broken tracing must not kill a good event: what is no W3C traceparent is left out."""
    return traceparent if TRACEPARENT.fullmatch(traceparent) else None


def _is_binary(record: Content) -> bool:
    """Whether there are ce_ headers; with a CloudEvents content type they are copies (Kafka binding, section 3)."""
    is_binary = False
    for name, content in record.headers:
        if name.startswith("ce_"):
            is_binary = True
        elif name.lower() == "content-type" and (content or b"").lower().startswith(b"application/cloudevents"):
            return False
    return is_binary


def _binary(record: Content, value: bytes) -> dict[str, object]:
    """Binary mode: attributes in ce_ headers (of two with one name the last counts), data in the value.

    The value is taken as JSON whatever the content type says: its bytes show whether it is.
    """
    event: dict[str, object] = {}
    for name, content in record.headers:
        if name.startswith("ce_"):
            try:
                event[name.removeprefix("ce_")] = (content or b"").decode("utf-8")
            except UnicodeDecodeError:
                where = _Parsed(None, is_binary=True).attribute(name.removeprefix("ce_"))
                _refuse(DeadLetterReason.NOT_UTF8, f"{where}: expected UTF-8; encode it so")
    data = parse_json(value)
    if "data" in event or "data_base64" in event:  # neither is an attribute: the data is the value
        _refuse(DeadLetterReason.NOT_CLOUDEVENT, "header ce_data: not an attribute; put JSON into the value")
    event["data"] = data
    return event


def parse_json(value: bytes) -> object:
    """Parse with one parser, so that the same bytes always get the same answer. Raises InvalidEvent.

    orjson refuses lone surrogates even in fields that nobody looks at. They are read as U+0000, which may stand exactly
    where a lone surrogate may. (The standard library takes them, but its depth limit moves with the caller's stack.)
    """
    try:
        return orjson.loads(value)
    except orjson.JSONDecodeError as error:
        problem = error
    try:
        value.decode("utf-8")
    except UnicodeDecodeError as error:
        _refuse(DeadLetterReason.NOT_UTF8, f"byte {error.start}: expected UTF-8; encode it so")
    if _SURROGATE.search(value):
        try:
            return orjson.loads(_ESCAPE.sub(_without_lone_surrogate, value))
        except orjson.JSONDecodeError as error:
            problem = error  # at its true place: the replacement is as long as what it replaces
    where = f"line {problem.lineno} column {problem.colno}"
    raise InvalidEvent(
        DeadLetterReason.NOT_JSON,
        f"{where}: expected JSON; write it as in RFC 8259, without NaN, Infinity, huge numbers, more than 1 024 levels "
        "or a byte order mark",
    )


def _without_lone_surrogate(escape: re.Match[bytes]) -> bytes:
    return rb"\u0000" if escape[1] else escape[0]


def _refuse(reason: DeadLetterReason, detail: str) -> NoReturn:
    raise InvalidEvent(reason, detail)


@lru_cache(maxsize=65_536)  # a backlog names the same campaigns again and again
def campaign_uuid(text: str) -> UUID | None:
    """A campaign id as taken at the doors (design, section 2), None for anything else."""
    return UUID(text) if _CAMPAIGN_ID.fullmatch(text) else None


@lru_cache(maxsize=65_536)
def _canonical(text: str) -> UUID | None:
    """A campaign id in lower case, None for anything else: so two spellings never are two campaigns."""
    campaign_id = campaign_uuid(text)
    return campaign_id if campaign_id is not None and str(campaign_id) == text else None


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
        if cause.correlation_id:
            event["correlationid"] = cause.correlation_id
        if cause.traceparent is not None:
            event["traceparent"] = cause.traceparent
    event["data"] = data
    return to_json(event)


def to_json(document: Mapping[str, object]) -> bytes:
    """Compact JSON, keys in the order given."""
    return orjson.dumps(document)


def format_time(moment: datetime) -> str:
    """YYYY-MM-DDTHH:MM:SS[.ffffff]Z, a fraction only if not zero."""
    in_utc = moment if moment.tzinfo is UTC else moment.astimezone(UTC)
    return in_utc.isoformat().removesuffix("+00:00") + "Z"


def dead_letter_headers(record: Record, letter: DeadLetter, now: datetime) -> list[tuple[str, bytes | None]]:
    """The record's own headers, then ours: where it came from, why it is here, since when."""
    return [*record.headers, *_coordinates(record.topic, record.partition, str(record.offset), letter, now)]


def stub_headers(
    topic: str, partition: int, first: int, last: int, letter: DeadLetter, now: datetime
) -> list[tuple[str, bytes | None]]:
    """Headers of a stub for records nobody can hand out; `dead-letter-offset` is `first` or `first-last`."""
    return _coordinates(topic, partition, str(first) if first == last else f"{first}-{last}", letter, now)


def _coordinates(
    topic: str, partition: int, offset: str, letter: DeadLetter, now: datetime
) -> list[tuple[str, bytes | None]]:
    return [
        ("dead-letter-topic", topic.encode()),
        ("dead-letter-partition", str(partition).encode()),
        ("dead-letter-offset", offset.encode()),
        ("dead-letter-reason", letter.reason.encode()),
        ("dead-letter-error", letter.error.encode("utf-8", "replace")),
        ("dead-letter-time", format_time(now).encode()),
    ]
