"""One model per event type and version. CloudEvents 1.0 in JSON; Kafka key = campaign id in lower case = `subject`.

Fields that are absent are left out, never null, unless their type says so. Unknown fields must be ignored by readers,
and so must what is special about a value of a list that they do not know: the models take any text there.
The JSON Schemas in `schemas/json` are made from these models: `x-listed` and `x-writer` below are where what a writer
may send is narrower than what a reader must take.
"""

from enum import StrEnum
from typing import Annotated, Final, Generic, Literal, TypeVar
from uuid import UUID

from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    StringConstraints,
    WithJsonSchema,
)

STATUS_CHANGED: Final = "prospect.status_changed.v1"
SYNC_REQUESTED: Final = "campaign.sync_requested.v1"
STATS_UPDATED: Final = "campaign.stats_updated.v1"
SYNC_REJECTED: Final = "campaign.sync_rejected.v1"
PAUSED: Final = "campaign.paused.v1"

CAMPAIGN_ID_PATTERN: Final = (
    r"(?:[0-9a-fA-F]{8}-[0-9a-fA-F]{4}-[1-8][0-9a-fA-F]{3}-[89abAB][0-9a-fA-F]{3}-[0-9a-fA-F]{12}"
    r"|00000000-0000-0000-0000-000000000000|[fF]{8}-[fF]{4}-[fF]{4}-[fF]{4}-[fF]{12})"
)
"""RFC 9562 UUID, versions 1-8 with the RFC variant, or nil or max; the whole string must match."""

ANY_ID_PATTERN: Final = r"[0-9a-fA-F]{8}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{12}"
"""User and prospect ids: any 8-4-4-4-12 hex; the whole string must match."""

LOWER_ID_PATTERN: Final = r"^[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}$"
"""Any id as the service writes it: whatever UUID the tables hold, in lower case."""

NO_NUL: Final = r"^[^\u0000]*$"
"""Text without U+0000; that lone surrogates are refused too no JSON Schema can say."""

TRACEPARENT_PATTERN: Final = r"^[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}$"
"""W3C Trace Context, without its forbidden values (version ff, ids of zeros), which a writer never has."""


class Listed(StrEnum):
    """A closed list for writers, which may grow: whoever reads treats a value it does not know as no special case."""

    meaning: str

    def __new__(cls, value: str, meaning: str = "") -> "Listed":
        """A member is its text; `meaning` says in a sentence what it stands for."""
        member = str.__new__(cls, value)
        member._value_ = value
        member.meaning = meaning
        return member


class Trigger(Listed):
    """Why a campaign was recounted: the first of these that applies."""

    SYNC_REQUESTED = ("sync_requested", "Somebody asked, by an event or over HTTP.")
    STATUS_CHANGED = ("status_changed", "A prospect changed: a status hint or a change record.")
    RECONCILIATION = ("reconciliation", "The sweep or an operator found a difference.")


class RejectionReason(Listed):
    """Why a sync request got no counts."""

    NOT_FOUND = ("not_found", "There is no such campaign, or it belongs to another user. Do not ask again.")
    FAILED = ("failed", "The campaign's rows cannot be recounted now; its operators know. Ask again later.")


class PauseReason(Listed):
    """Why the guard paused a campaign."""

    BOUNCE_RATE = ("bounce_rate", "Of the latest contacts at least `threshold_bp` basis points bounced.")


class DeadLetterReason(Listed):
    """Why a record is kept as a dead letter: the first of these that applies."""

    UNREADABLE = (
        "unreadable",
        "Kafka's client cannot hand it out: a checksum, a header name that is not UTF-8. Coordinates only.",
    )
    TOO_LARGE = (
        "too_large",
        "It unpacks to more than is read, or its dead letter would not fit its topic. Coordinates only.",
    )
    NOT_UTF8 = ("not_utf8", "The value, or a `ce_` header, is not UTF-8.")
    NOT_JSON = ("not_json", "The value is not JSON as in RFC 8259; NaN and Infinity are none.")
    NOT_CLOUDEVENT = (
        "not_cloudevent",
        "No CloudEvent 1.0 with `id`, `source` and `type`; also batches and `data_base64`.",
    )
    UNKNOWN_TYPE = ("unknown_type", "A type that the service does not read.")
    INVALID_CAMPAIGN_ID = ("invalid_campaign_id", "`campaign_id` is missing or no RFC 9562 UUID.")
    INVALID_DATA = (
        "invalid_data",
        "Another field is missing or of a wrong kind; also a change record that names no campaign.",
    )


