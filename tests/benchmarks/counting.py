"""Recounts on their own: many campaigns at once beside one by one, and with the guard beside without.

The clock runs in this process, around the statement or the transaction, commit included. Before each run a few
prospects of every campaign move, so that all stats are stale and all counts are news; the move, the resumption of what
the guard has paused, and a VACUUM are outside of the clock. `others` is watched over a whole pair: a run is too short.

What the guard costs holds the most it can do: the campaigns that trip (those of 2 % bounces whose dice fell badly) are
resumed and forgotten before each run, so each time it reads all their windows, pauses them, writes audit rows and one
event more for each. In service that happens once.
"""

import json
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Final
from uuid import UUID

import asyncpg

from consumer.database import Connection, Database, statement
from consumer.envelope import Cause
from consumer.generation import Work
from consumer.guard import Limits, Mode
from consumer.recount import Rules, recount_campaigns
from schemas import events
from schemas.events import Trigger
from tests.benchmarks import upstream, workload
from tests.benchmarks.report import Figure, Limit, Report, at_least, at_most
from tests.benchmarks.stage import Stage, others_s
from tests.benchmarks.trials import Trial, report_of, undisturbed
from tests.benchmarks.workload import Truth

CAMPAIGNS: Final = 1_000
PROSPECTS: Final = 299  # each, about: a chunk of the service is full with 300 000 altogether
MOVED_EACH: Final = 6  # prospects of each campaign: 2 %
PAIRS: Final = 9
QUICK_PAIRS: Final = 5

RESUME: Final = """
WITH resumed AS (UPDATE campaigns SET status = 'active', pause_reason = NULL
                  WHERE pause_reason = 'bounce_rate' AND id = ANY ($1::uuid[]) RETURNING id)
UPDATE campaign_stats.campaign_state s SET guard_paused_at = NULL, published_status = 'active'
  FROM resumed WHERE s.campaign_id = resumed.id
"""
LIKE: Final = """
SELECT campaign_id FROM campaign_stats.campaign_state ORDER BY abs(last_total - $1), campaign_id LIMIT $2
"""
COUNT: Final = """
SELECT campaign_id, status, count(*) AS prospects FROM campaign_prospects
 WHERE campaign_id = ANY ($1::uuid[]) GROUP BY campaign_id, status
"""


@dataclass(frozen=True, slots=True)
class Bench:
    """The campaigns, and which prospects go to and fro."""

    db: asyncpg.Connection
    ids: Sequence[UUID]
    prospects: Sequence[UUID]

    async def stir(self) -> None:
        """Everything is news again, and nothing of the last run is left."""
        await self.db.execute(upstream.MOVE, self.prospects)
        await self.db.execute(RESUME, self.ids)
        await self.db.execute("TRUNCATE campaign_stats.outbox, campaign_stats.guard_decisions")
        for table in ("campaigns", "campaign_prospects", "campaign_stats.campaign_state"):
            await self.db.execute(f"VACUUM {table}")

    async def stale(self) -> int:
        """Campaigns whose stats are not what their rows say."""
        counts: dict[UUID, Counter[str]] = {campaign: Counter() for campaign in self.ids}
        for row in await self.db.fetch(COUNT, self.ids):
            counts[row["campaign_id"]][row["status"]] = row["prospects"]
        rows = await self.db.fetch("SELECT id, stats FROM campaigns WHERE id = ANY ($1::uuid[])", self.ids)
        return len(Truth(counts, {row["id"]: json.loads(row["stats"]) for row in rows}, {}, ()).drifted())


@dataclass(frozen=True, slots=True)
class Timed:
    """One recount of everything. `seen`: what else is worth telling."""

    seconds: float
    recounted: int
    seen: Mapping[str, int] = field(default_factory=dict)


Way = Callable[[Database, Sequence[UUID]], Awaitable[Timed]]


@dataclass(frozen=True, slots=True)
class Pair:
    """Two ways by name; the figure is the time of the first over that of the second."""

    name: str
    ways: Mapping[str, Way]
    limit: Limit


async def at_once(database: Database, ids: Sequence[UUID]) -> Timed:
    """One call for all, one transaction."""
    async with database.connection() as db:
        begun = time.perf_counter()
        rows = await _recount(db, ids)
        return Timed(time.perf_counter() - begun, rows)


async def one_by_one(database: Database, ids: Sequence[UUID]) -> Timed:
    """A call for each campaign, each a transaction, as a service would that works event by event."""
    async with database.connection() as db:
        begun = time.perf_counter()
        rows = 0
        for campaign in ids:
            rows += await _recount(db, [campaign])
        return Timed(time.perf_counter() - begun, rows)


