"""What is done inside one transaction: a typed function for each statement, and the rows it reads and writes."""

import re
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass
from datetime import datetime
from typing import Final
from uuid import UUID

import asyncpg
import orjson

from consumer.database.outages import slow_is_an_error, translated
from consumer.database.session import Connection, fetch_one, in_transaction, statement
from consumer.envelope import Cause, SyncRequest
from consumer.errors import NotWritten
from consumer.generation import Seen, Work
from consumer.guard import Override, Window, rate_bp
from consumer.outcome import Campaign, Deferral, Details, Held, Outcome, Recount
from schemas.events import Trigger

EXISTS: Final = "SELECT EXISTS (SELECT FROM public.campaigns WHERE id = ANY ($1::uuid[]))"

_STRING_OR_SPACE: Final = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"| ')  # no other white space stands in printed jsonb


@dataclass(frozen=True, slots=True)
class WindowRead:
    """The window of one candidate; contacts are None when it is empty or older than the `contacted_at` trigger."""

    window: Window
    oldest_contact: datetime | None
    newest_contact: datetime | None
    decided_at: datetime


@dataclass(frozen=True, slots=True)
class Pending:
    """A row of the outbox: `event` goes to the topic of `type` under the campaign's key."""

    id: int
    campaign_id: UUID
    type: str
    event: bytes
    since: datetime | None
    fact: str | None


@dataclass(frozen=True, slots=True)
class Compared:
    """A campaign as the sweep sees it, unlocked."""

    campaign_id: UUID
    type: str
    status: str
    last_synced_at: datetime | None
    counts: Mapping[str, int]
    drift: Mapping[str, int]
    differs: bool
    waiting: bool
    guard_paused_at: datetime | None
    user_limits: Override | None
    campaign_limits: Override | None


