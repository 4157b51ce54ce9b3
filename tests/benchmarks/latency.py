"""From a hint to its news at 1 000 hints a second: the service, woken after each commit, beside one that only polls.

The clock of a hint starts when it is handed to the upstream's client, after the commit of what it speaks of, and stops
when the event that names it as its cause is in a receiver's hands. Every hint is for another campaign than those
before, so each is news and nothing is coalesced. The first seconds do not count,
nor do those in which the benchmark itself asks for something: each takes the cores for tens of milliseconds.
"""

import asyncio
import re
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Final

from schemas import events
from schemas.topics import Topics
from tests.benchmarks import variants, workload
from tests.benchmarks.report import Figure, Report, at_most, ratios
from tests.benchmarks.stage import Contestant, Group, Stage, others_s, stopped, tree_cpu_s
from tests.benchmarks.trials import Trial, counted, interleaved, report_of
from tests.benchmarks.upstream import Answer, Receiver, Stream, Upstream, percentile, receiving, unanswered

PER_SECOND: Final = 1_000.0
WARM_UP_S: Final = 4.0
QUIET_S: Final = 1.0
MEASURED_S: Final = 12.0
COMPILING_PER_SECOND: Final = 2_000.0
COMPILING_S: Final = 8.0
COMPILED: Final = 0.9  # of the broker's CPU in the run before, twice: it falls to a quarter over the first minutes
COMPILING_RUNS: Final = 8  # at most
COMPILING_RUNS_QUICK: Final = 5
PACE_MISSED: Final = re.compile(
    "too few$|were not answered by news$"
)  # the latter: coalesced, hints came again too soon
CEILING: Final = 0.35
SERVICE: Final = ("-m", "consumer")
NAMES: Final[Mapping[str, Sequence[str]]] = {
    "service": SERVICE,
    "relay polls every 100 ms": variants.command("polling"),
}


