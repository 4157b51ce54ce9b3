"""Resident memory of one process over five million hints."""

import asyncio
import time
from typing import Final

from schemas import events
from tests.benchmarks import workload
from tests.benchmarks.report import Figure, Report, at_most
from tests.benchmarks.stage import HINTS_READ, LOOK_S, Group, Round, Stage, stopped

HINTS: Final = 5_000_000
PARTS: Final = 5
LIMIT_MB: Final = 400.0
GROWTH_MB: Final = 32.0  # what the last million may add to the first one's peak: a flush of everything takes 20 MB, and
# on a quick machine all hints of this backlog are read before the first flush; where pages lie is chance, too


async def measure(stage: Stage) -> Report:
    """One drain; the highest value within each fifth of the hints, counted by what it has read."""
    async with stage.round(1, seed=300, hints=HINTS) as common:
        peaks, problems = await _run(stage, common)
    figures = [
        Figure(f"resident MB, {place + 1}. million: highest", [peak], ",.0f") for place, peak in enumerate(peaks)
    ]
    figures.append(Figure("resident MB over 5 M hints: highest", [max(peaks)], ",.0f", at_most(LIMIT_MB)))
    figures.append(
        Figure(
            "resident MB: last million's highest minus the first's", [peaks[-1] - peaks[0]], "+,.1f", at_most(GROWTH_MB)
        )
    )
    return Report("memory", figures, problems, [{"peaks_mb": peaks}], rounds=1)


async def _run(stage: Stage, common: Round) -> tuple[list[float], list[str]]:
    before = await stage.template()
    topics, peaks = common.topics, [0.0] * PARTS
    problems: list[str] = []
    async with stage.database("memory", of=common.database) as database, stage.admin() as admin:
        group = Group(admin, "memory", topics.of(events.STATUS_CHANGED))
        service = stage.service("memory", topics.prefix, database, "memory")
        service.start()
        try:
            begun = await group.joined(service)
            read = 0
            while read < HINTS and time.monotonic() < begun + 10 * 60 and not service.has_ended:
                await asyncio.sleep(LOOK_S)
                read = round((await service.metrics())[HINTS_READ])
                place = min(PARTS - 1, read * PARTS // HINTS)
                peaks[place] = max(peaks[place], service.resident_mb())
            service.peak_mb = 0.0
            await stage.drained(database, group, [service], HINTS)  # the last flush is the last million's too
            peaks[-1] = max(peaks[-1], service.peak_mb)
            problems += await stopped([service])
        finally:
            service.stop()
        news = await workload.read_news(stage.kafka.bootstrap, topics.of(events.STATS_UPDATED))
        problems += await workload.prove(stage.postgres.url(database), before, news, set(common.draws))
    return peaks, problems