def storable(text: str) -> bool:
    """Whether PostgreSQL can store it: neither U+0000 nor a lone surrogate."""
    if "\x00" in text:
        return False
    try:
        text.encode()  # fast also for megabytes
    except UnicodeEncodeError:
        return False
    return True


def _stored(text: str) -> str:
    if not storable(text):
        raise ValueError("must not contain U+0000 or a lone surrogate")
    return text


def _listed(values: type[Listed] | tuple[str, ...]) -> WithJsonSchema:
    """A list that may grow: writers send one of these, readers take any text."""
    return WithJsonSchema({"type": "string", "x-listed": [str(value) for value in values]})


def _writer(narrower: dict[str, JsonValue]) -> dict[str, JsonValue]:
    """What a writer may send where a reader takes more."""
    return {"x-writer": narrower}


def _kept(narrower: dict[str, JsonValue]) -> dict[str, JsonValue]:
    """An attribute that is not looked at but kept, so text in it must be storable."""
    return {"pattern": NO_NUL, **_writer(narrower)}


# ^ and $ mean the whole string to pydantic and to JSON Schema; \A and \z would be no ECMA 262.
Storable = Annotated[str, AfterValidator(_stored)]
StorableText = Annotated[Storable, StringConstraints(min_length=1), Field(json_schema_extra={"pattern": NO_NUL})]
CampaignId = Annotated[str, StringConstraints(pattern=rf"^{CAMPAIGN_ID_PATTERN}$")]
AnyId = Annotated[str, StringConstraints(pattern=rf"^{ANY_ID_PATTERN}$")]
Count = Annotated[int, Field(ge=0)]
LowerId = Annotated[UUID, Field(json_schema_extra=_writer({"pattern": LOWER_ID_PATTERN}))]
Moment = Annotated[
    AwareDatetime,
    Field(json_schema_extra=_writer({"pattern": r"^\d{4}-\d{2}-\d{2}T\d{2}:\d{2}:\d{2}(?:\.\d{6})?Z$"})),
]
AnyTrigger = Annotated[Trigger | str, Field(union_mode="left_to_right"), _listed(Trigger)]
AnyRejection = Annotated[RejectionReason | str, Field(union_mode="left_to_right"), _listed(RejectionReason)]
AnyPause = Annotated[PauseReason | str, Field(union_mode="left_to_right"), _listed(PauseReason)]
CampaignType = Annotated[str, _listed(("email", "linkedin"))]
PreviousStatus = Annotated[str, _listed(("active",))]


class Read(BaseModel):
    """Data that the service reads: unknown fields are ignored, types are not converted."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)


class _Written(BaseModel):
    """Unknown fields are ignored, because subscribers read with these models and fields may be added."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class ProspectStatusChangedV1(Read):
    """A hint that a campaign is dirty. Publish it after your own commit.

    Only `campaign_id` decides anything: the counts come from the rows, so a hint may be late, doubled or wrong.
    """

    campaign_id: CampaignId = Field(description="The campaign that is dirty; RFC 9562 UUID, upper or lower case.")
    prospect_id: AnyId = Field(description="The prospect that moved; 8-4-4-4-12 hex.")
    from_status: str | None = Field(default=None, description="Status before; absent for a new prospect.")
    to_status: StorableText = Field(
        description="Status after; any text, also a status the service does not know. No U+0000, no lone surrogate."
    )
    user_id: object = Field(
        default=None,
        description="Not looked at in a hint; may be left out.",
        json_schema_extra=_writer({"type": "string", "pattern": rf"^{ANY_ID_PATTERN}$"}),
    )


