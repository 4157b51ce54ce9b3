"""Drain a backlog of hints: the service beside a consumer that handles one event at a time. And the service's memory.

The clock is the same for both and is read from outside. It starts with the last look at which the group had not joined
yet. The service's stops when every hint is committed (the group's offsets) and outbox and deferred table are empty, the
peer's at the first look after PEER_EVENTS committed events or PEER_SECONDS.
"""

import asyncio
import contextlib
import os
import signal
import statistics
import sys
import time
import urllib.request
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from uuid import UUID

import psutil  # type: ignore[import-untyped]  # has no types
from aiokafka.admin import AIOKafkaAdminClient

from consumer.demo.servers import Postgres, Server, free_port
from schemas import events
from schemas.topics import Topics
from tests.benchmarks import workload
from tests.benchmarks.workload import Truth
from tests.servers import ApacheKafka

FLOOR: Final = 250.0  # times the peer's rate
OTHERS_AT_MOST: Final = 0.25  # cores; beyond it the peer, which waits more often, loses more than the service does
MEMORY_LIMIT_MB: Final = 400.0
PEAK_GROWTH_MB: Final = 16.0  # what a second backlog may add to the highest value: where pages lie is chance ...
REST_GROWTH: Final = 0.05  # ... and to what stays afterwards: 5 MB of 100 would be 10 bytes kept of each hint
PEER_EVENTS: Final = 3_000
PEER_SECONDS: Final = 60.0
JOIN_DEADLINE_S: Final = 60.0
DRAIN_DEADLINE_S: Final = 300.0
END_DEADLINE_S: Final = 20.0
LOOK_S: Final = 0.05
REST_S: Final = 3.0  # after a drain, before memory at rest is read
FROZEN_AT_MOST_S: Final = 10.0  # below the group's session timeout of 15 s
SERVICE: Final = "service"
PER_EVENT: Final = "per-event consumer"
PEER: Final = Path(__file__).parent / "peers" / "per_event.py"


@dataclass(frozen=True, slots=True)
class Plan:
    """How much of everything."""

    campaigns: int
    hints: int
    rounds: int


@dataclass(frozen=True, slots=True)
class Run:
    """One run of one contestant: `events` in `seconds` after the join; memory and CPU of its process alone.

    `others`: cores that programs besides this benchmark and its servers kept busy meanwhile.
    """

    contestant: str
    round: int
    events: int
    seconds: float
    start_s: float
    cpu_s: float
    peak_mb: float
    published: int
    others: float
    problems: Sequence[str]

    @property
    def rate(self) -> float:
        """Events per second."""
        return self.events / self.seconds


@dataclass(frozen=True, slots=True)
class Memory:
    """Resident megabytes of one process over two backlogs: the highest, and at rest afterwards."""

    first_peak_mb: float
    first_rest_mb: float
    second_peak_mb: float
    second_rest_mb: float
    problems: Sequence[str]

    @property
    def peak_growth_mb(self) -> float:
        """What the second backlog added to the highest value."""
        return self.second_peak_mb - self.first_peak_mb

    @property
    def rest_growth_mb(self) -> float:
        """What the second backlog left behind."""
        return self.second_rest_mb - self.first_rest_mb

    @property
    def rest_allowed_mb(self) -> float:
        """What it may leave behind."""
        return REST_GROWTH * self.first_rest_mb


@dataclass(frozen=True, slots=True)
class Field:
    """Where runs take place: the servers, the campaigns, and what the template holds."""

    postgres: Postgres
    kafka: ApacheKafka
    directory: Path
    ids: Sequence[UUID]
    before: Truth

    def environment(self, prefix: str, database: str, group: str, port: int = 0) -> dict[str, str]:
        """Settings of the service for one run."""
        return {
            "DATABASE_URL": self.postgres.url(database),
            "KAFKA_BOOTSTRAP_SERVERS": self.kafka.bootstrap,
            "CAMPAIGN_STATS_TOPIC_PREFIX": prefix,
            "CAMPAIGN_STATS_GROUP_ID": group,
            "CAMPAIGN_STATS_HTTP_PORT": str(port),
            "CAMPAIGN_STATS_SWEEP_INTERVAL_S": "0",
            "CAMPAIGN_STATS_LOG_LEVEL": "WARNING",
        }


