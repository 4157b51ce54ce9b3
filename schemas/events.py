"""One model per event type and version. CloudEvents 1.0 in JSON; Kafka key = campaign id in lower case = `subject`.

Fields that are absent are left out, never null, unless their type says so. Unknown fields must be ignored by readers.
"""

from datetime import datetime
from enum import StrEnum
from typing import Annotated, Final, Generic, Literal, TypeVar
from uuid import UUID

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints

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


class Trigger(StrEnum):
    """Why a campaign was recounted: the first of these that applies."""

    SYNC_REQUESTED = "sync_requested"
    STATUS_CHANGED = "status_changed"
    RECONCILIATION = "reconciliation"


class RejectionReason(StrEnum):
    """Why a sync request got no counts."""

    NOT_FOUND = "not_found"
    FAILED = "failed"


class PauseReason(StrEnum):
    """Why the guard paused a campaign."""

    BOUNCE_RATE = "bounce_rate"


class DeadLetterReason(StrEnum):
    """Why a record is kept as a dead letter: the first of these that applies."""

    UNREADABLE = "unreadable"
    TOO_LARGE = "too_large"
    NOT_UTF8 = "not_utf8"
    NOT_JSON = "not_json"
    NOT_CLOUDEVENT = "not_cloudevent"
    UNKNOWN_TYPE = "unknown_type"
    INVALID_CAMPAIGN_ID = "invalid_campaign_id"
    INVALID_DATA = "invalid_data"


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


# ^ and $ mean the whole string to pydantic and to JSON Schema; \A and \z would be no ECMA 262.
Storable = Annotated[str, AfterValidator(_stored)]
CampaignId = Annotated[str, StringConstraints(pattern=rf"^{CAMPAIGN_ID_PATTERN}$")]
AnyId = Annotated[str, StringConstraints(pattern=rf"^{ANY_ID_PATTERN}$")]
Count = Annotated[int, Field(ge=0, description="Number of prospects.")]


class Read(BaseModel):
    """Data that the service reads: unknown fields are ignored, types are not converted."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)


class _Written(BaseModel):
    """Unknown fields are ignored, because subscribers read with these models and fields may be added."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class ProspectStatusChangedV1(Read):
    """Data of `prospect.status_changed.v1`: a hint that a campaign is dirty. Publish it after your own commit.

    Only `campaign_id` decides anything: the counts come from the rows, so a hint may be late, doubled or wrong.
    """

    campaign_id: CampaignId = Field(description="The campaign that is dirty.")
    prospect_id: AnyId = Field(description="The prospect that moved.")
    from_status: str | None = Field(default=None, description="Status before; absent for a new prospect.")
    to_status: Annotated[Storable, StringConstraints(min_length=1)] = Field(description="Status after.")
    user_id: object = Field(default=None, description="Not looked at in a hint.")


class CampaignSyncRequestedV1(Read):
    """Data of `campaign.sync_requested.v1`: recount this campaign and answer.

    The answer is a stats_updated or a sync_rejected whose `causationid` is this event's id.
    """

    campaign_id: CampaignId = Field(description="The campaign to recount.")
    user_id: AnyId | None = Field(default=None, description="If given, it must own the campaign, else `not_found`.")
    reason: str | None = Field(default=None, description="For people; not looked at.")


class Stats(_Written):
    """Exclusive counts; the first four always, the others only when not zero. `total` = number of prospects."""

    total: Count
    sent: Count
    replied: Count
    bounced: Count
    completed: Count | None = None
    timed_out: Count | None = None
    connection_sent: Count | None = None
    connected: Count | None = None
    message_sent: Count | None = None


class Campaign(_Written):
    """The campaign's row as after the guard. Times are RFC 3339 in UTC."""

    id: UUID
    user_id: UUID
    type: Literal["email", "linkedin"]
    name: str
    status: str = Field(description="draft, launching, active, paused, completed; treat others as unknown.")
    daily_limit: int | None
    stop_on_reply: bool | None
    open_tracking: bool | None
    skip_other_campaigns: object
    stats: Stats
    last_synced_at: datetime
    pause_reason: str | None
    created_at: datetime | None
    updated_at: datetime | None


class CampaignStatsUpdatedV1(_Written):
    """Data of `campaign.stats_updated.v1`: news (numbers or status changed) or the answer to a sync request."""

    campaign: Campaign
    prospects_by_status: dict[str, Count] | None = Field(
        default=None, description="Status -> prospects, zero counts left out; absent when there are no prospects."
    )
    version: int = Field(
        description="Rises with everything told of a campaign; drop what is not newer. Gaps are normal."
    )
    trigger: Trigger
    drift: dict[str, int] | None = Field(
        default=None, description="Truth minus stored, when the sweep had found the stored numbers wrong; else absent."
    )


class CampaignSyncRejectedV1(_Written):
    """Data of `campaign.sync_rejected.v1`: the sync request named in `causationid` gets no counts."""

    campaign_id: UUID
    reason: RejectionReason


class CampaignPausedV1(_Written):
    """Data of `campaign.paused.v1`: the bounce guard paused a campaign. At least once, always under the same id."""

    campaign_id: UUID
    user_id: UUID
    reason: PauseReason
    version: int = Field(description="The same as of the stats_updated that comes with it.")
    sent: Count = Field(description="Contacted prospects in the window.")
    bounced: Count = Field(description="How many of those bounced.")
    rate_bp: int = Field(description="Bounce rate in basis points, floored.")
    threshold_bp: int = Field(description="Basis points from which the guard pauses.")
    min_sent: int = Field(description="Contacts below which the guard does not judge.")
    window: int = Field(description="Latest contacts looked at; 0 = all.")
    previous_status: Literal["active"]
    prospects_by_status: dict[str, Count]
    pending: Count = Field(description="Prospects that will not be contacted until somebody resumes.")
    paused_at: datetime


Data = TypeVar("Data", bound=BaseModel)


class Envelope(_Written, Generic[Data]):
    """A whole event as the service writes it: `Envelope[CampaignPausedV1].model_validate_json(value)`."""

    specversion: Literal["1.0"]
    id: str = Field(description="The same for the same fact, however often it is told.")
    source: Literal["campaign-stats"]
    type: str
    time: datetime
    subject: UUID = Field(description="The campaign's id, also the Kafka key.")
    datacontenttype: Literal["application/json"]
    causationid: str | None = Field(default=None, description="Id of the hint or request it follows from, if any.")
    correlationid: str | None = Field(default=None, description="The correlationid of that event, or else its id.")
    traceparent: str | None = Field(default=None, description="W3C trace context of that event, if it had one.")
    data: Data
