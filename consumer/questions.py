"""What operators ask and order by command: why, drift, reconcile."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final
from uuid import UUID

from consumer.database import Connection, override, statement, verbatim
from consumer.envelope import format_time
from consumer.guard import Limits, Mode, Resolved, Verdict, Window, bounces_left, judge, rate_bp, resolve
from consumer.outcome import STATS_ALWAYS, STATS_WHEN_SOME, ordered_stats

DRIFT_AT_ONCE: Final = 200  # campaigns; a page of large ones must stay below statement_timeout
RECONCILE_AT_ONCE: Final = 1_000
MAX_UUID: Final = 2**128 - 1


@dataclass(frozen=True, slots=True)
class Explanation:
    """What the guard thinks of one campaign now."""

    campaign_id: UUID
    type: str
    status: str
    resolved: Resolved
    window: Window
    verdict: Verdict
    guard_paused_at: datetime | None
    last_pause: dict[str, Any] | None

    def document(self) -> dict[str, object]:
        """The shape of `why ID --json`."""
        limits = self.resolved.limits
        return {
            "campaign_id": str(self.campaign_id),
            "type": self.type,
            "status": self.status,
            "mode": limits.mode,
            "sent": self.window.sent,
            "bounced": self.window.bounced,
            "rate_bp": rate_bp(self.window),
            "threshold_bp": limits.threshold_bp,
            "min_sent": limits.min_sent,
            "window": limits.window,
            "verdict": self.verdict,
            "bounces_left": bounces_left(limits, self.window),
            "last_pause": self.last_pause,
        }

    def words(self) -> str:
        """The same for somebody who knows no code."""
        limits, window = self.resolved.limits, self.window
        scope = f"the latest {limits.window} people mailed" if limits.window else "everybody mailed"
        if self.guard_paused_at is not None:
            scope += f" since the guard's last pause at {format_time(self.guard_paused_at)}"
        share = f"{_percent(rate_bp(window))} of them" if window.sent else "nobody yet"
        rule = (
            f"It pauses an active email campaign when at least {_percent(limits.threshold_bp)} of {scope} bounced,"
            f" and at least {limits.min_sent} were mailed."
        )
        said = {
            Verdict.OFF: "The guard is switched off here: it never pauses this campaign.",
            Verdict.NOT_EMAIL: "This is no email campaign, so there is nothing to guard.",
            Verdict.NOT_ACTIVE: f"The campaign is {self.status}, not active, so the guard leaves it alone.",
            Verdict.TOO_FEW_SENT: f"Too few to judge: {window.sent} of the {limits.min_sent} that are needed.",
            Verdict.BELOW_RATE: "Fewer bounced than the limit, so it goes on.",
            Verdict.TRIP: "That is at or above the limit: "
            + ("the next recount pauses it." if limits.mode is Mode.ENFORCE else "in mode observe it is only noted."),
        }[self.verdict]
        lines = [
            f"Campaign {self.campaign_id} ({self.type}, {self.status})",
            rule,
            f"Now: {window.sent} mailed, {window.bounced} bounced: {share}. {said}",
        ]
        left = bounces_left(limits, window)
        then = "would pause it" if limits.mode is Mode.ENFORCE else "would be noted (mode observe)"
        if self.verdict is Verdict.TOO_FEW_SENT:
            needed = bounces_left(limits, Window(window.sent, 0))
            lines.append(f"Once {limits.min_sent} were mailed, {needed} bounces among them {then}.")
        elif self.verdict is Verdict.BELOW_RATE:
            lines.append(f"It can bear {left - 1} more bounces among those mailed; one more than that {then}.")
        own = [f"{name} by the {level}" for name, level in self.resolved.origin.items() if level != "default"]
        lines.append("Limits: " + (", ".join(own) + ", the rest by default." if own else "all by default."))
        lines.extend(f"Ignored: {problem}" for problem in self.resolved.ignored)
        if self.last_pause is None:
            lines.append("The guard has never paused it.")
        else:
            pause = self.last_pause
            lines.append(
                f"Last pause: {pause['paused_at']}, when {pause['bounced']} of {pause['sent']} had bounced"
                f" (version {pause['version']})."
            )
        return "\n".join(lines)


async def why(connection: Connection, campaign_id: UUID, default: Limits) -> Explanation | None:
    """The guard's view of a campaign, whatever its type and status; None when there is no such campaign."""
    row = await connection.fetchrow(statement("why"), campaign_id)
    if row is None:
        return None
    resolved = resolve(default, override(row["user_limits"]), override(row["campaign_limits"]))
    [read] = await connection.fetch(
        statement("guard_windows"), [campaign_id], [resolved.limits.window], [row["guard_paused_at"]]
    )
    window = Window(read["sent"], read["bounced"])
    last_pause = row["last_pause"]
    if last_pause is not None:
        last_pause = {**last_pause, "paused_at": format_time(datetime.fromisoformat(last_pause["paused_at"]))}
        last_pause = {key: last_pause[key] for key in ("paused_at", "version", "sent", "bounced")}
    return Explanation(
        row["id"],
        row["type"],
        row["status"],
        resolved,
        window,
        judge(row["type"], row["status"], resolved.limits, window),
        row["guard_paused_at"],
        last_pause,
    )


