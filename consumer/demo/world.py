"""Forty campaigns with 30 000 prospects: healthy ones, some whose mail will bounce, some with wrong stored stats."""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Final
from uuid import UUID

import asyncpg

from consumer import migrations

REFERENCE_ID: Final = UUID("8c2b2d4e-e29b-41d4-a716-446655440000")
REFERENCE_USER: Final = UUID("11111111-1111-1111-1111-111111111111")
PROSPECTS: Final = 30_000
SEED: Final = 20_240_501  # the same world every time

CONTACTED: Final = ("sent", "replied", "bounced", "completed", "timed_out")
EMAIL_NAMES: Final = (
    "Spring launch DACH", "CFO roundtable", "Webinar follow-up", "Partner referral", "Free trial nudge",
    "Renewals Q3", "Logistics leads", "Hospital IT", "Series B founders", "Retail ops", "Churned in 2023",
    "Agency outreach", "Security audit offer", "HR tech survey", "Demo no-shows", "Warehouse automation",
)  # fmt: skip
LINKEDIN_NAMES: Final = (
    "CTOs Berlin", "Heads of Data", "RevOps UK", "Product leads Paris", "SDR managers", "VP Sales Nordics",
    "Recruiters Madrid", "Plant managers", "Growth marketers", "Founders Lisbon", "Compliance leads", "CISO circle",
)  # fmt: skip


class Role(StrEnum):
    """What happens to a campaign in the demo."""

    REFERENCE = "reference"  # nobody touches it, but its stored stats are wrong
    STEADY = "steady"  # healthy, busy
    SILENT = "silent"  # busy, and its hints are never sent
    BOUNCING = "bouncing"  # bounces too much while the demo runs
    STRICT = "strict"  # over its customer's own stricter limit from the start
    OBSERVED = "observed"  # bounces too much, but is only observed
    QUIET = "quiet"  # draft, completed or paused by its user


@dataclass(slots=True)
class Campaign:
    """A campaign as the product's engine knows it. Every `bounce_every`-th mail will bounce; 0 = none."""

    id: UUID
    user_id: UUID
    type: str
    name: str
    status: str
    role: Role
    bounce_every: int = 0
    pause_reason: str | None = None
    wrong_by: dict[str, int] = field(default_factory=dict)  # what is added to its true stats when it is stored
    rows: list[tuple[UUID, str, datetime | None, datetime | None]] = field(default_factory=list)

    def stored_stats(self) -> dict[str, int]:
        """What the product has stored at the start, right or wrong."""
        counts = Counter(status for _, status, _, _ in self.rows)
        counts["total"] = len(self.rows)
        counts.update(self.wrong_by)
        names = ("total", "sent", "replied", "bounced", "completed", "timed_out", "connection_sent", "connected",
                 "message_sent")  # fmt: skip
        return {name: max(0, counts[name]) for name in names if counts[name] > 0 or name in names[:4]}


