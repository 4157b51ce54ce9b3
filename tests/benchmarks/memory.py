"""Resident memory of one process over five million hints."""

import asyncio
from typing import Final

from schemas import events
from tests.benchmarks import workload
from tests.benchmarks.report import Figure, Report, at_most
from tests.benchmarks.stage import Group, Round, Stage, stopped

HINTS: Final = 5_000_000
PARTS: Final = 5
SEED: Final = 300
LIMIT_MB: Final = 400.0
GROWTH_MB: Final = 16.0  # what the last million may add to the first one's peak: where pages lie is chance


async def measure(stage: Stage) -> Report:
    """One process; the highest value within each fifth of the hints, up to the flush behind it, which is the peak."""
    async with stage.round(1, seed=SEED, hints=HINTS // PARTS) as common:
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
    topic = topics.of(events.STATUS_CHANGED)
    problems: list[str] = []
    async with stage.database("memory", of=common.database) as database, stage.admin() as admin:
        group = Group(admin, "memory", topic)
        service = stage.service("memory", topics.prefix, database, "memory")
        service.start()
        try:
            await group.joined(service)
            for place in range(PARTS):
                due = (place + 1) * len(common.draws)
                more = [workload.write_hints(stage.kafka.bootstrap, topic, common.draws, SEED + place)] if place else []
                await asyncio.gather(*more, stage.drained(database, group, [service], due))
                peaks[place], service.peak_mb = service.peak_mb, 0.0
            problems += await stopped([service])
        finally:
            service.stop()
        news = await workload.read_news(stage.kafka.bootstrap, topics.of(events.STATS_UPDATED))
        problems += await workload.prove(stage.postgres.url(database), before, news, set(common.draws))
    return peaks, problems