async def drift(connection: Connection, done: Callable[[int, int | None], None]) -> list[dict[str, Any]]:
    """Campaigns whose stored stats differ from the truth, in id order; `drift` is truth minus stored.

    Page by page, so that no statement takes long. `done` hears how many were compared, of how many.
    """
    total = await connection.fetchval("SELECT count(*) FROM public.campaigns")
    found, compared = list[dict[str, Any]](), 0
    after: UUID | None = None
    while page := await connection.fetch(statement("drift_page"), after, DRIFT_AT_ONCE):
        compared, after = compared + len(page), page[-1]["id"]
        done(compared, total)
        found += [
            {
                "id": str(row["id"]),
                "name": row["name"],
                "type": row["type"],
                "status": row["status"],
                "last_synced_at": row["last_synced_at"] and format_time(row["last_synced_at"]),
                "stored": verbatim(row["stored"]),
                "truth": ordered_stats(row["truth"]),
                "drift": {key: row["drift"][key] for key in (*STATS_ALWAYS, *STATS_WHEN_SOME) if key in row["drift"]},
            }
            for row in page
            if row["drift"]
        ]
    return found


async def reconcile(
    connection: Connection, campaign_ids: Sequence[UUID] | None, delay_s: float, done: Callable[[int, int | None], None]
) -> int:
    """Defer campaigns (None: all) and count them as never published; returns how many there are.

    Page by page in id order, each its own transaction: recounts wait for the state rows it holds. Stopped in between it
    leaves whole pages; a campaign deferred twice is recounted once. `done` hears how many, of how many.
    """
    count = 0
    if campaign_ids is not None:
        wanted = sorted(set(campaign_ids))
        for begin in range(0, len(wanted), RECONCILE_AT_ONCE):
            page = wanted[begin : begin + RECONCILE_AT_ONCE]
            count += await connection.fetchval(statement("reconcile"), page, delay_s)
            done(begin + len(page), len(wanted))
        return count
    total = await connection.fetchval("SELECT count(*) FROM public.campaigns")
    first = 0
    while first <= MAX_UUID:
        page = [
            row["id"] for row in await connection.fetch(statement("reconcile_page"), UUID(int=first), RECONCILE_AT_ONCE)
        ]
        if not page:
            break
        count += await connection.fetchval(statement("reconcile"), page, delay_s)
        done(count, total)
        first = page[-1].int + 1  # PostgreSQL orders them as numbers too; the nil id is one as well
    return count


def _percent(basis_points: int) -> str:
    return f"{basis_points / 100:g} %"
