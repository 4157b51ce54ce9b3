"""Valid values; a test overrides only the fields it is about."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import TypeVar
from uuid import UUID, uuid5

import msgspec
import msgspec.structs

from consumer.envelope import Cause, StatusHint, SyncRequest
from consumer.generation import Partition, Work
from consumer.guard import Limits, Resolved, Verdict, Window
from consumer.outcome import Campaign, Held, Judgement, OutboxRow, Recount
from schemas.events import Trigger

T = TypeVar("T")

CAMPAIGN = UUID("8c2b2d4e-e29b-41d4-a716-446655440000")
OWNER = UUID("11111111-1111-1111-1111-111111111111")
STRANGER = UUID("22222222-2222-2222-2222-222222222222")
PROSPECT = UUID("33333333-3333-3333-3333-333333333333")
NOW = datetime(2026, 4, 22, 11, 30, 0, 250_000, tzinfo=UTC)
NOW_MICROSECONDS = 1_776_857_400_250_000  # NOW, computed with date(1)
EARLIER = NOW - timedelta(minutes=5)
TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
REFERENCE_COUNTS = {"pending": 81, "sent": 34, "replied": 4, "bounced": 1}
REFERENCE_STATS = {"total": 120, "sent": 34, "replied": 4, "bounced": 1}


def campaign_id(number: int) -> UUID:
    """A campaign id of its own for each number."""
    return uuid5(CAMPAIGN, str(number))


def changed(value: T, **fields: object) -> T:
    """`value` with other fields; the names are checked by the class itself."""
    if isinstance(value, msgspec.Struct):
        return msgspec.structs.replace(value, **fields)
    return replace(value, **fields)  # type: ignore[type-var, return-value, unused-ignore]  # else a dataclass


def cause(name: str = "hint-1", **fields: object) -> Cause:
    """What a status hint leaves behind."""
    return changed(Cause(name, f"correlation-{name}", TRACE), **fields)


def hint(number: int = 0, name: str = "hint-1") -> StatusHint:
    """A status hint for the campaign of that number."""
    return StatusHint(campaign_id(number), cause(name))


def request(**fields: object) -> SyncRequest:
    """The owner asks for a recount of CAMPAIGN."""
    return changed(SyncRequest(CAMPAIGN, OWNER, "product", cause("request-1")), **fields)


def work(**fields: object) -> Work:
    """CAMPAIGN is dirty because of a status hint."""
    return changed(Work(CAMPAIGN, Trigger.STATUS_CHANGED, hint=cause()), **fields)


def campaign(**fields: object) -> Campaign:
    """The reference case."""
    return changed(
        Campaign(
            id=CAMPAIGN,
            user_id=OWNER,
            type="email",
            name="Q2 Enterprise Outreach",
            status="active",
            daily_limit=50,
            stop_on_reply=True,
            open_tracking=True,
            skip_other_campaigns=None,
            stats=dict(reversed(REFERENCE_STATS.items())),  # jsonb keeps no order
            last_synced_at=NOW,
            pause_reason=None,
            created_at=datetime(2026, 4, 18, 15, 12, tzinfo=UTC),
            updated_at=datetime(2026, 4, 22, 11, 30, tzinfo=UTC),
        ),
        **fields,
    )


def recount(**fields: object) -> Recount:
    """The reference case, recounted for the second time, nothing new."""
    return changed(
        Recount(
            campaign=campaign(),
            counts=REFERENCE_COUNTS,
            drift={},
            synced_before=EARLIER,
            counted_at=NOW,
            version=7,
            published_counts=REFERENCE_COUNTS,
            published_status="active",
            guard_paused_at=None,
            observed_trip=False,
            last_total=120,
            failures=0,
            user_limits=None,
            campaign_limits=None,
        ),
        **fields,
    )


def held(**fields: object) -> Held:
    """CAMPAIGN exists, but somebody has its row."""
    return changed(Held(CAMPAIGN, OWNER, "locked", None, 0, NOW), **fields)


def judgement(verdict: Verdict = Verdict.BELOW_RATE, limits: Limits | None = None, **fields: object) -> Judgement:
    """The guard looked at 120 contacts, 6 of them bounced."""
    return changed(
        Judgement(
            verdict=verdict,
            window=Window(120, 6),
            resolved=Resolved(
                limits or Limits(),
                {"mode": "default", "threshold_bp": "default", "min_sent": "default", "window": "default"},
            ),
            opened_at=None,
            oldest_contact=EARLIER,
            newest_contact=NOW,
            decided_at=NOW,
        ),
        **fields,
    )


def pause(**fields: object) -> Judgement:
    """The guard tripped and paused the campaign."""
    paused = campaign(status="paused", pause_reason="bounce_rate", updated_at=NOW)
    return changed(judgement(Verdict.TRIP, paused_at=NOW, campaign=paused), **fields)


def event_of(row: OutboxRow) -> dict[str, object]:
    """The event in an outbox row."""
    event = json.loads(row.event)
    assert isinstance(event, dict)
    return event


def data_of(row: OutboxRow) -> dict[str, object]:
    """The data of the event in an outbox row."""
    data = event_of(row)["data"]
    assert isinstance(data, dict)
    return data


@dataclass(frozen=True, slots=True)
class Bytes:
    """A record from Kafka."""

    value: bytes | None = b"{}"
    headers: tuple[tuple[str, bytes], ...] = ()
    key: bytes | None = None
    topic: str = "prospect.status-changed"
    partition: int = 0
    offset: int = 0
    timestamp: int = 1_776_857_400_000


@dataclass(frozen=True, slots=True)
class Batch:
    """What one poll brings from one partition."""

    partition: Partition
    records: Sequence[Bytes]
    next_offset: int


def hint_event(number: int = 0, **attributes: object) -> dict[str, object]:
    """A status hint as a producer writes it."""
    return {
        "specversion": "1.0",
        "id": "hint-1",
        "source": "product",
        "type": "prospect.status_changed.v1",
        "data": {"campaign_id": str(campaign_id(number)), "prospect_id": str(PROSPECT), "to_status": "sent"},
        **attributes,
    }


def request_event(number: int = 0, **attributes: object) -> dict[str, object]:
    """A sync request as a producer writes it."""
    data = {"campaign_id": str(campaign_id(number))}
    return {**hint_event(), "id": "request-1", "type": "campaign.sync_requested.v1", "data": data, **attributes}


def structured(event: Mapping[str, object], **fields: object) -> Bytes:
    """A record in structured mode."""
    return changed(Bytes(json.dumps(event).encode()), **fields)
