"""The sync-stats door, `POST /api/campaigns/{id}/sync-stats`: the shape of its answer and every error it has."""

from dataclasses import dataclass
from typing import Final

from pydantic import BaseModel, ConfigDict, Field

from schemas.events import CampaignType, Count, LowerId, Moment, Stats

PATH: Final = "/api/campaigns/{id}/sync-stats"
MAX_BODY_BYTES: Final = 1024
"""The body is ignored, so a large one is a mistake."""


class _Answered(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class SenderAccount(_Answered):
    """An account that the campaign sends from."""

    id: LowerId = Field(description="The account, in lower case.")
    type: str | None = Field(description="As the product has it, e.g. `gmail`; null = not set.")
    email_address: str | None = Field(description="Null for an account without one, e.g. LinkedIn.")
    display_name: str | None = Field(description="As its owner calls it; null = not set.")
    status: str | None = Field(description="As the product has it; null = not set.")
    daily_limit: int | None = Field(description="Messages a day as the product has it; null = none set.")


class SyncedCampaign(_Answered):
    """The campaign's row as after the guard, for its owner: more than the events tell, whose readers are many."""

    id: LowerId = Field(description="The campaign, in lower case.")
    user_id: LowerId = Field(description="Its owner, in lower case.")
    type: CampaignType = Field(description="`email` or `linkedin`; only email campaigns are paused.")
    name: str = Field(description="As its owner calls it.")
    status: str = Field(description="draft, launching, active, paused, completed; treat others as unknown.")
    daily_limit: int | None = Field(description="Prospects a day as the product has it; null = none set.")
    stop_on_reply: bool | None = Field(description="As the product has it; null = not set.")
    open_tracking: bool | None = Field(description="As the product has it; null = not set.")
    signature: str | None = Field(description="As the product has it; null = not set.")
    skip_other_campaigns: object = Field(description="As the product has it: any JSON, also null.")
    operating_hours: object = Field(description="As the product has it: any JSON, also null.")
    stats: Stats = Field(description="As they now stand in `campaigns.stats`.")
    last_synced_at: Moment = Field(description="When it was last recounted: by this call, or one that came with it.")
    pause_reason: str | None = Field(description="`bounce_rate` when the guard paused it; the product clears it.")
    created_at: Moment | None = Field(description="As the product has it; null = not set.")
    updated_at: Moment | None = Field(description="When stats or status last changed.")
    sender_accounts: list[SenderAccount] = Field(description="By id; empty when it has none.")


class SyncStatsAnswer(_Answered):
    """The campaign just recounted."""

    campaign: SyncedCampaign = Field(description="The campaign's row as after the guard.")
    prospects_by_status: dict[str, Count] | None = Field(
        default=None,
        description="Status -> number of prospects, zero counts left out; absent when the campaign has no prospects.",
    )


class DoorError(_Answered):
    """Every answer but 200."""

    error: str = Field(description="One sentence: what is wrong and what to do.")


BAD_ID: Final = "the campaign id is no RFC 9562 UUID (8-4-4-4-12 hex); send the campaign's id"
NO_HTTP: Final = "this is no HTTP request that can be read; send HTTP/1.1"
UNAUTHORIZED: Final = "send Authorization: Bearer and a token of this service"
NO_CAMPAIGN: Final = "there is no such campaign; do not ask again"
NO_PATH: Final = "there is nothing here; send POST /api/campaigns/{id}/sync-stats"
NO_POST: Final = "only POST is taken here; send POST"
TOO_SLOW: Final = "the body did not arrive within 10 s; send none, it is ignored"
TOO_LONG: Final = f"the body is ignored; send none, or at most {MAX_BODY_BYTES} bytes"
TOO_OFTEN: Final = "too many calls with this token; wait as long as Retry-After says"
BROKEN: Final = "this call failed here and the log says why; tell the operators"
LOCKED: Final = "somebody else is changing this campaign; ask again after Retry-After"
FAILING: Final = "this campaign cannot be recounted now; ask again after Retry-After"
STOPPING: Final = "this process is stopping; ask again after Retry-After"
AWAY: Final = "the database is away; ask again after Retry-After"


@dataclass(frozen=True, slots=True)
class Refusal:
    """An answer but 200: when it comes, what to do, a header that comes with it, and all sentences it may have."""

    status: int
    when: str
    action: str
    header: str | None
    sentences: tuple[str, ...]


REFUSALS: Final = (
    Refusal(
        400,
        "The id in the path is no campaign id, or the bytes are no HTTP.",
        "Send the campaign's id: RFC 9562, 8-4-4-4-12 hex.",
        None,
        (BAD_ID, NO_HTTP),
    ),
    Refusal(
        401,
        "No token, or none of this service's; looked at before anything else under /api.",
        "Send `Authorization: Bearer` and your token.",
        "WWW-Authenticate",
        (UNAUTHORIZED,),
    ),
    Refusal(
        404,
        "There is no such campaign, or it belongs to somebody else than the token; also every other path.",
        "Do not ask again.",
        None,
        (NO_CAMPAIGN, NO_PATH),
    ),
    Refusal(405, "Another method than POST.", "Use POST.", "Allow", (NO_POST,)),
    Refusal(408, "The body did not arrive within 10 s.", "Send none: it is ignored.", None, (TOO_SLOW,)),
    Refusal(413, f"The body has more than {MAX_BODY_BYTES} bytes.", "Send none: it is ignored.", None, (TOO_LONG,)),
    Refusal(
        429,
        "Too many calls with this token in a minute.",
        "Wait as long as `Retry-After` says.",
        "Retry-After",
        (TOO_OFTEN,),
    ),
    Refusal(
        500,
        "The service failed in a way it has no name for; its log says how.",
        "Tell its operators.",
        None,
        (BROKEN,),
    ),
    Refusal(
        503,
        "The database is away, the campaign was locked for 5 s by somebody else or cannot be recounted now, or this "
        "process is stopping.",
        "Wait as long as `Retry-After` says, then ask again: a repeated call does no harm.",
        "Retry-After",
        (AWAY, LOCKED, FAILING, STOPPING),
    ),
)

EXAMPLE: Final = SyncStatsAnswer.model_validate_json(
    """{"campaign": {"id": "8c2b2d4e-e29b-41d4-a716-446655440000", "user_id": "11111111-1111-1111-1111-111111111111",
    "type": "email", "name": "Q2 Enterprise Outreach", "status": "active", "daily_limit": 50, "stop_on_reply": true,
    "open_tracking": true, "signature": "Best regards", "skip_other_campaigns": null, "operating_hours": null,
    "stats": {"total": 120, "sent": 34, "replied": 4, "bounced": 1}, "last_synced_at": "2026-04-22T11:30:00.250000Z",
    "pause_reason": null, "created_at": "2026-04-18T15:12:00Z", "updated_at": "2026-04-22T11:30:00.250000Z",
    "sender_accounts": [{"id": "3f1f4d8e-3d2b-4a6e-8a55-9b7f6c1d2e3f", "type": "gmail",
    "email_address": "sales@example.com", "display_name": "Sales", "status": "connected", "daily_limit": 80}]},
    "prospects_by_status": {"pending": 81, "sent": 34, "replied": 4, "bounced": 1}}"""
)
