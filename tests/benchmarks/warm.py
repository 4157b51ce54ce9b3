"""The second half of three million hints: the service beside a warm Kafka Streams that only counts, in memory.

The peer has two threads and so stands beside two processes of the service, as in the drain; one is told too. The clock
starts at the first look that finds half of the hints read, by each one's own count (the service's /metrics, what the
peer prints). It stops when the service has committed and published everything, when the peer has counted it.
"""

import asyncio
import sys
import time
from functools import partial
from typing import Final

from schemas import events
from tests.benchmarks import workload
from tests.benchmarks.drain import STREAMS, Peer, counted_in, peer_process
from tests.benchmarks.peers import streams
from tests.benchmarks.report import Figure, Report, at_least, ratios
from tests.benchmarks.stage import (
    HINTS_READ,
    LOOK_S,
    Failed,
    Group,
    Round,
    Run,
    Stage,
    others_s,
    rates,
    reported,
    stopped,
)

HINTS: Final = 3_000_000
HALF: Final = HINTS // 2
DEADLINE_S: Final = 180.0
AIM: Final = 1.2
NAMES: Final = {1: "service, second half", 2: "service, two processes, second half"}
PEER: Final = Peer(
    "Kafka Streams in memory, second half", at_least(AIM, is_aim=True), streams.command, sys.maxsize,
    {**STREAMS, "STORE": "memory"}, counts_only=True,
)  # fmt: skip


async def measure(stage: Stage) -> Report:
    """Each once a round, the order reversed every round."""
    runs: list[Run] = []
    async with stage.round(1, seed=400, hints=HINTS) as common:
        for number in range(1, stage.size.rounds + 1):
            contestants = [
                *(partial(_service, stage, common, number, processes) for processes in NAMES),
                partial(_streams, stage, common, number),
            ]
            for place, attempt in enumerate(contestants if number % 2 else contestants[::-1]):
                runs.append(await stage.undisturbed(f"w{number}-{place}", attempt))
    report = reported("warm", runs, rounds=stage.size.rounds)
    one, two, theirs = (rates(runs, name) for name in (*NAMES.values(), PEER.name))
    report.figures = [
        Figure("two processes vs warm Kafka Streams in memory, two threads", ratios(two, theirs), ",.2f", PEER.limit),
        Figure("one process vs warm Kafka Streams in memory, two threads", ratios(one, theirs), ",.2f"),
        *(
            Figure(f"{name}: events/s", list(rates(runs, name).values()), ",.0f")
            for name in (*NAMES.values(), PEER.name)
        ),
    ]
    return report


async def _service(stage: Stage, common: Round, number: int, processes: int, name: str) -> Run:
    topics, before = common.topics, await stage.template()
    behind = await workload.ends(stage.kafka.bootstrap, topics.of(events.STATS_UPDATED))
    async with stage.database(name, of=common.database) as database, stage.admin() as admin:
        group = Group(admin, name, topics.of(events.STATUS_CHANGED))
        services = [stage.service(f"{name}-{place}", topics.prefix, database, name) for place in range(processes)]
        problems: list[str] = []
        try:
            for service in services:
                service.start()
            deadline = await group.joined(services[0], members=processes) + DEADLINE_S
            half = 0
            while half < HALF and time.monotonic() < deadline and not any(service.has_ended for service in services):
                await asyncio.sleep(LOOK_S)
                half = round(sum([(await service.metrics())[HINTS_READ] for service in services]))
            if not HALF <= half < HINTS:
                raise Failed(f"{name} was not seen at half: {services[0].last_lines(3)}")
            begun, cpu_s, busy_s = time.monotonic(), sum(service.cpu_s() for service in services), others_s()
            finished = await stage.drained(database, group, services, HINTS)
            cpu_s, busy_s = sum(service.cpu_s() for service in services) - cpu_s, others_s() - busy_s
            problems += await stopped(services)
        finally:
            for service in services:
                service.stop()
        news = await workload.read_news(stage.kafka.bootstrap, topics.of(events.STATS_UPDATED), behind)
        problems += await workload.prove(stage.postgres.url(database), before, news, set(common.draws))
    return Run(
        NAMES[processes],
        number,
        HINTS - half,
        finished - begun,
        cpu_s,
        sum(service.peak_mb for service in services),
        busy_s / (finished - begun),
        problems,
    )


async def _streams(stage: Stage, common: Round, number: int, name: str) -> Run:
    output = f"{common.topics.prefix}{name}.counts"
    await workload.create_topic(stage.kafka.bootstrap, output)
    process = peer_process(stage, name, common.topics, PEER, output, EXPECTED=str(HINTS))
    process.start()
    try:
        deadline = time.monotonic() + DEADLINE_S
        half = counted = 0
        while half < HALF and time.monotonic() < deadline and not process.has_ended:
            await asyncio.sleep(LOOK_S / 5)
            half = counted_in(process)
        begun, cpu_s, busy_s = time.monotonic(), process.cpu_s(), others_s()
        while counted < HINTS and time.monotonic() < deadline and not process.has_ended:
            await asyncio.sleep(LOOK_S / 5)
            counted = counted_in(process)
            process.resident_mb()
        finished, cpu_s, busy_s = time.monotonic(), process.cpu_s() - cpu_s, others_s() - busy_s
        if not HALF <= half < HINTS:
            raise Failed(f"{name} was not seen at half: {process.last_lines(3)}")
        code = await process.ended(DEADLINE_S)
    finally:
        process.stop()
    counts = await workload.read_counts(stage.kafka.bootstrap, output)
    problems = [] if code == 0 else [f"ended with {code}: {process.last_lines(3)}"]
    if sum(counts.values()) != HINTS:
        problems.append(f"counted {sum(counts.values())} of {HINTS}")
    return Run(
        PEER.name, number, HINTS - half, finished - begun, cpu_s, process.peak_mb, busy_s / (finished - begun), problems
    )
