"""What the proof looks at: rows and events as plain values, read after the service has ended; and what it finds.

Shares no code with the service, on purpose: its own SQL, the standard library's JSON.
"""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final
from uuid import UUID

import asyncpg

THRESHOLD_BP: Final = 500
MIN_SENT: Final = 100
WINDOW: Final = 500


@dataclass(frozen=True, slots=True)
class Event:
    """A CloudEvent as published; `data` is whatever JSON it carries (hence Any)."""

    id: str
    type: str
    campaign: UUID
    cause: str | None
    data: dict[str, Any]

    @classmethod
    def parse(cls, document: Mapping[str, Any]) -> "Event":
        """From parsed JSON."""
        return cls(
            document["id"], document["type"], UUID(document["subject"]), document.get("causationid"), document["data"]
        )


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """`place`: topic, partition, offset of the original, as its headers say."""

    place: tuple[str, str, str]
    value: bytes | None
    reason: str


@dataclass(frozen=True, slots=True)
class Asked:
    """A sync request and the type of the answer it must get."""

    campaign: UUID
    expected: str


@dataclass(frozen=True, slots=True)
class Prospect:
    """A row of campaign_prospects."""

    id: UUID
    status: str
    contacted_at: datetime | None
    bounced_at: datetime | None


@dataclass(frozen=True, slots=True)
class Campaign:
    """A row of campaigns with the rows of its prospects; `stats` parsed, `limits` for it: None = the default."""

    id: UUID
    user_id: UUID
    type: str
    name: str
    status: str
    pause_reason: str | None
    stats: dict[str, Any]
    prospects: Sequence[Prospect]
    mode: str = "enforce"
    threshold_bp: int = THRESHOLD_BP
    min_sent: int = MIN_SENT
    window: int = WINDOW


@dataclass(frozen=True, slots=True)
class Audit:
    """A row of campaign_stats.guard_decisions."""

    campaign: UUID
    paused: bool
    mode: str
    verdict: str
    version: int | None
    sent: int
    bounced: int


@dataclass(frozen=True, slots=True)
class Evidence:
    """Everything the proof looks at, read after the service has ended."""

    campaigns: Mapping[UUID, Campaign]
    audits: Sequence[Audit]
    events: Sequence[Event]
    dead_letters: Sequence[DeadLetter]
    asked: Mapping[str, Asked]
    garbage: Sequence[bytes]
    resumed: Mapping[UUID, int]
    paused_before: frozenset[UUID]  # paused when the demo began
    wrong_before: frozenset[UUID]  # stored stats were wrong when the demo began


@dataclass(slots=True)
class Check:
    """A claim, how many things it was checked on, and what contradicts it. Nothing checked proves nothing."""

    claim: str
    count: int = 0
    problems: list[str] = field(default_factory=list)

    @property
    def holds(self) -> bool:
        """Checked on something and never contradicted."""
        return self.count > 0 and not self.problems

    def expect(self, true: bool, problem: str) -> None:
        """Count one look; note the problem if it is not true."""
        self.count += 1
        if not true:
            self.problems.append(problem)


async def read_campaigns(connection: "asyncpg.Connection[asyncpg.Record]") -> dict[UUID, Campaign]:
    """Every campaign with all its prospects and the limits that hold for it: campaign > user > default, per field."""
    prospects: dict[UUID, list[Prospect]] = defaultdict(list)
    for row in await connection.fetch(
        "SELECT campaign_id, id, status, contacted_at, bounced_at FROM public.campaign_prospects"
    ):
        prospects[row["campaign_id"]].append(Prospect(row["id"], row["status"], row["contacted_at"], row["bounced_at"]))
    limits = {
        (row["scope"], row["id"]): row
        for row in await connection.fetch(
            "SELECT scope, id, mode, threshold_bp, min_sent, window_size FROM campaign_stats.guard_limits"
        )
    }
    campaigns = {}
    for row in await connection.fetch(
        "SELECT id, user_id, type, name, status, pause_reason, stats FROM public.campaigns ORDER BY name"
    ):
        rule: dict[str, Any] = {
            "mode": "enforce", "threshold_bp": THRESHOLD_BP, "min_sent": MIN_SENT, "window_size": WINDOW,
        }  # fmt: skip
        for level in (("user", row["user_id"]), ("campaign", row["id"])):
            rule |= {key: limits[level][key] for key in rule if level in limits and limits[level][key] is not None}
        campaigns[row["id"]] = Campaign(
            row["id"], row["user_id"], row["type"], row["name"], row["status"], row["pause_reason"],
            json.loads(row["stats"]), prospects[row["id"]],
            rule["mode"], rule["threshold_bp"], rule["min_sent"], rule["window_size"],
        )  # fmt: skip
    return campaigns


async def read_audits(connection: "asyncpg.Connection[asyncpg.Record]") -> list[Audit]:
    """What the guard says it decided, in order."""
    return [
        Audit(*row)
        for row in await connection.fetch(
            "SELECT campaign_id, paused, mode, verdict, version, sent, bounced"
            "  FROM campaign_stats.guard_decisions ORDER BY id"
        )
    ]