class Transaction:
    """Statements of one transaction. Its methods translate nothing: errors pass through Database.transaction."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    @asynccontextmanager
    async def savepoint(self) -> AsyncIterator[None]:
        """What is raised inside undoes only what was done inside. Raises Unavailable for an outage."""
        with translated(), slow_is_an_error():
            async with in_transaction(self._connection):
                yield

    async def now(self) -> datetime:
        """The database's clock."""
        moment: datetime = await self._connection.fetchval("SELECT clock_timestamp()")
        return moment

    async def recount(self, campaign_ids: Sequence[UUID], caller: str) -> tuple[dict[UUID, Recount], dict[UUID, Held]]:
        """Lock, recount and write `stats` and `last_synced_at`; those that exist, recounted or held back.

        Two statements in one function: a statement's snapshot is older than the lock it waits for (design, section 5).
        Raises TooSlow, and NotWritten where a campaign exists but the product let nothing be written.
        """
        recounts: dict[UUID, Recount] = {}
        held: dict[UUID, Held] = {}
        with slow_is_an_error():
            rows = await self._connection.fetch(statement("recount"), campaign_ids, caller)
        for row in rows:
            if row["held"] is None:
                recounts[row["campaign_id"]] = _recount(row)
            else:
                held[row["campaign_id"]] = Held(
                    row["campaign_id"],
                    row["user_id"],
                    row["held"],
                    row["retry_at"],
                    row["failures"],
                    row["counted_at"],
                )
        missing = [campaign_id for campaign_id in campaign_ids if not (campaign_id in recounts or campaign_id in held)]
        if missing and await self._connection.fetchval(EXISTS, missing):
            raise NotWritten("a trigger or rule of the product suppresses the update")
        return recounts, held

    async def describe(self, campaign_id: UUID) -> Details:
        """A recounted campaign's row as its owner sees it."""
        row = await fetch_one(self._connection, statement("describe"), campaign_id)
        return Details(
            _campaign(row),
            row["signature"],
            verbatim(row["operating_hours"]),
            row["sender_accounts"],
        )

    async def windows(self, candidates: Sequence[tuple[UUID, int, datetime | None]]) -> dict[UUID, WindowRead]:
        """The guard's window of every candidate: (campaign, size or 0 for all, opened at or None for the beginning)."""
        rows = await self._connection.fetch(
            statement("guard_windows"),
            [campaign_id for campaign_id, _, _ in candidates],
            [size for _, size, _ in candidates],
            [opened_at for _, _, opened_at in candidates],
        )
        return {
            row["id"]: WindowRead(
                Window(row["sent"], row["bounced"]), row["oldest_contact"], row["newest_contact"], row["decided_at"]
            )
            for row in rows
        }

    async def pause(self, campaign_ids: Sequence[UUID]) -> dict[UUID, tuple[datetime, Campaign]]:
        """Pause locked, active campaigns for their bounce rate: when, and the row afterwards."""
        rows = await self._connection.fetch(statement("pause"), campaign_ids)
        return {row["campaign_id"]: (row["paused_at"], _campaign(row)) for row in rows}

    async def save(self, outcome: Outcome) -> None:
        """State, audit, outbox and deferrals in one round trip, a second one where failing campaigns were met; none
        when there is nothing to save.

        Raises TooSlow where somebody holds the state of one of the recounted campaigns: again an error of its chunk.
        """
        if not (outcome.states or outcome.outbox or outcome.deferrals or outcome.decisions or outcome.hurried):
            return
        with slow_is_an_error() if outcome.states else nullcontext():
            await self._save(outcome)
        if outcome.hurried:
            await self._connection.execute(statement("hurry"), outcome.hurried)

    async def _save(self, outcome: Outcome) -> None:
        await self._connection.execute(
            statement("save"),
            [state.campaign_id for state in outcome.states],
            [state.version for state in outcome.states],
            [state.published and dict(state.published[0]) for state in outcome.states],
            [state.published and state.published[1] for state in outcome.states],
            [state.guard_paused_at for state in outcome.states],
            [state.observed_trip for state in outcome.states],
            [state.last_total for state in outcome.states],
            [state.cooldown_s for state in outcome.states],
            [row.shard for row in outcome.outbox],
            [row.campaign_id for row in outcome.outbox],
            [row.type for row in outcome.outbox],
            [row.event for row in outcome.outbox],
            [
                {
                    "campaign_id": decision.campaign_id,
                    "decided_at": decision.judgement.paused_at or decision.judgement.decided_at,
                    "mode": decision.judgement.resolved.limits.mode,
                    "verdict": decision.judgement.verdict,
                    "paused": decision.judgement.paused_at is not None,
                    "version": decision.version,
                    "sent": decision.judgement.window.sent,
                    "bounced": decision.judgement.window.bounced,
                    "rate_bp": rate_bp(decision.judgement.window),
                    "threshold_bp": decision.judgement.resolved.limits.threshold_bp,
                    "min_sent": decision.judgement.resolved.limits.min_sent,
                    "window_size": decision.judgement.resolved.limits.window,
                    "limits_from": decision.judgement.resolved.origin,
                    "opened_at": decision.judgement.opened_at,
                    "oldest_contact": decision.judgement.oldest_contact,
                    "newest_contact": decision.judgement.newest_contact,
                }
                for decision in outcome.decisions
            ],
            [_deferral(deferral) for deferral in outcome.deferrals],
            [row.since for row in outcome.outbox],
            [row.fact for row in outcome.outbox],
        )

    async def take_deferred(self) -> list[Work]:
        """All due rows of one campaign, oldest row first; empty when nothing is due. Must be the first statement."""
        rows = await self._connection.fetch(statement("take_deferred"))
        return [_work(row) for row in sorted(rows, key=lambda row: row["id"])]

    async def fail(self, campaign_id: UUID) -> tuple[int, UUID | None, datetime]:
        """Note one more failure in a row: how many, the campaign's owner (None: it is gone), the clock."""
        row = await fetch_one(self._connection, statement("fail"), campaign_id)
        return row["failures"], row["user_id"], row["now"]

    async def lock_shards(self) -> list[int]:
        """Shards with something to publish that no other relay holds; locked until the transaction ends."""
        return [row["shard"] for row in await self._connection.fetch(statement("relay_lock"))]

    async def read_outbox(
        self, shards: Sequence[int], rows: int, size: int, types: Sequence[str] | None = None
    ) -> list[Pending]:
        """What is to be published of locked shards in id order, about `rows` rows and `size` bytes at most.

        Only of these `types`, if any are given: then those of other types cost nothing, however many stand in front.
        """
        if types is None:
            found = await self._connection.fetch(statement("relay_read"), shards, rows, size)
        else:
            found = await self._connection.fetch(statement("relay_read_types"), shards, rows, size, types)
        return [
            Pending(row["id"], row["campaign_id"], row["type"], row["event"], row["since"], row["fact"])
            for row in found
        ]

    async def has_outbox(self, event_type: str) -> bool:
        """Whether anything of this type is still to be published."""
        found: bool = await self._connection.fetchval(statement("relay_has"), event_type)
        return found

    async def finish_outbox(self, published: Sequence[int], refused: Mapping[int, str]) -> None:
        """Delete what was acknowledged, set aside what can never be sent (id -> why).

        The commit of this transaction does not wait for the disk.
        """
        await self._connection.execute(statement("relay_done"), published, list(refused), list(refused.values()))

    async def sweep_turn(self) -> tuple[UUID | None, datetime | None] | None:
        """Where the sweep goes on and when its lap began; None when no page is due or somebody else sweeps."""
        row = await self._connection.fetchrow(statement("sweep_turn"))
        return None if row is None else (row["after_id"], row["lap_started"])

    async def sweep_page(self, after: UUID | None, campaigns: int) -> list[Compared]:
        """The next campaigns in id order, compared with their rows and with what was published."""
        return [
            Compared(
                row["id"],
                row["type"],
                row["status"],
                row["last_synced_at"],
                row["counts"],
                row["drift"],
                row["differs"],
                row["waiting"],
                row["guard_paused_at"],
                override(row["user_limits"]),
                override(row["campaign_limits"]),
            )
            for row in await self._connection.fetch(statement("sweep_page"), after, campaigns)
        ]

    async def sweep_next(self, after: UUID | None) -> UUID | None:
        """The next campaign in id order, uncompared."""
        found: UUID | None = await self._connection.fetchval(statement("sweep_next"), after)
        return found

    async def sweep_advance(self, after: UUID | None, interval_s: float) -> None:
        """Go on after this campaign, or with None begin the next lap in `interval_s` seconds."""
        await self._connection.execute(statement("sweep_advance"), after, interval_s)


