"""How long a group is silent while a second process joins: at 1 000 hints a second, and in the middle of a backlog.

Silence is the longest time without a sign of work, from the start of the second process until some seconds after both
have partitions; the longest one before the start is told beside it. The sign at a steady pace: news arrive. In a
backlog most recounts find nothing new, so there it is a recount that was committed: the highest `last_synced_at`, which
every recount stamps, looked at every 20 ms. (Offsets are committed per generation, so they would tell of its size.)
"""

import asyncio
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack, suppress
from functools import partial
from itertools import pairwise
from typing import Final

import asyncpg

from schemas import events
from tests.benchmarks import workload
from tests.benchmarks.latency import Course, latencies, steady
from tests.benchmarks.report import Figure, Report, at_most
from tests.benchmarks.stage import HINTS_READ, LOOK_S, Contestant, Failed, Group, Round, Stage, others_s, stopped
from tests.benchmarks.trials import Trial, counted, interleaved, report_of
from tests.benchmarks.upstream import Stream

PER_SECOND: Final = 1_000.0
BEFORE_S: Final = 4.0
AFTER_S: Final = 3.0
SIGN_S: Final = 0.02
STEADY_CEILING_S: Final = 0.25
BACKLOG_CEILING_S: Final = 1.5
LONG: Final = 2  # times the usual backlog: it must not be done before the second process has joined
SHARE: Final = 0.25  # of the usual backlog that the first process has read when the second one is started
SHARE_DEADLINE_S: Final = 60.0
STEADY, BACKLOG = "a replica joins, steady", "a replica joins, backlog"


async def measure(stage: Stage) -> Report:
    """Once a round each."""
    rounds = stage.size.rounds
    trials = await interleaved(stage, "joining", rounds, {STEADY: partial(_steady, stage)})
    ceilings = {STEADY: STEADY_CEILING_S}
    if not stage.size.is_quick:  # few hints are done before a second process has joined
        ceilings[BACKLOG] = BACKLOG_CEILING_S
        async with stage.round(1, seed=300, hints=LONG * stage.size.hints) as common:
            trials += await interleaved(stage, "joining-full", rounds, {BACKLOG: partial(_backlog, stage, common)})
    report = report_of("joining", stage, trials)
    for name, ceiling in ceilings.items():
        values = {value: list(counted(trials, name, value).values()) for value in ("silent s", "before s", "join s")}
        report.figures += [
            Figure(f"{name}: group silent s", values["silent s"], ",.3f", at_most(ceiling)),
            Figure(f"{name}: longest silence before s", values["before s"], ",.3f"),
            Figure(f"{name}: from its start to joined s", values["join s"], ",.1f"),
        ]
    waits = [wait / 1e3 for wait in counted(trials, STEADY, "highest ms").values()]
    report.figures.append(Figure(f"{STEADY}: longest wait of a hint s", waits, ",.3f"))
    return report


def silence(moments: Sequence[float], begun: float, ended: float) -> float:
    """The longest time without one of `moments` between the two, both ends included."""
    signs = [begun, *(moment for moment in sorted(moments) if begun < moment < ended), ended]
    return max(after - before for before, after in pairwise(signs))


class Joining:
    """A second process of a group, and when that was."""

    def __init__(self, stage: Stage, name: str, prefix: str, database: str, group: Group) -> None:
        self.process = stage.service(f"{name}-second", prefix, database, name)
        self._group = group
        self.started = self.joined = 0.0

    async def join(self) -> None:
        """Start it and wait until both have partitions."""
        self.started = time.monotonic()
        self.process.start()
        await self._group.joined(self.process, members=2)
        self.joined = time.monotonic()

    def values(self, moments: Sequence[float], begun: float, ended: float) -> dict[str, float]:
        """Seconds. `begun`, `ended`: when it was looked at; the latter may be before the time afterwards is over."""
        return {
            "silent s": silence(moments, self.started, min(self.joined + AFTER_S, ended)),
            "before s": silence(moments, begun, self.started),
            "join s": self.joined - self.started,
        }


async def _steady(stage: Stage, number: int, name: str) -> Trial:
    joinings: list[Joining] = []

    async def meanwhile(course: Course) -> None:
        joining = Joining(stage, course.name, course.topics.prefix, course.database, course.group)
        joinings.append(joining)
        course.services.append(joining.process)
        await asyncio.sleep(BEFORE_S)
        await joining.join()
        await asyncio.sleep(AFTER_S)

    before = await stage.template()
    course = await steady(stage, name, [Stream("all", PER_SECOND)], before=before, meanwhile=meanwhile)
    values = joinings[0].values(course.receiver.moments(), course.begun, course.ended)
    return course.trial(number, STEADY, {**values, **latencies(course, "all")})


async def _backlog(stage: Stage, common: Round, number: int, name: str) -> Trial:
    before, topics = await stage.template(), common.topics
    told_before = await workload.ends(stage.kafka.bootstrap, topics.of(events.STATS_UPDATED))
    async with AsyncExitStack() as stack:
        database = await stack.enter_async_context(stage.database(name, of=common.database))
        url = stage.postgres.url(database)
        db = await stack.enter_async_context(workload.connected(url))
        admin = await stack.enter_async_context(stage.admin())
        group = Group(admin, name, topics.of(events.STATUS_CHANGED))
        first = stage.service(f"{name}-first", topics.prefix, database, name)
        second = Joining(stage, name, topics.prefix, database, group)
        signs: list[float] = []
        watching = asyncio.create_task(_watch(db, signs))
        try:
            first.start()
            begun = await group.joined(first)
            busy_s = others_s()
            await _read(first, int(stage.size.hints * SHARE))
            await second.join()
            if await group.committed() >= len(common.draws):
                raise Failed(f"{name}: everything was done before the second process had joined")
            drained = await stage.drained(database, group, [first, second.process], len(common.draws))
            busy_s, cpu_s = others_s() - busy_s, first.cpu_s() + second.process.cpu_s()
            problems = await stopped([first, second.process])
        finally:
            watching.cancel()
            with suppress(asyncio.CancelledError):
                await watching
            first.stop()
            second.process.stop()
        news = await workload.read_news(stage.kafka.bootstrap, topics.of(events.STATS_UPDATED), behind=told_before)
        problems += await workload.prove(url, before, news, set(common.draws))
    return Trial(
        BACKLOG,
        number,
        len(common.draws),
        drained - begun,
        cpu_s,
        first.peak_mb + second.process.peak_mb,
        busy_s / (drained - begun),
        problems,
        published=news.events,
        values=second.values(signs, signs[0], min(drained, signs[-1])),
    )


async def _read(service: Contestant, due: int) -> None:
    """Wait until it has read so many hints; committed they are much later. Raises Failed."""
    deadline = time.monotonic() + SHARE_DEADLINE_S
    while (read := (await service.metrics()).get(HINTS_READ, 0)) < due:
        if time.monotonic() > deadline:
            raise Failed(f"only {read:g} of {due} hints are read")
        await asyncio.sleep(LOOK_S)


async def _watch(db: asyncpg.Connection, signs: list[float]) -> None:
    """Note when recounts were committed."""
    latest = await db.fetchval("SELECT max(last_synced_at) FROM campaigns")
    while True:
        await asyncio.sleep(SIGN_S)
        before, latest = latest, await db.fetchval("SELECT max(last_synced_at) FROM campaigns")
        if latest != before:
            signs.append(time.monotonic())
