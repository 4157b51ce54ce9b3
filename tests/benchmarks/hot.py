"""How long other campaigns wait beside a hot one of a million prospects: deferring on beside off.

200 hints a second go to the other campaigns in turn, 20 to the hot one, each with a prospect moved. The clock is that
of latency.py, and only the others' hints are looked at. Off means: in the run's database the function that recounts
knows no huge campaigns and no full chunks, and the process knows none either.
"""

import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final
from uuid import UUID

from tests.benchmarks import variants, workload
from tests.benchmarks.latency import SERVICE, latencies, nothing, steady
from tests.benchmarks.report import Figure, Report, at_least, ratios
from tests.benchmarks.stage import Failed, Stage
from tests.benchmarks.trials import Trial, counted, interleaved, report_of
from tests.benchmarks.upstream import Stream

HOT: Final = UUID("40701070-0000-4000-8000-000000000001")
PROSPECTS: Final = 1_000_000
STREAMS: Final = (Stream("others", 200.0), Stream("hot", 20.0, str(HOT)))
FLOOR: Final = 3.0
BASE: Final = "hot"
RECOUNT: Final = "campaign_stats.recalculate_campaign_stats(uuid[], text)"
CONSTANTS: Final = ("huge_from", "chunk_budget")

CAMPAIGN: Final = """
INSERT INTO campaigns (id, user_id, type, name, status, daily_limit)
VALUES ($1, md5('hot')::uuid, 'email', 'Hot', 'active', 50)
"""
# The same mix as in every other email campaign, of those 2 % bounced, evenly: the guard looks and does not pause.
LOAD: Final = """
INSERT INTO campaign_prospects
       (campaign_id, user_id, status, email, first_name, last_name, company, position, contacted_at)
SELECT $1, md5('hot')::uuid, s.status, 'person-' || p.number || '@company-' || p.roll || '.example',
       'First' || p.roll, 'Last' || p.number, 'Company ' || p.roll, 'Head of Procurement',
       CASE WHEN s.status NOT IN ('pending', 'cancelled') THEN now() - make_interval(secs => 60 + p.number) END
  FROM (SELECT number, number * 619 % 1000 AS roll FROM generate_series(1, $2::int) AS number) AS p
 CROSS JOIN LATERAL (
       SELECT CASE WHEN p.roll < 200 THEN 'pending' WHEN p.roll < 700 THEN 'sent' WHEN p.roll < 780 THEN 'replied'
                   WHEN p.roll < 800 THEN 'bounced' WHEN p.roll < 950 THEN 'completed'
                   WHEN p.roll < 980 THEN 'timed_out' ELSE 'cancelled' END AS status) AS s
"""


@dataclass(frozen=True, slots=True)
class Way:
    """How to start the service, and what is done to its database before."""

    command: Sequence[str] = SERVICE
    prepare: Callable[[str], Awaitable[None]] = nothing


async def without_deferring(url: str) -> None:
    """Its own text again, with other numbers in two places. Raises Failed when they are not there."""
    async with workload.connected(url) as db:
        text = await db.fetchval("SELECT pg_get_functiondef($1::text::regprocedure)", RECOUNT)
        for name in CONSTANTS:
            text, found = re.subn(rf"\b({name} +CONSTANT bigint := )\d+;", rf"\g<1>{variants.NEVER};", text)
            if found != 1:
                raise Failed(f"{RECOUNT} does not hold {name} once: deferring cannot be switched off")
        await db.execute(text)
        if (await db.fetchval("SELECT pg_get_functiondef($1::text::regprocedure)", RECOUNT)) != text:
            raise Failed(f"{RECOUNT} was not replaced")


WAYS: Final[Mapping[str, Way]] = {
    "deferring on": Way(),
    "deferring off": Way(variants.command("never-huge"), without_deferring),
}


async def measure(stage: Stage) -> Report:
    """Each once a round, the order reversed every round."""
    async with stage.database(BASE) as base:
        before = await _heat(stage.postgres.url(base))

        async def attempt(contestant: str, number: int, name: str) -> Trial:
            way = WAYS[contestant]
            course = await steady(
                stage, name, STREAMS, command=way.command, prepare=way.prepare, base=base, before=before
            )
            told = {"hot told": float(len(course.counting("hot")))}
            return course.trial(number, contestant, {**latencies(course, "others"), **told})

        trials = await interleaved(stage, "hot", stage.size.rounds, {name: partial(attempt, name) for name in WAYS})
    report = report_of("hot", stage, trials)
    on, off = WAYS
    against = ratios(counted(trials, off, "p99 ms"), counted(trials, on, "p99 ms"))
    report.figures = [
        Figure("p99 latency beside a hot campaign of 1 M: deferring off vs on", against, ",.1f", at_least(FLOOR)),
        *(
            Figure(f"{name}: {value}", list(counted(trials, name, value).values()), ",.0f")
            for name in WAYS
            for value in ("p50 ms", "p99 ms", "hot told")
        ),
    ]
    return report


async def _heat(url: str) -> workload.Truth:
    """Add the hot campaign; the truth of all."""
    async with workload.connected(url) as db:
        await db.execute(CAMPAIGN, HOT)
        await db.execute("SET session_replication_role = replica")  # no triggers, no foreign keys: they take minutes
        await db.execute(LOAD, HOT, PROSPECTS)
        await db.execute("RESET session_replication_role")
        await workload.settle(db)
    return await workload.read_truth(url)
