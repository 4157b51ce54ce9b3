"""kill -9 in the middle of publishing, with 100 000 rows to go, and how soon a replacement has published them all.

The replacement is started at once, as a supervisor would, in the same group: it finds the dead member still in there.
The clock starts with the kill and stops when the outbox is empty.
"""

import time
from contextlib import AsyncExitStack
from functools import partial
from typing import Final

from schemas import events
from tests.benchmarks import outbox, workload
from tests.benchmarks.report import Figure, Report, at_most
from tests.benchmarks.stage import Stage, others_s, stopped
from tests.benchmarks.trials import Trial, counted, interleaved, report_of

PENDING: Final = 100_000  # at least, at the moment of the kill
AHEAD: Final = 10_000  # that are in the outbox besides
PUBLISHED: Final = 4_000  # when it is killed: after two turns or three
START_DEADLINE_S: Final = 60.0
DEADLINE_S: Final = 90.0
CEILING_S: Final = 10.0
NAME: Final = "kill -9 and a replacement"
BASE: Final = "crashing"


async def measure(stage: Stage) -> Report:
    """Once a round."""
    await outbox.make(stage, BASE, PENDING + AHEAD)
    trials = await interleaved(stage, "crash", stage.size.rounds, {NAME: partial(_run, stage)})
    await workload.drop(stage.postgres.url(), BASE)
    report = report_of("crash", stage, trials)
    figures = {
        value: list(counted(trials, NAME, value).values()) for value in ("empty s", "first s", "pending", "again")
    }
    report.figures = [
        Figure("outbox empty after kill -9 with 100 000 rows pending: s", figures["empty s"], limit=at_most(CEILING_S)),
        Figure("after kill -9: first row published after s", figures["first s"]),
        Figure("after kill -9: rows pending", figures["pending"], ",.0f"),
        Figure("after kill -9: rows published twice", figures["again"], ",.0f"),
    ]
    return report


async def _run(stage: Stage, number: int, name: str) -> Trial:
    rows = PENDING + AHEAD
    async with AsyncExitStack() as stack:
        topics = await stack.enter_async_context(stage.topics(f"{name}."))
        url = await stack.enter_async_context(outbox.copied(stage, name, BASE))
        db = await stack.enter_async_context(workload.connected(url))
        topic = topics.of(events.STATS_UPDATED)
        published = await stack.enter_async_context(outbox.looking(stage.kafka.bootstrap, topic))
        victim = stage.service(f"{name}-victim", topics.prefix, name, name)
        replacement = stage.service(f"{name}-replacement", topics.prefix, name, name)
        problems: list[str] = []
        try:
            victim.start()
            await outbox.reached(published, PUBLISHED, victim, START_DEADLINE_S)
            busy_s, killed = others_s(), time.monotonic()
            victim.kill()
            replacement.start()
            pending = await db.fetchval("SELECT count(*) FROM campaign_stats.outbox")
            sent = await published()
            first = await outbox.reached(published, sent + 1, replacement, START_DEADLINE_S)
            await outbox.reached(published, rows, replacement, DEADLINE_S)
            ended = await outbox.emptied(db, replacement, DEADLINE_S)
            busy_s = others_s() - busy_s
            cpu_s = replacement.cpu_s()
            problems += await stopped([replacement])
        finally:
            victim.stop()
            replacement.stop()
        if pending < PENDING:
            problems.append(f"only {pending} rows were pending when it was killed")
        problems += await outbox.misled(stage.kafka.bootstrap, topic, rows)
        total, seconds = await published(), ended - killed
        return Trial(
            NAME,
            number,
            pending,
            seconds,
            cpu_s,
            replacement.peak_mb,
            busy_s / seconds,
            problems,
            published=total,
            values={"empty s": seconds, "first s": first - killed, "pending": pending, "again": total - rows},
        )