class CampaignSyncRequestedV1(Read):
    """Recount this campaign and answer.

    The answer is a stats_updated or a sync_rejected whose `causationid` is this event's `id`.
    """

    campaign_id: CampaignId = Field(description="The campaign to recount; RFC 9562 UUID, upper or lower case.")
    user_id: AnyId | None = Field(
        default=None, description="If given, it must own the campaign, else the answer is `not_found`."
    )
    reason: str | None = Field(default=None, description="For people; not looked at. Absent if there is none.")


class Stats(_Written):
    """Exclusive counts of prospects: the first four always, the others only when not zero."""

    total: Count = Field(description="All prospects of the campaign, also those of a status without a key here.")
    sent: Count = Field(description="Prospects whose status is `sent`: mailed, nothing heard yet.")
    replied: Count = Field(description="Prospects whose status is `replied`.")
    bounced: Count = Field(description="Prospects whose status is `bounced`.")
    completed: Count | None = Field(
        default=None, description="Prospects whose status is `completed`; absent when there are none."
    )
    timed_out: Count | None = Field(
        default=None, description="Prospects whose status is `timed_out`; absent when there are none."
    )
    connection_sent: Count | None = Field(
        default=None, description="Prospects whose status is `connection_sent` (LinkedIn); absent when there are none."
    )
    connected: Count | None = Field(
        default=None, description="Prospects whose status is `connected` (LinkedIn); absent when there are none."
    )
    message_sent: Count | None = Field(
        default=None, description="Prospects whose status is `message_sent` (LinkedIn); absent when there are none."
    )


class Campaign(_Written):
    """The campaign's row as after the guard. Times are RFC 3339 in UTC."""

    id: LowerId = Field(description="The campaign, in lower case.")
    user_id: LowerId = Field(description="Its owner, in lower case.")
    type: CampaignType = Field(description="`email` or `linkedin`; only email campaigns are paused.")
    name: str = Field(description="As its owner calls it.")
    status: str = Field(description="draft, launching, active, paused, completed; treat others as unknown.")
    daily_limit: int | None = Field(description="Prospects a day as the product has it; null = none set.")
    stop_on_reply: bool | None = Field(description="As the product has it; null = not set.")
    open_tracking: bool | None = Field(description="As the product has it; null = not set.")
    skip_other_campaigns: object = Field(description="As the product has it: any JSON, also null.")
    stats: Stats = Field(description="As they now stand in `campaigns.stats`.")
    last_synced_at: Moment = Field(description="When it was last recounted; never goes back.")
    pause_reason: str | None = Field(description="`bounce_rate` when the guard paused it; the product clears it.")
    created_at: Moment | None = Field(description="As the product has it; null = not set.")
    updated_at: Moment | None = Field(description="When stats or status last changed.")


class CampaignStatsUpdatedV1(_Written):
    """News (numbers or status differ from what was last published) or the answer to a sync request.

    Keep the `version` of each campaign and drop what is not newer; an answer is matched by `causationid` first.
    """

    campaign: Campaign = Field(description="The campaign's row as after the guard.")
    prospects_by_status: dict[str, Count] | None = Field(
        default=None,
        description="Status -> number of prospects, zero counts left out; absent when the campaign has no prospects.",
    )
    version: int = Field(
        description="Rises with everything told of a campaign; drop what is not newer. Gaps are normal; microseconds "
        "since 1970 or more."
    )
    trigger: AnyTrigger = Field(description="Why it was recounted; treat an unknown one as no special case.")
    drift: dict[str, int] | None = Field(
        default=None,
        description="Stats key -> truth minus stored, non-zero only; absent unless the stored numbers had drifted.",
    )


class CampaignSyncRejectedV1(_Written):
    """The sync request named in `causationid` gets no counts."""

    campaign_id: LowerId = Field(description="The campaign asked for, in lower case.")
    reason: AnyRejection = Field(
        description="`not_found`: none of yours, do not ask again; `failed`, or one you do not know: ask again later."
    )