@dataclass(slots=True)
class Course:
    """One run under way: the service joined, the upstream at its pace, everything noted."""

    stage: Stage
    name: str
    topics: Topics
    database: str
    group: Group
    receiver: Receiver
    services: list[Contestant]
    begun: float = 0.0  # monotonic: when the warm-up was over
    ended: float = 0.0
    cpu_s: float = 0.0
    sessions_s: float = 0.0  # CPU of the service's sessions in PostgreSQL
    broker_s: float = 0.0  # CPU of Kafka
    generations: float = 0.0
    flushed: float = 0.0  # records in all generations together
    flushing_s: float = 0.0
    others: float = 0.0
    made: Mapping[str, int] = field(default_factory=dict)
    answers: Mapping[str, Mapping[int, Answer]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def counting(self, stream: str) -> list[Answer]:
        """The answers to what was made while it was measured."""
        return [answer for answer in self.answers.get(stream, {}).values() if self.begun <= answer.made <= self.ended]

    def trial(self, number: int, contestant: str, values: Mapping[str, float]) -> Trial:
        """What came of it."""
        return Trial(
            contestant,
            number,
            sum(len(self.counting(stream)) for stream in self.answers),
            self.ended - self.begun,
            self.cpu_s,
            sum(service.peak_mb for service in self.services),
            self.others,
            self.problems,
            published=len(self.receiver.arrivals),
            values=values,
        )


async def measured(course: Course) -> None:
    """What happens meanwhile: nothing."""
    await asyncio.sleep(MEASURED_S)


async def nothing(url: str) -> None:
    """What is done to the database before: nothing."""


async def steady(
    stage: Stage,
    name: str,
    streams: Sequence[Stream],
    *,
    command: Sequence[str] = SERVICE,
    base: str = workload.TEMPLATE,
    before: workload.Truth,
    prepare: Callable[[str], Awaitable[None]] = nothing,
    meanwhile: Callable[[Course], Awaitable[None]] = measured,
) -> Course:
    """One process serves a steady upstream on a copy of `base`, until everything is answered; checked like a drain.

    Every hint of the first stream must have been answered by news. `meanwhile` begins after the warm-up and may start
    more processes; CPU and what others used are its alone.
    """
    async with AsyncExitStack() as stack:
        topics = await stack.enter_async_context(stage.topics(f"{name}."))
        database = await stack.enter_async_context(stage.database(name, of=base))
        url = stage.postgres.url(database)
        await prepare(url)
        admin = await stack.enter_async_context(stage.admin())
        receiver = await stack.enter_async_context(receiving(stage.kafka.bootstrap, topics.of(events.STATS_UPDATED)))
        group = Group(admin, name, topics.of(events.STATUS_CHANGED))
        service = stage.service(f"{name}-service", topics.prefix, database, name, command=command)
        course = Course(stage, name, topics, database, group, receiver, [service])
        upstream = Upstream(stage, f"{name}-upstream", topics, database, streams)
        try:
            service.start()
            await group.joined(service)
            upstream.start()
            await upstream.begun()
            await asyncio.sleep(WARM_UP_S)
            await _watched(course, meanwhile)
            course.made, wrong = await upstream.end()
            await stage.drained(database, group, course.services, sum(course.made.values()))
            course.problems = wrong + await stopped(course.services)
        finally:
            upstream.stop()
            for process in course.services:
                process.stop()
        await receiver.settled()
        course.answers = receiver.answers()
        course.problems += unanswered(course.made, course.answers, streams[0].name)
        course.problems += await workload.prove(url, before, receiver.news(), set(before.counts))
    return course


async def _watched(course: Course, meanwhile: Callable[[Course], Awaitable[None]]) -> None:
    sessions = await workload.sessions(course.stage.postgres.url(course.database))
    before = await _generations(course.services)
    await asyncio.sleep(QUIET_S)
    sessions_s, broker_s = tree_cpu_s(sessions), course.stage.servers_cpu_s()[1]
    cpu_s, busy_s = sum(service.cpu_s() for service in course.services), others_s()
    course.begun = time.monotonic()
    await meanwhile(course)
    course.ended = time.monotonic()
    course.cpu_s = sum(service.cpu_s() for service in course.services) - cpu_s
    course.others = (others_s() - busy_s) / (course.ended - course.begun)
    course.sessions_s = tree_cpu_s(sessions) - sessions_s
    course.broker_s = course.stage.servers_cpu_s()[1] - broker_s
    after = await _generations(course.services)
    course.generations, course.flushed, course.flushing_s = (
        now - then for now, then in zip(after, before, strict=True)
    )
    for service in course.services:
        service.resident_mb()


async def _generations(services: Sequence[Contestant]) -> list[float]:
    """How many so far, how many records in them, and how many seconds they took."""
    told = [await service.metrics() for service in services]
    series = "generation_seconds_count", "generation_records_sum", "generation_seconds_sum"
    return [sum(metrics[f"campaign_stats_{name}"] for metrics in told) for name in series]


def latencies(course: Course, stream: str) -> dict[str, float]:
    """Milliseconds."""
    taken = [answer.latency_s * 1e3 for answer in course.counting(stream)]
    return {
        "p50 ms": percentile(taken, 50),
        "p99 ms": percentile(taken, 99),
        "highest ms": max(taken, default=0.0),
        "CPU us/hint": course.cpu_s / max(1, len(taken)) * 1e6,
        "CPU us/hint in PostgreSQL": course.sessions_s / max(1, len(taken)) * 1e6,
        "CPU us/hint in Kafka": course.broker_s / max(1, len(taken)) * 1e6,
        "hints/generation": course.flushed / max(1, course.generations),
        "ms/generation": course.flushing_s / max(1, course.generations) * 1e3,
    }


async def measure(stage: Stage) -> Report:
    """Each once a round, the order reversed every round, after runs for nothing."""
    before = await stage.template()
    streams = [Stream("all", PER_SECOND)]

    async def attempt(contestant: str, number: int, name: str) -> Trial:
        course = await steady(stage, name, streams, command=NAMES[contestant], before=before)
        return course.trial(number, contestant, latencies(course, "all"))

    problems = await _compiled(stage, before)
    trials = await interleaved(stage, "latency", stage.size.rounds, {name: partial(attempt, name) for name in NAMES})
    report = report_of("latency", stage, trials)
    report.problems = [*problems, *report.problems]
    ours, polls = NAMES
    against = ratios(counted(trials, ours, "p99 ms"), counted(trials, polls, "p99 ms"))
    report.figures = [
        Figure("p99 latency at 1 000/s vs a relay that polls every 100 ms", against, ",.2f", at_most(CEILING)),
        *(
            Figure(f"{name}: {value}", list(counted(trials, name, value).values()), ",.1f")
            for name in NAMES
            for value in (
                "p50 ms",
                "p99 ms",
                "CPU us/hint",
                "CPU us/hint in PostgreSQL",
                "CPU us/hint in Kafka",
                "hints/generation",
                "ms/generation",
            )
        ),
    ]
    return report


async def _compiled(stage: Stage, before: workload.Truth) -> list[str]:
    """Run for nothing until the broker spends no less on a hint than in the run before, twice in a row; what
    went wrong, but for the pace, which may be more than a small machine holds meanwhile.

    Its compiler works in bursts of up to half a second, each of which takes all cores of such a machine.
    """
    problems: list[str] = []
    last_us, settled = 0.0, 0

    async def briefly(course: Course) -> None:
        await asyncio.sleep(COMPILING_S)

    for number in range(COMPILING_RUNS_QUICK if stage.size.is_quick else COMPILING_RUNS):
        streams = [Stream("all", COMPILING_PER_SECOND)]
        course = await steady(stage, f"latency-warm-up{number}", streams, before=before, meanwhile=briefly)
        values = latencies(course, "all")
        us = values["CPU us/hint in Kafka"]
        told = f"CPU us/hint in Kafka {us:,.0f}  p99 ms {values['p99 ms']:,.0f}"
        stage.say("  ".join([f"  warm-up, does not count: {told}", *course.problems]))
        problems += [f"warm-up: {why}" for why in course.problems if not PACE_MISSED.search(why)]
        settled = settled + 1 if us >= COMPILED * last_us > 0 else 0
        last_us = us
        if settled == 2:
            return problems
    stage.say("  the broker may not have compiled everything yet")
    return problems