async def _recount(db: Connection, ids: Sequence[UUID]) -> int:
    """Outside a transaction block: the statement is one, and committed when it returns."""
    return sum(row["held"] is None for row in await db.fetch(statement("recount"), ids, "chunk"))


async def guarded(mode: Mode, database: Database, ids: Sequence[UUID]) -> Timed:
    """The service's whole transaction: recount, guard, decide, save, commit."""
    rules = Rules(Limits(mode=mode))
    works = [
        Work(campaign, Trigger.STATUS_CHANGED, Cause(f"hint-{number}", f"run-{number}"))
        for number, campaign in enumerate(ids)
    ]
    begun = time.perf_counter()
    async with database.transaction() as db:
        outcome = await recount_campaigns(db, works, "chunk", rules)
    seconds = time.perf_counter() - begun
    seen = +Counter({"candidates": outcome.verdicts.total(), "pauses": outcome.told[events.PAUSED]})
    return Timed(seconds, outcome.told[events.STATS_UPDATED], seen)


PAIRS_OF: Final = (
    Pair(
        "set-based recount of 1 000 campaigns vs 1 000 single ones: rate",
        {"one by one": one_by_one, "1 000 at once": at_once},
        at_least(6),
    ),
    Pair(
        "recount of 1 000 campaigns with guard vs without: time",
        {"with guard": partial(guarded, Mode.ENFORCE), "without guard": partial(guarded, Mode.OFF)},
        at_most(1.2),
    ),
)


async def measure(stage: Stage) -> Report:
    """Pair after pair, the order reversed every time."""
    await stage.template()
    trials: list[Trial] = []
    async with stage.database("counting") as name, workload.connected(stage.postgres.url(name)) as db:
        bench = await _bench(db)
        for pair in PAIRS_OF:
            async with _sessions(stage.postgres.url(name), pair.ways) as sessions:
                for way in pair.ways:
                    await pair.ways[way](sessions[way], bench.ids)  # statements are prepared, plans are made
                for number in range(1, (QUICK_PAIRS if stage.size.is_quick else PAIRS) + 1):
                    attempt = partial(_trial, bench, pair, sessions, number)
                    trials.append(await undisturbed(stage, pair.name, attempt))
    report = report_of("counting", stage, trials)
    for pair in PAIRS_OF:
        values = [trial.values for trial in trials if trial.counts and trial.contestant == pair.name]
        above, below = (f"{way}: ms" for way in pair.ways)
        report.figures.append(Figure(pair.name, [one[above] / one[below] for one in values], limit=pair.limit))
        for value in values[0] if values else ():
            report.figures.append(Figure(f"recount {value}", [one[value] for one in values], ",.0f"))
    return report


async def _bench(db: asyncpg.Connection) -> Bench:
    ids = [row["campaign_id"] for row in await db.fetch(LIKE, PROSPECTS, CAMPAIGNS)]
    return Bench(db, ids, [row["prospect"] for row in await db.fetch(upstream.CHOOSE, ids, [], MOVED_EACH)])


@asynccontextmanager
async def _sessions(url: str, ways: Iterable[str]) -> AsyncIterator[Mapping[str, Database]]:
    """One for each way, set up like the service's: plans that one has made must not be used by the other."""
    async with AsyncExitStack() as stack:
        sessions = {}
        for way in ways:
            sessions[way] = Database(url, size=1)
            await sessions[way].open()
            stack.push_async_callback(sessions[way].close, 5.0)
        yield sessions


async def _trial(bench: Bench, pair: Pair, sessions: Mapping[str, Database], number: int, _: str) -> Trial:
    """Both ways, one after the other."""
    values: dict[str, float] = {}
    problems: list[str] = []
    begun, busy_s = time.monotonic(), others_s()
    names = list(pair.ways)
    for name in names if number % 2 else reversed(names):
        await bench.stir()
        if (stale := await bench.stale()) != len(bench.ids):
            problems.append(f"{name}: of {len(bench.ids)} campaigns only {stale} were stale before")
        timed = await pair.ways[name](sessions[name], bench.ids)
        if timed.recounted != len(bench.ids):
            problems.append(f"{name}: {timed.recounted} of {len(bench.ids)} campaigns were recounted")
        if stale := await bench.stale():
            problems.append(f"{name}: {stale} campaigns have wrong stats")
        values[f"{name}: ms"] = timed.seconds * 1e3
        values.update({f"{name}: {kind}": count for kind, count in timed.seen.items()})
    seconds = time.monotonic() - begun
    others = (others_s() - busy_s) / seconds
    return Trial(pair.name, number, 2 * len(bench.ids), seconds, 0.0, 0.0, others, problems, values=values)
