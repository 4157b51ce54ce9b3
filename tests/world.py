"""What the product does: campaigns, prospects, hints and requests, written down once for all tests."""

import random
from collections.abc import Mapping
from typing import Any
from uuid import UUID, uuid4

import asyncpg

USER = UUID("11111111-1111-1111-1111-111111111111")
REFERENCE = {"pending": 81, "sent": 34, "replied": 4, "bounced": 1}


async def add_campaign(
    db: asyncpg.Connection,
    prospects: Mapping[str, int] | None = None,
    *,
    id: UUID | None = None,
    type: str = "email",
    status: str = "active",
    user_id: UUID = USER,
    stats: object = None,
) -> UUID:
    """A campaign with this many prospects per status, contacted just now where the status says so."""
    campaign_id = id or uuid4()
    await db.execute(
        "INSERT INTO campaigns (id, user_id, type, name, status, stats) VALUES ($1, $2, $3, 'Spring', $4, $5)",
        campaign_id,
        user_id,
        type,
        status,
        {} if stats is None else stats,
    )
    for prospect_status, count in (prospects or {}).items():
        await add_prospects(db, campaign_id, prospect_status, count, user_id=user_id)
    return campaign_id


async def add_prospects(
    db: asyncpg.Connection, campaign_id: UUID, status: str, count: int, *, user_id: UUID = USER
) -> list[UUID]:
    """Prospects of one status; their ids."""
    rows = await db.fetch(
        "INSERT INTO campaign_prospects (campaign_id, user_id, status)"
        " SELECT $1, $2, $3 FROM generate_series(1, $4) RETURNING id",
        campaign_id,
        user_id,
        status,
        count,
    )
    return [row["id"] for row in rows]


async def truth(db: asyncpg.Connection, campaign_id: UUID) -> dict[str, int]:
    """Status -> count, counted here from the bare rows."""
    counts: dict[str, int] = {}
    for row in await db.fetch("SELECT status FROM campaign_prospects WHERE campaign_id = $1", campaign_id):
        counts[row["status"]] = counts.get(row["status"], 0) + 1
    return counts


async def stats_of(db: asyncpg.Connection, campaign_id: UUID) -> Any:
    """The stored stats."""
    return await db.fetchval("SELECT stats FROM campaigns WHERE id = $1", campaign_id)


def expected_stats(counts: Mapping[str, int]) -> dict[str, int]:
    """Stats by the words of the design, in Python."""
    stats = {"total": sum(counts.values())}
    for status in ("sent", "replied", "bounced"):
        stats[status] = counts.get(status, 0)
    for status in ("completed", "timed_out", "connection_sent", "connected", "message_sent"):
        if counts.get(status):
            stats[status] = counts[status]
    return stats


def hint(campaign_id: UUID | str, **changes: Any) -> dict[str, Any]:
    """A valid prospect.status_changed.v1 in structured mode; keywords override attributes, `data` merges."""
    data = {"campaign_id": str(campaign_id), "prospect_id": str(uuid4()), "from_status": "pending", "to_status": "sent"}
    return _event("prospect.status_changed.v1", campaign_id, data, changes)


def sync_request(campaign_id: UUID | str, **changes: Any) -> dict[str, Any]:
    """A valid campaign.sync_requested.v1 in structured mode."""
    return _event("campaign.sync_requested.v1", campaign_id, {"campaign_id": str(campaign_id)}, changes)


def _event(type_: str, campaign_id: UUID | str, data: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    return {
        "specversion": "1.0",
        "id": f"e-{random.getrandbits(64):016x}",
        "source": "engine",
        "type": type_,
        "subject": str(campaign_id),
        "time": "2026-04-18T15:12:00Z",
        "datacontenttype": "application/json",
        **changes,
        "data": {**data, **changes.get("data", {})},
    }