class CampaignPausedV1(_Written):
    """The bounce guard paused a campaign. At least once, always under the same `id`: react once per id."""

    campaign_id: LowerId = Field(description="The campaign, in lower case.")
    user_id: LowerId = Field(description="Its owner, in lower case.")
    reason: AnyPause = Field(description="Why it was paused; treat an unknown one as a pause like any other.")
    version: int = Field(description="The same as of the stats_updated that comes with it.")
    sent: Count = Field(description="Contacted prospects in the window.")
    bounced: Count = Field(description="How many of those bounced.")
    rate_bp: Count = Field(description="Bounce rate in basis points (500 = 5 %), floored.")
    threshold_bp: Count = Field(description="Basis points from which the guard pauses.")
    min_sent: Count = Field(description="Contacts below which the guard does not judge.")
    window: Count = Field(description="Latest contacts looked at; 0 = all.")
    previous_status: PreviousStatus = Field(description="Status before the pause.")
    prospects_by_status: dict[str, Count] = Field(description="Status -> number of prospects, zero counts left out.")
    pending: Count = Field(description="Prospects that will not be contacted until somebody resumes.")
    paused_at: Moment = Field(description="When it was paused, UTC; prospects contacted later open the next window.")


Data = TypeVar("Data", bound=BaseModel)


class Envelope(_Written, Generic[Data]):
    """A whole event as the service writes it: `Envelope[CampaignPausedV1].model_validate_json(value)`."""

    specversion: Literal["1.0"] = Field(description="CloudEvents 1.0.")
    id: str = Field(description="The same for the same fact, however often it is told.")
    source: Literal["campaign-stats"] = Field(description="Always the same.")
    type: str = Field(description="Event type and version; it decides, not the topic.")
    time: Moment = Field(description="When the fact became true.")
    subject: LowerId = Field(description="The campaign's id, also the Kafka key.")
    datacontenttype: Literal["application/json"] = Field(description="Always the same.")
    causationid: str | None = Field(
        default=None, description="Id of the hint or request it follows from; absent if there is none."
    )
    correlationid: str | None = Field(
        default=None, description="The correlationid of that event, or else its id; absent if there is none."
    )
    traceparent: str | None = Field(default=None, description="W3C trace context of that event; absent if it had none.")
    data: Data = Field(description="What the event says.")


class Incoming(Read, Generic[Data]):
    """A whole event as you may write it; all attributes of CloudEvents 1.0, and extensions of your own."""

    specversion: Literal["1.0"] = Field(description="CloudEvents 1.0.")
    id: StorableText = Field(
        description="Yours, unique within `source`; a repeat with the same id is the same event. Longer than "
        "1 024 characters it does not travel on."
    )
    source: StorableText = Field(description="Who says so, a URI reference, e.g. `/product/engine`.")
    type: str = Field(description="Event type and version; it decides, not the topic.")
    time: object = Field(
        default=None,
        description="RFC 3339; not looked at: no clock in an event decides anything.",
        json_schema_extra=_writer({"type": "string", "format": "date-time"}),
    )
    subject: object = Field(
        default=None,
        description="The campaign's id; not looked at, `data.campaign_id` decides.",
        json_schema_extra=_writer({"type": "string", "minLength": 1}),
    )
    datacontenttype: object = Field(
        default=None,
        description="`application/json`; not looked at.",
        json_schema_extra=_writer({"const": "application/json"}),
    )
    dataschema: object = Field(
        default=None,
        description="Not looked at.",
        json_schema_extra=_writer({"type": "string", "format": "uri", "minLength": 1}),
    )
    correlationid: object = Field(
        default=None,
        description="Text; travels on to what follows. Longer than 1 024 characters it does not.",
        json_schema_extra=_kept({"type": "string", "minLength": 1}),
    )
    causationid: object = Field(
        default=None, description="Text; not looked at.", json_schema_extra=_kept({"type": "string", "minLength": 1})
    )
    traceparent: object = Field(
        default=None,
        description="W3C trace context; travels on if well formed.",
        json_schema_extra=_kept({"type": "string", "pattern": TRACEPARENT_PATTERN}),
    )
    tracestate: object = Field(
        default=None, description="W3C trace state; not looked at.", json_schema_extra=_kept({"type": "string"})
    )
    data: Data = Field(description="What the event says.")