class Contestant(Server):
    """A consumer as a process of its own, watched from outside."""

    def __init__(self, name: str, directory: Path, command: Sequence[str], env: Mapping[str, str]) -> None:
        super().__init__(directory)
        self.name = name
        self._command = command
        self._env = env
        self.peak_mb = 0.0

    def start(self) -> None:
        """Start it."""
        self.directory.mkdir(parents=True, exist_ok=True)
        self.spawn([sys.executable, *self._command], env=self._env)

    def resident_mb(self) -> float:
        """Resident memory now, 0 when it ended; remembered if it is the highest yet."""
        now: float = psutil.Process(self.pid).memory_info().rss / 2**20
        self.peak_mb = max(self.peak_mb, now)
        return now

    def cpu_s(self) -> float:
        """CPU seconds so far, user and system."""
        times = psutil.Process(self.pid).cpu_times()
        return float(times.user + times.system)

    async def ended(self) -> int | None:
        """Its exit code once it ends by itself; None when it does not in time."""
        deadline = time.monotonic() + END_DEADLINE_S
        while self.process is not None and time.monotonic() < deadline:
            if (code := self.process.poll()) is not None:
                return code
            await asyncio.sleep(LOOK_S)
        return None


class Failed(Exception):
    """A run that came to nothing; the message says why."""


class Group:
    """A consumer group, seen through the broker: it costs the contestant nothing to be looked at."""

    def __init__(self, admin: Any, name: str, topic: str) -> None:
        self._admin = admin
        self._name = name
        self._topic = topic

    async def joined(self, contestant: Contestant) -> float:
        """Wait for its first member; the moment of the last look that did not yet find it."""
        deadline = time.monotonic() + JOIN_DEADLINE_S
        before = time.monotonic()
        while before < deadline:
            looked = time.monotonic()
            [answer] = await self._admin.describe_consumer_groups([self._name])
            if answer.groups[0][2] == "Stable":
                return before
            before = looked
            contestant.resident_mb()
            await asyncio.sleep(LOOK_S / 2)
        raise Failed(f"{contestant.name} did not join within {JOIN_DEADLINE_S:g} s:\n{contestant.last_lines()}")

    async def committed(self) -> int:
        """How many events of the topic are committed (its offsets begin at 0)."""
        offsets = await self._admin.list_consumer_group_offsets(self._name)
        return sum(max(0, at.offset) for partition, at in offsets.items() if partition.topic == self._topic)


async def prepare(postgres: Postgres, kafka: ApacheKafka, directory: Path, plan: Plan) -> Field:
    """Campaigns in a template, once served by the service itself: their stats are right and were published once."""
    ids = workload.campaign_ids(plan.campaigns)
    url = postgres.url(workload.TEMPLATE)
    await workload.make_template(postgres.url(), url, ids)
    field = Field(postgres, kafka, directory, ids, await workload.read_truth(url))
    topics = Topics("prepare.")
    await workload.create_topics(kafka.bootstrap, topics.prefix)
    await workload.write_hints(kafka.bootstrap, topics.of(events.STATUS_CHANGED), ids, seed=0)
    service = _service(field, "prepare.", workload.TEMPLATE, "prepare", until_caught_up=True)
    service.start()
    try:
        code = await service.ended()
    finally:
        service.stop()
    if code != 0:
        raise Failed(f"the service could not serve the template (exit code {code}):\n{service.last_lines()}")
    news = await workload.read_news(kafka.bootstrap, topics.of(events.STATS_UPDATED))
    if problems := await workload.prove(url, field.before, news, ids):
        raise Failed(f"the template is not right: {'; '.join(problems)}")
    async with workload.connected(url) as db:
        await workload.settle(db)
    await workload.delete_topics(kafka.bootstrap, topics.prefix)
    return Field(postgres, kafka, directory, ids, await workload.read_truth(url))


async def duel(field: Field, plan: Plan, number: int) -> tuple[Run, Run]:
    """One round: the service and the peer on the same hints and equal databases; who begins changes with the round."""
    prefix = f"round{number}."
    topics = Topics(prefix)
    draws = workload.zipf(field.ids, plan.hints, seed=number)
    await workload.create_topics(field.kafka.bootstrap, prefix)
    await workload.write_hints(field.kafka.bootstrap, topics.of(events.STATUS_CHANGED), draws, seed=number)
    if number % 2:
        ours = await _ours(field, plan, number, prefix, set(draws))
        peer = await _peer(field, number, prefix)
    else:
        peer = await _peer(field, number, prefix)
        ours = await _ours(field, plan, number, prefix, set(draws))
    await workload.delete_topics(field.kafka.bootstrap, prefix)
    return ours, peer