def verbatim(jsonb: str | None) -> orjson.Fragment | None:
    """A jsonb column of the product, read as text, for JSON that we write: the same value, compact, whatever it holds.

    It is not parsed, because jsonb holds deeper nesting and larger numbers than any parser of ours takes.
    """
    return None if jsonb is None else orjson.Fragment(_STRING_OR_SPACE.sub(_without_space, jsonb))


def _without_space(match: re.Match[str]) -> str:
    return "" if match[0] == " " else match[0]


def _recount(row: asyncpg.Record) -> Recount:
    return Recount(
        campaign=_campaign(row),
        counts=row["counts"],
        drift=row["drift"],
        synced_before=row["synced_before"],
        counted_at=row["counted_at"],
        version=row["version"],
        published_counts=row["published_counts"],
        published_status=row["published_status"],
        guard_paused_at=row["guard_paused_at"],
        observed_trip=row["observed_trip"],
        last_total=row["last_total"],
        failures=row["failures"],
        user_limits=override(row["user_limits"]),
        campaign_limits=override(row["campaign_limits"]),
    )


def _campaign(row: asyncpg.Record) -> Campaign:
    return Campaign(
        id=row["campaign_id"],
        user_id=row["user_id"],
        type=row["type"],
        name=row["name"],
        status=row["status"],
        daily_limit=row["daily_limit"],
        stop_on_reply=row["stop_on_reply"],
        open_tracking=row["open_tracking"],
        skip_other_campaigns=verbatim(row["skip_other_campaigns"]),
        stats=row["stats"],
        last_synced_at=row["last_synced_at"],
        pause_reason=row["pause_reason"],
        created_at=row["created_at"],
        updated_at=row["updated_at"],
    )


def override(limits: Mapping[str, object] | None) -> Override | None:
    """A row of guard_limits as read by to_jsonb; None when there is none."""
    if limits is None:
        return None
    return Override(
        mode=_text(limits["mode"]),
        threshold_bp=_integer(limits["threshold_bp"]),
        min_sent=_integer(limits["min_sent"]),
        window=_integer(limits["window_size"]),
    )


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _integer(value: object) -> int | None:
    return value if isinstance(value, int) else None


def _deferral(deferral: Deferral) -> dict[str, object]:
    work = deferral.work
    return {
        "campaign_id": work.campaign_id,
        "reason": deferral.reason,
        "delay_s": deferral.delay_s,
        "tries": deferral.tries,
        "first_written": work.first_written,
        "trigger": work.trigger,
        "hint": work.hint and work.hint.to_json(),
        "seen": work.seen and {"last_synced_at": work.seen.last_synced_at, "drift": work.seen.drift},
        "requests": [request.to_json() for request in work.requests],
    }


def _work(row: asyncpg.Record) -> Work:
    seen = row["seen"]
    return Work(
        row["campaign_id"],
        Trigger(row["trigger"]),
        hint=row["hint"] and Cause.from_json(row["hint"]),
        requests=tuple(SyncRequest.from_json(request) for request in row["requests"]),
        seen=seen
        and Seen(seen["last_synced_at"] and datetime.fromisoformat(seen["last_synced_at"]), drift=seen["drift"]),
        reason=row["reason"],
        tries=row["tries"],
        first_written=row["first_written"],
    )