def make_world() -> list[Campaign]:
    """All campaigns with their prospects; the order is the order of ids handed out."""
    chance = random.Random(SEED)
    now = datetime.now(UTC)
    users = [_uuid(chance) for _ in range(8)]
    careful = _uuid(chance)
    world = [Campaign(REFERENCE_ID, REFERENCE_USER, "email", "Q2 Enterprise Outreach", "active", Role.REFERENCE)]
    world[0].wrong_by = {"sent": 5, "bounced": 3, "total": -2}
    _fill(world[0], chance, now, pending=81, sent=34, replied=4, bounced=1)

    def add(kind: str, name: str, role: Role, status: str = "active", user: UUID | None = None) -> Campaign:
        campaign = Campaign(_uuid(chance), user or chance.choice(users), kind, name, status, role)
        world.append(campaign)
        return campaign

    troubled = [
        (add("email", "List bought in spring", Role.BOUNCING), 8, (500, 59, 1)),
        (add("email", "Trade fair badges", Role.BOUNCING), 4, (700, 392, 8)),
        (add("email", "Newsletter of 2019", Role.BOUNCING), 3, (900, 440, 0)),
        (add("email", "Purchased leads EMEA", Role.BOUNCING), 5, (600, 96, 2)),
    ]
    _fill(troubled[2][0], chance, now - timedelta(days=60), sent=500, bounced=60)  # before its window of 500
    for campaign, every, (pending, sent, bounced) in troubled:
        campaign.bounce_every = every
        _fill(campaign, chance, now, pending=pending, sent=sent, bounced=bounced)
    _fill(add("email", "New sender on trial", Role.OBSERVED), chance, now, pending=200, sent=280, bounced=20)
    strict = add("email", "Board members", Role.STRICT, user=careful)
    _fill(strict, chance, now, pending=150, sent=291, bounced=9)

    quiet = [
        add("email", "Autumn teaser", Role.QUIET, "draft"),
        add("email", "Win-back 2022", Role.QUIET, "completed"),
        add("email", "Paused by its owner", Role.QUIET, "paused"),
        add("linkedin", "Interim managers", Role.QUIET, "draft"),
        add("linkedin", "Alumni network", Role.QUIET, "completed"),
    ]
    _fill(quiet[0], chance, now, pending=600)
    _fill(quiet[1], chance, now, completed=480, replied=90, timed_out=200, bounced=10, cancelled=20)
    _fill(quiet[2], chance, now, pending=300, sent=220, bounced=40)  # bounces, but a user's pause is never touched
    quiet[2].pause_reason = "user"
    _fill(quiet[3], chance, now, pending=400, snoozed=12)  # a status nobody knows yet
    _fill(quiet[4], chance, now, completed=310, replied=70, timed_out=120, connected=30)

    busy = [add("email", name, Role.STEADY) for name in EMAIL_NAMES]
    busy += [add("linkedin", name, Role.STEADY) for name in LINKEDIN_NAMES]
    busy[3].role = busy[-1].role = Role.SILENT
    share, rest = divmod(PROSPECTS - sum(len(campaign.rows) for campaign in world), len(busy))
    for place, campaign in enumerate(busy):
        size = share + (rest if place == 0 else 0)
        if campaign.type == "email":
            campaign.bounce_every = 80
            _fill(
                campaign, chance, now, pending=size - 420, sent=250, completed=120, replied=30, timed_out=16, bounced=4
            )
        else:
            _fill(campaign, chance, now, pending=size - 400, connection_sent=180, connected=90, message_sent=80,
                  replied=40, completed=10)  # fmt: skip
    for campaign in busy[1::5]:
        campaign.wrong_by = {"sent": chance.randint(1, 9), "replied": -chance.randint(1, 3)}
    return world


async def load(database_url: str, world: Sequence[Campaign]) -> None:
    """Make the schema and put the whole world in, prospects by COPY."""
    await migrations.migrate(database_url, reference_schema=True)
    connection = await asyncpg.connect(database_url)
    try:
        async with connection.transaction():
            await connection.copy_records_to_table(
                "campaigns",
                columns=("id", "user_id", "type", "name", "status", "pause_reason", "daily_limit", "stats"),
                records=[
                    (c.id, c.user_id, c.type, c.name, c.status, c.pause_reason, 200, _json(c.stored_stats()))
                    for c in world
                ],
            )
            await connection.copy_records_to_table(
                "campaign_prospects",
                columns=("id", "campaign_id", "user_id", "status", "contacted_at", "bounced_at"),
                records=[
                    (row, c.id, c.user_id, status, contacted_at, bounced_at)
                    for c in world
                    for row, status, contacted_at, bounced_at in c.rows
                ],
            )
            limits = [
                ("campaign", c.id, "observe", None) if c.role is Role.OBSERVED else ("user", c.user_id, None, 300)
                for c in world
                if c.role in (Role.OBSERVED, Role.STRICT)
            ]
            await connection.executemany(
                "INSERT INTO campaign_stats.guard_limits (scope, id, mode, threshold_bp) VALUES ($1, $2, $3, $4)",
                limits,
            )
        await connection.execute("VACUUM (ANALYZE) campaigns, campaign_prospects")
    finally:
        await connection.close(timeout=5)


def _fill(campaign: Campaign, chance: random.Random, until: datetime, **numbers: int) -> None:
    """Add prospects: status -> how many; the contacted ones within the month before `until`, in mixed order."""
    statuses = [status for status, number in numbers.items() for _ in range(number)]
    chance.shuffle(statuses)
    for status in statuses:
        contacted_at = bounced_at = None
        if status in CONTACTED:
            contacted_at = until - timedelta(seconds=chance.randint(3_600, 30 * 86_400))
        if status == "bounced" and contacted_at is not None:
            bounced_at = contacted_at + timedelta(seconds=chance.randint(1, 1_800))
        campaign.rows.append((_uuid(chance), status, contacted_at, bounced_at))


def _uuid(chance: random.Random) -> UUID:
    return UUID(int=chance.getrandbits(128), version=4)


def _json(stats: dict[str, int]) -> str:
    return "{" + ",".join(f'"{name}":{number}' for name, number in stats.items()) + "}"