async def _ours(field: Field, plan: Plan, number: int, prefix: str, hinted: set[UUID]) -> Run:
    topics = Topics(prefix)
    async with _database(field, f"ours{number}", seed=number) as database, _admin(field) as admin:
        group = Group(admin, f"ours{number}", topics.of(events.STATUS_CHANGED))
        service = _service(field, prefix, database, f"ours{number}", until_caught_up=True)
        begun = time.monotonic()
        service.start()
        try:
            joined = await group.joined(service)
            cpu_s, busy_s = service.cpu_s(), others_s()
            finished = await _drained(field, database, group, service, plan.hints)
            cpu_s, busy_s = service.cpu_s() - cpu_s, others_s() - busy_s
            code = await service.ended()
        finally:
            service.stop()
        news = await workload.read_news(field.kafka.bootstrap, topics.of(events.STATS_UPDATED))
        problems = await workload.prove(field.postgres.url(database), field.before, news, hinted)
    if code != 0:
        problems.append(f"the service ended with {code}: {service.last_lines(3)}")
    return Run(
        SERVICE,
        number,
        events=plan.hints,
        seconds=finished - joined,
        start_s=joined - begun,
        cpu_s=cpu_s,
        peak_mb=service.peak_mb,
        published=news.events,
        others=busy_s / (finished - joined),
        problems=problems,
    )


async def _peer(field: Field, number: int, prefix: str) -> Run:
    topic = Topics(prefix).of(events.STATUS_CHANGED)
    output = f"{prefix}peer.stats-updated"
    async with _database(field, f"peer{number}", seed=number) as database, _admin(field) as admin:
        url = field.postgres.url(database)
        await workload.create_topic(field.kafka.bootstrap, output)
        async with workload.connected(url) as db:
            started_at = await db.fetchval("SELECT clock_timestamp()")
        environment = {
            "DATABASE_URL": url,
            "KAFKA_BOOTSTRAP_SERVERS": field.kafka.bootstrap,
            "INPUT_TOPIC": topic,
            "OUTPUT_TOPIC": output,
            "GROUP_ID": f"peer{number}",
        }
        group = Group(admin, f"peer{number}", topic)
        peer = Contestant(f"peer{number}", field.directory / f"peer{number}", [str(PEER)], environment)
        begun = time.monotonic()
        peer.start()
        try:
            joined = await group.joined(peer)
            cpu_s, busy_s = peer.cpu_s(), others_s()
            done = 0
            while done < PEER_EVENTS and time.monotonic() < joined + PEER_SECONDS:
                await asyncio.sleep(LOOK_S)
                done = await group.committed()
                peer.resident_mb()
            finished = time.monotonic()
            cpu_s, busy_s = peer.cpu_s() - cpu_s, others_s() - busy_s
        finally:
            peer.stop()
        news = await workload.read_news(field.kafka.bootstrap, output)
        truth = await workload.read_truth(url)
        async with workload.connected(url) as db:
            touched = await db.fetch("SELECT id FROM campaigns WHERE last_synced_at >= $1", started_at)
    problems = []
    if done == 0:
        problems.append(f"the peer did nothing: {peer.last_lines(3)}")
    if news.events < done:
        problems.append(f"the peer committed {done} events and published {news.events}")
    if drifted := {row["id"] for row in touched} & set(truth.drifted()):
        problems.append(f"the peer wrote wrong stats to {len(drifted)} campaigns")
    return Run(
        PER_EVENT,
        number,
        events=done,
        seconds=finished - joined,
        start_s=joined - begun,
        cpu_s=cpu_s,
        peak_mb=peer.peak_mb,
        published=news.events,
        others=busy_s / (finished - joined),
        problems=problems,
    )


async def memory(field: Field, plan: Plan) -> Memory:
    """Two backlogs of the same size, one after the other, in one process that never stops in between.

    The second is written while the process is frozen (SIGSTOP), so that it too finds a backlog and not a trickle.
    """
    prefix = "memory."
    topics = Topics(prefix)
    topic = topics.of(events.STATUS_CHANGED)
    problems: list[str] = []
    first, second = (workload.zipf(field.ids, plan.hints, seed) for seed in (101, 102))
    await workload.create_topics(field.kafka.bootstrap, prefix)
    await workload.write_hints(field.kafka.bootstrap, topic, first, seed=101)
    async with _database(field, "memory", seed=101) as database, _admin(field) as admin:
        group = Group(admin, "memory", topic)
        port = free_port()
        service = _service(field, prefix, database, "memory", until_caught_up=False, port=port)
        service.start()
        try:
            await group.joined(service)
            await _drained(field, database, group, service, plan.hints)
            first_rest = await _rest(service)
            first_peak = service.peak_mb
            await workload.change(field.postgres.url(database), seed=102)
            os.kill(service.pid, signal.SIGSTOP)
            try:
                writing = asyncio.create_task(workload.write_hints(field.kafka.bootstrap, topic, second, seed=102))
                await asyncio.wait([writing], timeout=FROZEN_AT_MOST_S)
            finally:
                os.kill(service.pid, signal.SIGCONT)
            await writing
            service.peak_mb = 0.0
            await _drained(field, database, group, service, 2 * plan.hints)
            second_rest = await _rest(service)
            problems.extend(await _disagreements(port, 2 * plan.hints))
            os.kill(service.pid, signal.SIGTERM)
            if (code := await service.ended()) != 0:
                problems.append(f"the service ended with {code}: {service.last_lines(3)}")
        finally:
            service.stop()
        news = await workload.read_news(field.kafka.bootstrap, topics.of(events.STATS_UPDATED))
        hinted = {*first, *second}
        problems.extend(await workload.prove(field.postgres.url(database), field.before, news, hinted))
    await workload.delete_topics(field.kafka.bootstrap, prefix)
    return Memory(first_peak, first_rest, service.peak_mb, second_rest, problems)


