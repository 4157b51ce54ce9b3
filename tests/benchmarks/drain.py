"""Drain a backlog of hints: the service beside those that a team could write or take instead.

The clock is the same for all and is read from outside. It starts with the last look at which the group had not joined
yet. The service's stops when every hint is committed (the group's offsets) and outbox and deferred table are empty; a
peer's at the first look after enough events are committed, or PEER_SECONDS; that of one which only counts when it has
published and committed its counts, and so has ended.
"""

import asyncio
import re
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Final

from schemas import events
from schemas.topics import Topics
from tests.benchmarks import workload
from tests.benchmarks.peers import streams
from tests.benchmarks.report import Figure, Limit, Report, at_least, at_most, ratios
from tests.benchmarks.stage import (
    HINTS_READ,
    LOOK_S,
    PEERS,
    PEERS_PYTHON,
    Contestant,
    Group,
    Round,
    Run,
    Stage,
    others_s,
    rates,
    reported,
    stopped,
)

MEMORY_LIMIT_MB: Final = 400.0
WARM_UPS: Final = 3  # of the service; its rate still rises by a tenth from the first to the third
REQUESTS: Final = 100  # that wait for the service beside the hints
PEER_EVENTS: Final = 3_000
MANY_EVENTS: Final = 200_000  # of a peer that is not slow
PEER_SECONDS: Final = 60.0
PEER_END_S: Final = 60.0  # to flush and commit what it counted
SERVICE: Final = "service"
ON_BOTH_CORES: Final = "service, two processes"
COUNTED: Final = re.compile(rb"^counted (\d+)$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Peer:
    """Somebody else's way. `command` is made at the last moment, because it may have to be built.

    `counts_only`: has no database, and publishes what it counted; the others recount, and publish.
    `tells_each`: publishes at least one event for every hint it has committed. `takes_both`: works on both cores by
    itself, so that its limit is for the service on both; beside one process of the service it is shown without a limit.
    """

    name: str
    limit: Limit | None
    command: Callable[[], Sequence[str]]
    events: int
    environment: Mapping[str, str] = field(default_factory=dict)
    counts_only: bool = False
    tells_each: bool = False
    takes_both: bool = False


def _script(name: str, python: object = PEERS_PYTHON) -> Callable[[], Sequence[str]]:
    return lambda: [str(python), str(PEERS / f"{name}.py")]


PER_EVENT: Final = Peer(
    "per-event aiokafka consumer", at_least(400), _script("per_event", sys.executable), PEER_EVENTS, tells_each=True
)
STREAMS: Final = {"STORE": "rocksdb", "COMMIT_MS": "", "THREADS": "2"}
OTHERS: Final = (
    Peer(
        "FastStream, 1 worker", at_least(300), _script("faststream_events"), PEER_EVENTS, {"WORKERS": "1"},
        tells_each=True,
    ),
    Peer("FastStream, 8 workers", at_least(110), _script("faststream_events"), PEER_EVENTS, {"WORKERS": "8"}),
    Peer("FastStream batches + our SQL", at_least(6), _script("faststream_batches"), MANY_EVENTS),
    Peer("FastStream batches, squeezed", None, _script("faststream_batches"), MANY_EVENTS, {"SQUEEZED": "1"}),
    Peer("quixstreams, counting only", at_least(5), _script("quix_counts"), MANY_EVENTS, counts_only=True),
    Peer("quixstreams, squeezed", None, _script("quix_counts"), MANY_EVENTS, {"SQUEEZED": "1"}, counts_only=True),
    Peer(
        "Kafka Streams, RocksDB, commit 100 ms", at_least(1.3), streams.command, sys.maxsize,
        {**STREAMS, "COMMIT_MS": "100"}, counts_only=True, takes_both=True,
    ),
    Peer(
        "Kafka Streams, RocksDB, default commit", at_least(1.0), streams.command, sys.maxsize, STREAMS,
        counts_only=True, takes_both=True,
    ),
)  # fmt: skip


async def measure(stage: Stage) -> Report:
    """The service beside all peers (only the first when quick), each once a round, the order reversed every round."""
    peers = [PER_EVENT] if stage.size.is_quick else [PER_EVENT, *OTHERS]
    runs: list[Run] = []
    await stage.template()
    for number in range(1, stage.size.rounds + 1):
        runs.extend(await _round(stage, number, peers))
    report = reported("drain", runs, rounds=stage.size.rounds)
    ours, on_both = rates(runs, SERVICE), rates(runs, ON_BOTH_CORES)
    for peer in peers:
        theirs = rates(runs, peer.name)
        limit = None if peer.takes_both else peer.limit
        report.figures.append(Figure(f"drain vs {peer.name}", ratios(ours, theirs), limit=limit))
        if peer.takes_both:
            name = f"drain, two processes vs {peer.name}, two threads"
            report.figures.append(Figure(name, ratios(on_both, theirs), limit=peer.limit))
    counting = [run for run in runs if run.counts]
    for name in dict.fromkeys(run.contestant for run in runs):
        mine = [run for run in counting if run.contestant == name]
        limit = at_most(MEMORY_LIMIT_MB) if name == SERVICE else None
        report.figures += [
            Figure(f"{name}: events/s", [run.rate for run in mine], ",.0f"),
            Figure(f"{name}: CPU us/event", [run.cpu_s / run.events * 1e6 for run in mine], ",.1f"),
            Figure(f"{name}: highest resident MB", [run.peak_mb for run in mine], ",.0f", limit),
        ]
    return report


async def _round(stage: Stage, number: int, peers: Sequence[Peer]) -> list[Run]:
    """Everybody on the same hints and equal databases, one after the other."""
    ours = {SERVICE: 1, ON_BOTH_CORES: 2} if any(peer.takes_both for peer in peers) else {SERVICE: 1}
    order: list[Peer | str] = [*peers[: len(peers) // 2], *ours, *peers[len(peers) // 2 :]]
    if number % 2 == 0:
        order.reverse()
    runs = []
    async with stage.round(number, seed=number) as common:
        asked = await ask(stage, common)
        if number == 1:
            await warm_up(stage, common)
            _say_for_nothing(stage, await _recounting_run(stage, common, PER_EVENT, "warm-up-peer"))
        for place, peer in enumerate(order):
            if isinstance(peer, str):
                attempt: Callable[[str], Awaitable[Run]] = partial(
                    service_run, stage, common, processes=ours[peer], contestant=peer, asked=asked
                )
            else:
                attempt = partial(_counting_run if peer.counts_only else _recounting_run, stage, common, peer)
            runs.append(await stage.undisturbed(f"r{number}-{place}", attempt))
    return runs


async def ask(stage: Stage, common: Round) -> list[str]:
    """Sync requests of some campaigns beside the hints; their ids."""
    campaigns = stage.ids[:: max(1, len(stage.ids) // REQUESTS)]
    return await workload.write_requests(stage.kafka.bootstrap, common.topics.of(events.SYNC_REQUESTED), campaigns)


async def warm_up(stage: Stage, common: Round) -> None:
    """The service, for nothing: the brokers' JVMs compile meanwhile, and nobody meets them cold."""
    for number in range(WARM_UPS):
        _say_for_nothing(stage, await service_run(stage, common, f"warm-up-service{number}"))


def _say_for_nothing(stage: Stage, run: Run) -> None:
    stage.say(f"  warm-up, does not count: {run.contestant} = {run.rate:,.0f}/s")


async def service_run(
    stage: Stage, common: Round, name: str, *, processes: int = 1, contestant: str = SERVICE, asked: Sequence[str] = ()
) -> Run:
    """One run of the service, in one process or several of one group, from joined to drained. `asked`: the ids of the
    sync requests that were written too.
    """
    before, topics = await stage.template(), common.topics
    published_before = await workload.ends(stage.kafka.bootstrap, topics.of(events.STATS_UPDATED))
    async with stage.database(name, of=common.database) as database, stage.admin() as admin:
        group = Group(admin, name, topics.of(events.STATUS_CHANGED))
        services = [stage.service(f"{name}-{place}", topics.prefix, database, name) for place in range(processes)]
        begun = time.monotonic()
        problems: list[str] = []
        try:
            for service in services:
                service.start()
            joined = await group.joined(services[0], members=processes)
            cpu_s, busy_s = sum(service.cpu_s() for service in services), others_s()
            postgres_s, kafka_s = stage.servers_cpu_s()
            finished = await stage.drained(database, group, services, len(common.draws))
            cpu_s, busy_s = sum(service.cpu_s() for service in services) - cpu_s, others_s() - busy_s
            postgres_s, kafka_s = (
                after - at for after, at in zip(stage.servers_cpu_s(), (postgres_s, kafka_s), strict=True)
            )
            told = [await service.metrics() for service in services]
            problems += _disagreements(told, len(common.draws))
            problems += await stopped(services)
        finally:
            for service in services:
                service.stop()
        news = await workload.read_news(stage.kafka.bootstrap, topics.of(events.STATS_UPDATED), behind=published_before)
        problems += await workload.prove(stage.postgres.url(database), before, news, set(common.draws))
        if unanswered := set(asked) - news.causes:
            problems.append(f"{len(unanswered)} of {len(asked)} requests were not answered")
    return Run(
        contestant,
        common.number,
        len(common.draws),
        finished - joined,
        cpu_s,
        sum(service.peak_mb for service in services),
        busy_s / (finished - joined),
        problems,
        start_s=joined - begun,
        published=news.events,
        recounts=round(sum(series['campaign_stats_recounts_total{caller="chunk"}'] for series in told)),
        postgres_s=postgres_s,
        kafka_s=kafka_s,
        recount_s=sum(series['campaign_stats_recount_seconds_sum{caller="chunk"}'] for series in told),
    )


def _disagreements(told: Sequence[Mapping[str, float]], records: int) -> list[str]:
    """Where the service's own metrics tell another story than the broker."""
    read = sum(series[HINTS_READ] for series in told)
    return [f"/metrics says {read:g} hints"] if read < records else []


async def _recounting_run(stage: Stage, common: Round, peer: Peer, name: str) -> Run:
    topics = common.topics
    output, due = f"{topics.prefix}{name}.stats-updated", min(peer.events, len(common.draws))
    async with stage.database(name, of=common.database) as database, stage.admin() as admin:
        url = stage.postgres.url(database)
        await workload.create_topic(stage.kafka.bootstrap, output)
        async with workload.connected(url) as db:
            started_at = await db.fetchval("SELECT clock_timestamp()")
        group = Group(admin, name, topics.of(events.STATUS_CHANGED))
        process = peer_process(stage, name, topics, peer, output, DATABASE_URL=url)
        begun = time.monotonic()
        process.start()
        done = 0
        try:
            joined = await group.joined(process)
            cpu_s, busy_s = process.cpu_s(), others_s()
            while done < due and time.monotonic() < joined + PEER_SECONDS and not process.has_ended:
                await asyncio.sleep(LOOK_S)
                done = await group.committed()
                process.resident_mb()
            finished = time.monotonic()
            said = process.last_lines(3)
            cpu_s, busy_s = process.cpu_s() - cpu_s, others_s() - busy_s
        finally:
            process.stop()
        news = await workload.read_news(stage.kafka.bootstrap, output)
        truth = await workload.read_truth(url)
        async with workload.connected(url) as db:
            touched = {
                row["id"] for row in await db.fetch("SELECT id FROM campaigns WHERE last_synced_at >= $1", started_at)
            }
    problems = []
    if done < PEER_EVENTS:
        problems.append(f"the peer did only {done} events: {said}")
    if not touched or touched - news.latest.keys():
        problems.append(f"the peer recounted {len(touched)} campaigns and told of {len(news.latest)}")
    if peer.tells_each and news.events < done:
        problems.append(f"the peer committed {done} events and published {news.events}")
    if drifted := touched & set(truth.drifted()):
        problems.append(f"the peer wrote wrong stats to {len(drifted)} campaigns")
    return Run(
        peer.name,
        common.number,
        done,
        finished - joined,
        cpu_s,
        process.peak_mb,
        busy_s / (finished - joined),
        problems,
        start_s=joined - begun,
        published=news.events,
    )


async def _counting_run(stage: Stage, common: Round, peer: Peer, name: str) -> Run:
    """A peer that only counts hints: until it has counted enough, published and committed that, and ended with 0."""
    topics, draws = common.topics, common.draws
    due = min(peer.events, len(draws))
    output = f"{topics.prefix}{name}.counts"
    await workload.create_topic(stage.kafka.bootstrap, output)
    async with stage.admin() as admin:
        group = Group(admin, name, topics.of(events.STATUS_CHANGED))
        process = peer_process(stage, name, topics, peer, output, EXPECTED=str(due))
        begun = time.monotonic()
        process.start()
        counted, spent_s = 0, 0.0
        try:
            joined = await group.joined(process)
            cpu_s, busy_s = process.cpu_s(), others_s()
            while not process.has_ended and time.monotonic() < joined + PEER_SECONDS:
                spent_s = process.cpu_s() - cpu_s
                process.resident_mb()
                await asyncio.sleep(LOOK_S / 5)
            finished, busy_s = time.monotonic(), others_s() - busy_s
            code = await process.ended(PEER_END_S)
            counted = counted_in(process)
        finally:
            process.stop()
    problems = []
    counts = await workload.read_counts(stage.kafka.bootstrap, output)
    if code != 0 or counted < PEER_EVENTS:
        problems.append(f"the peer counted {counted} events and ended with {code}: {process.last_lines(3)}")
    if sum(counts.values()) != counted:
        problems.append(f"the peer counted {counted} events and published counts of {sum(counts.values())}")
    elif counted == len(draws) and counts != Counter(draws):
        problems.append("the peer published wrong counts")
    return Run(
        peer.name,
        common.number,
        counted,
        finished - joined,
        spent_s,
        process.peak_mb,
        busy_s / (finished - joined),
        problems,
        start_s=joined - begun,
    )


def peer_process(stage: Stage, name: str, topics: Topics, peer: Peer, output: str, **environment: str) -> Contestant:
    state = stage.directory / name / "state"
    return Contestant(
        name,
        stage.directory / name,
        peer.command(),
        {
            "KAFKA_BOOTSTRAP_SERVERS": stage.kafka.bootstrap,
            "INPUT_TOPIC": topics.of(events.STATUS_CHANGED),
            "OUTPUT_TOPIC": output,
            "GROUP_ID": name,
            "STATE_DIR": str(state),
            **peer.environment,
            **environment,
        },
    )


def counted_in(process: Contestant) -> int:
    """The last number of events that the peer says it has counted."""
    with process.log.open("rb") as log:
        log.seek(max(0, log.seek(0, 2) - 4096))
        said = COUNTED.findall(log.read())
    return int(said[-1]) if said else 0