def others_s() -> float:
    """CPU seconds since boot that were spent neither by this benchmark nor by anything it started."""
    machine = psutil.cpu_times()
    idle = sum(getattr(machine, name, 0.0) for name in ("idle", "iowait", "guest", "guest_nice"))
    ours = 0.0
    me = psutil.Process()
    for process in (me, *me.children(recursive=True)):
        with contextlib.suppress(psutil.Error):  # ended between two lines: its parent counts it from now on
            times = process.cpu_times()
            ours += times.user + times.system + times.children_user + times.children_system
    return float(sum(machine) - idle - ours)


def ratios(runs: Sequence[Run]) -> list[float]:
    """Service over peer, one per round in which both runs count."""
    rates: dict[int, dict[str, float]] = {}
    for run in counting(runs):
        rates.setdefault(run.round, {})[run.contestant] = run.rate
    return [pair[SERVICE] / pair[PER_EVENT] for pair in rates.values() if len(pair) == 2]


def counting(runs: Sequence[Run]) -> list[Run]:
    """Valid runs of rounds that no other program disturbed."""
    disturbed = {run.round for run in runs if run.others > OTHERS_AT_MOST}
    return [run for run in runs if not run.problems and run.round not in disturbed]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, lowest and highest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


async def _drained(field: Field, database: str, group: Group, service: Contestant, events_due: int) -> float:
    """Wait until so many events are committed and everything is published; when that was."""
    deadline = time.monotonic() + DRAIN_DEADLINE_S
    async with workload.connected(field.postgres.url(database)) as db:
        while time.monotonic() < deadline:
            service.resident_mb()
            if await group.committed() >= events_due and await workload.waiting(db) == 0:
                return time.monotonic()
            if service.process is None or service.process.poll() is not None:
                break
            await asyncio.sleep(LOOK_S)
    raise Failed(f"{service.name}: {await group.committed()} of {events_due} events committed:\n{service.last_lines()}")


async def _rest(service: Contestant) -> float:
    """Resident memory a few seconds after the last work."""
    await asyncio.sleep(REST_S)
    return service.resident_mb()


async def _disagreements(port: int, records: int) -> list[str]:
    """Where the service's own metrics tell another story than the broker."""
    page = await asyncio.to_thread(_scrape, f"http://127.0.0.1:{port}/metrics")
    seen: dict[str, float] = {}
    for line in page.splitlines():
        if not line.startswith("#"):
            name, _, value = line.rpartition(" ")
            seen[name] = float(value)
    lag = sum(value for name, value in seen.items() if name.startswith("campaign_stats_lag_records"))
    read = seen['campaign_stats_records_total{kind="status_hint"}']
    return ([f"/metrics says lag {lag:g}"] if lag else []) + (
        [f"/metrics says {read:g} hints"] if read != records else []
    )


def _scrape(url: str) -> str:
    with urllib.request.urlopen(url, timeout=5) as answer:
        text: str = answer.read().decode()
        return text


def _service(
    field: Field, prefix: str, database: str, group: str, *, until_caught_up: bool, port: int = 0
) -> Contestant:
    command = ["-m", "consumer", "run", *(["--until-caught-up"] if until_caught_up else [])]
    return Contestant(group, field.directory / group, command, field.environment(prefix, database, group, port))


@asynccontextmanager
async def _database(field: Field, name: str, seed: int) -> AsyncIterator[str]:
    await workload.copy_template(field.postgres.url(), name)
    try:
        await workload.change(field.postgres.url(name), seed)
        yield name
    finally:
        await workload.drop(field.postgres.url(), name)


@asynccontextmanager
async def _admin(field: Field) -> AsyncIterator[Any]:
    admin = AIOKafkaAdminClient(bootstrap_servers=field.kafka.bootstrap)
    await admin.start()
    try:
        yield admin
    finally:
        await admin.close()
