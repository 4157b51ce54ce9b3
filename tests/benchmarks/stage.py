"""Where measurements take place: servers, databases for runs, processes watched from outside."""

import asyncio
import contextlib
import os
import statistics
import sys
import time
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Protocol
from uuid import UUID

import psutil  # type: ignore[import-untyped]  # has no types
from aiokafka.admin import AIOKafkaAdminClient

from consumer.demo.servers import Postgres, Server, free_port
from schemas import events
from schemas.topics import Topics
from tests.benchmarks import workload
from tests.benchmarks.report import ENOUGH, Report
from tests.benchmarks.workload import PARTITIONS, Truth
from tests.servers import REPOSITORY

OTHERS_AT_MOST: Final = 0.25  # cores; beyond it a peer, which waits more often, loses more than the service does
TRIES: Final = 3  # of a run that other programs disturb
JOIN_DEADLINE_S: Final = 60.0
DRAIN_DEADLINE_S: Final = 300.0
END_DEADLINE_S: Final = 20.0
LOOK_S: Final = 0.05
HINTS_READ: Final = 'campaign_stats_records_total{kind="status_hint"}'
PEERS: Final = Path(__file__).parent / "peers"
PEERS_PYTHON: Final = REPOSITORY / ".cache" / "peers" / "bin" / "python"

Say = Callable[[str], None]


class Failed(Exception):
    """A run that came to nothing; the message says why."""


@dataclass(frozen=True, slots=True)
class Size:
    """How much of everything."""

    campaigns: int
    hints: int
    rounds: int
    is_quick: bool = False


@dataclass(frozen=True, slots=True)
class Run:
    """One run of one contestant: `events` in `seconds`; memory and CPU of its processes alone.

    `others`: cores that programs besides this benchmark and its servers kept busy meanwhile.
    """

    contestant: str
    round: int
    events: int
    seconds: float
    cpu_s: float
    peak_mb: float
    others: float
    problems: Sequence[str]
    start_s: float = 0.0
    published: int = 0
    recounts: int = 0
    recount_s: float = 0.0
    postgres_s: float = 0.0
    kafka_s: float = 0.0

    @property
    def rate(self) -> float:
        """Events per second."""
        return self.events / self.seconds

    @property
    def counts(self) -> bool:
        """Whether its figures may be used."""
        return not self.problems and self.others <= OTHERS_AT_MOST

    def line(self) -> str:
        """For the screen, once it is over."""
        verdict = f"INVALID: {'; '.join(self.problems)}" if self.problems else "valid"
        if self.others > OTHERS_AT_MOST:
            verdict += ", disturbed: does not count"
        return (
            f"  round {self.round}  {self.contestant:34}  {self.events:>9,} in {self.seconds:6.2f} s"
            f" = {self.rate:>9,.0f}/s  others {self.others:4.2f} cores  {verdict}"
        )


def rates(runs: Sequence[Run], contestant: str) -> dict[int, float]:
    """Round -> events per second of one contestant, where its run counts."""
    return {run.round: run.rate for run in runs if run.counts and run.contestant == contestant}


def reported(measure: str, runs: Sequence[Run], rounds: int = ENOUGH) -> Report:
    """A report that tells of these runs and has no figures yet."""
    problems = [f"{run.contestant} in round {run.round}: {why}" for run in runs for why in run.problems]
    told: list[Mapping[str, Any]] = [{**asdict(run), "rate": run.rate, "counts": run.counts} for run in runs]
    return Report(measure, [], problems, told, rounds)


@dataclass(frozen=True, slots=True)
class Round:
    """What all contestants of one round have in common: hints on a topic, and a database to be copied for each."""

    number: int
    topics: Topics
    draws: Sequence[UUID]
    database: str


class Brokers(Protocol):
    """One node or several."""

    @property
    def bootstrap(self) -> str: ...
    @property
    def pids(self) -> Sequence[int]: ...


@dataclass(slots=True)
class Stage:
    """The servers, the campaigns, and the truth about the template database once there is one."""

    postgres: Postgres
    kafka: Brokers
    directory: Path
    size: Size
    say: Say
    prospects: tuple[int, int] = workload.PROSPECTS
    template_name: str = workload.TEMPLATE
    replication: int = 1
    ids: Sequence[UUID] = ()
    before: Truth | None = None

    def environment(self, prefix: str, database: str, group: str, port: int = 0, **settings: str) -> dict[str, str]:
        """Settings of the service for one run."""
        return {
            "DATABASE_URL": self.postgres.url(database),
            "KAFKA_BOOTSTRAP_SERVERS": self.kafka.bootstrap,
            "CAMPAIGN_STATS_TOPIC_PREFIX": prefix,
            "CAMPAIGN_STATS_GROUP_ID": group,
            "CAMPAIGN_STATS_HTTP_PORT": str(port),
            "CAMPAIGN_STATS_SWEEP_INTERVAL_S": "0",
            "CAMPAIGN_STATS_LOG_LEVEL": "WARNING",
            **settings,
        }

    def service(
        self,
        name: str,
        prefix: str,
        database: str,
        group: str,
        *,
        command: Sequence[str] = ("-m", "consumer"),
        arguments: Sequence[str] = (),
        **settings: str,
    ) -> "Contestant":
        """A process of the service, not started yet; `command` is another one for a variant of it."""
        port = free_port()
        environment = self.environment(prefix, database, group, port, **settings)
        return Contestant(name, self.directory / name, [sys.executable, *command, "run", *arguments], environment, port)

    def servers_cpu_s(self) -> tuple[float, float]:
        """CPU seconds so far of PostgreSQL and of Kafka."""
        return tree_cpu_s([self.postgres.pid]), tree_cpu_s(self.kafka.pids)

    async def template(self) -> Truth:
        """Make the template if there is none yet: campaigns served once by the service itself; the truth about it."""
        if self.before is None:
            begun = time.monotonic()
            self.ids = workload.campaign_ids(self.size.campaigns)
            url = self.postgres.url(self.template_name)
            await workload.make_template(self.postgres.url(), self.template_name, url, self.ids, self.prospects)
            before = await workload.read_truth(url)
            await self._serve_once(url, before)
            self.before = await workload.read_truth(url)
            self.say(f"{len(self.ids):,} campaigns prepared in {time.monotonic() - begun:.0f} s")
        return self.before

    async def _serve_once(self, url: str, before: Truth) -> None:
        topics = Topics(f"{self.template_name}.")
        await workload.create_topics(self.kafka.bootstrap, topics.prefix, replication=self.replication)
        await workload.write_hints(self.kafka.bootstrap, topics.of(events.STATUS_CHANGED), self.ids, seed=0)
        service = self.service(
            "prepare", topics.prefix, self.template_name, self.template_name, arguments=["--until-caught-up"]
        )
        service.start()
        try:
            code = await service.ended(DRAIN_DEADLINE_S)
        finally:
            service.stop()
        if code != 0:
            raise Failed(f"the service could not serve the template (exit code {code}):\n{service.last_lines()}")
        news = await workload.read_news(self.kafka.bootstrap, topics.of(events.STATS_UPDATED))
        if problems := await workload.prove(url, before, news, self.ids):
            raise Failed(f"the template is not right: {'; '.join(problems)}")
        async with workload.connected(url) as db:
            await workload.settle(db)
        await workload.delete_topics(self.kafka.bootstrap, topics.prefix)

    async def forget(self) -> None:
        """Drop the template."""
        self.before = None
        await workload.drop(self.postgres.url(), self.template_name)

    @asynccontextmanager
    async def database(self, name: str, *, seed: int | None = None, of: str | None = None) -> AsyncIterator[str]:
        """A copy of the template, with prospects moved on by `seed`; dropped afterwards."""
        await self.template()
        await workload.copy_database(self.postgres.url(), name, of or self.template_name)
        try:
            if seed is not None:
                await workload.change(self.postgres.url(name), seed)
            yield name
        finally:
            await workload.drop(self.postgres.url(), name)

    @asynccontextmanager
    async def topics(self, prefix: str, partitions: int = PARTITIONS) -> AsyncIterator[Topics]:
        """All topics of one round, deleted afterwards."""
        await workload.create_topics(self.kafka.bootstrap, prefix, partitions, self.replication)
        try:
            yield Topics(prefix)
        finally:
            await workload.delete_topics(self.kafka.bootstrap, prefix)

    @asynccontextmanager
    async def round(
        self,
        number: int,
        *,
        seed: int,
        hints: int | None = None,
        of: float = 1.0,
        pad: int = 0,
        partitions: int = PARTITIONS,
    ) -> AsyncIterator[Round]:
        """A backlog of hints, already written, and a database in which about 2 % of the prospects have moved on.

        `of`: the share of the campaigns that have hints; `pad`: bytes that make each hint longer.
        """
        await self.template()
        name = f"{self.template_name}{seed}"
        hinted = self.ids[: max(1, round(len(self.ids) * of))]
        draws = workload.zipf(hinted, hints or self.size.hints, seed=seed)
        async with self.topics(f"{name}.", partitions) as topics, self.database(name, seed=seed):
            topic = topics.of(events.STATUS_CHANGED)
            await workload.write_hints(self.kafka.bootstrap, topic, draws, seed, pad=pad, partitions=partitions)
            yield Round(number, topics, draws, name)

    @asynccontextmanager
    async def admin(self) -> AsyncIterator[Any]:
        """The broker seen from outside: looking costs the contestants nothing."""
        admin = AIOKafkaAdminClient(bootstrap_servers=self.kafka.bootstrap)
        await admin.start()
        try:
            yield admin
        finally:
            await admin.close()

    async def drained(self, database: str, group: "Group", services: Sequence["Contestant"], due: int) -> float:
        """Wait until so many events are committed and everything is published; when that was."""
        deadline = time.monotonic() + DRAIN_DEADLINE_S
        async with workload.connected(self.postgres.url(database)) as db:
            while time.monotonic() < deadline:
                for service in services:
                    service.resident_mb()
                if await group.committed() >= due and await workload.waiting(db) == 0:
                    return time.monotonic()
                if any(service.has_ended for service in services):
                    break
                await asyncio.sleep(LOOK_S)
        said = "\n".join(service.last_lines() for service in services)
        raise Failed(f"{services[0].name}: {await group.committed()} of {due} events committed:\n{said}")

    async def undisturbed(self, name: str, attempt: Callable[[str], Awaitable[Run]]) -> Run:
        """Run it under a name of its own, and once more where other programs were too busy; says what came of it."""
        for tried in range(TRIES):
            run = await attempt(f"{name}-{tried}")
            self.say(run.line())
            if run.others <= OTHERS_AT_MOST:
                break
        return run


class Contestant(Server):
    """A process of its own, watched from outside."""

    def __init__(
        self, name: str, directory: Path, command: Sequence[str], env: Mapping[str, str], port: int = 0
    ) -> None:
        super().__init__(directory)
        self.name = name
        self.port = port
        self._command = command
        self._env = env
        self.peak_mb = 0.0
        self._cpu_s = 0.0

    def start(self) -> None:
        """Start it."""
        self.directory.mkdir(parents=True, exist_ok=True)
        self.spawn(self._command, env={"PYTHONPATH": str(REPOSITORY), **self._env})

    @property
    def has_ended(self) -> bool:
        """Whether it is gone."""
        return self.process is None or self.process.poll() is not None

    def resident_mb(self) -> float:
        """Resident memory now, 0 when it ended; remembered if it is the highest yet."""
        now = 0.0
        with contextlib.suppress(psutil.Error):
            now = psutil.Process(self.pid).memory_info().rss / 2**20
        self.peak_mb = max(self.peak_mb, now)
        return now

    def cpu_s(self) -> float:
        """CPU seconds so far, user and system; of one that has ended those at the last look."""
        with contextlib.suppress(psutil.Error):
            times = psutil.Process(self.pid).cpu_times()
            self._cpu_s = float(times.user + times.system)
        return self._cpu_s

    async def metrics(self) -> dict[str, float]:
        """What it says about itself: series with their labels -> value. Raises Failed when it does not answer."""
        try:
            page = await asyncio.to_thread(_get, f"http://127.0.0.1:{self.port}/metrics")
        except OSError as error:
            raise Failed(f"{self.name} does not answer ({error}):\n{self.last_lines()}") from error
        return {
            name: float(value)
            for name, _, value in (line.rpartition(" ") for line in page.splitlines() if not line.startswith("#"))
        }

    async def ended(self, deadline_s: float = END_DEADLINE_S) -> int | None:
        """Its exit code once it ends by itself; None when it does not in time."""
        deadline = time.monotonic() + deadline_s
        while self.process is not None and time.monotonic() < deadline:
            if (code := self.process.poll()) is not None:
                return code
            await asyncio.sleep(LOOK_S)
        return None


async def stopped(contestants: Sequence[Contestant]) -> list[str]:
    """Ask them to end, all at once; what is wrong with how they did, nothing where every exit code is 0."""
    for contestant in contestants:
        if contestant.process is not None:
            contestant.process.terminate()
    return [
        f"{contestant.name} ended with {code}: {contestant.last_lines(3)}"
        for contestant in contestants
        if (code := await contestant.ended()) != 0
    ]


class Group:
    """A consumer group, seen through the broker: it costs the contestant nothing to be looked at."""

    def __init__(self, admin: Any, name: str, topic: str) -> None:
        self._admin = admin
        self._name = name
        self._topic = topic

    async def joined(self, contestant: Contestant, members: int | None = None) -> float:
        """Wait until it is stable (with so many members); the moment of the last look that did not yet find it so."""
        deadline = time.monotonic() + JOIN_DEADLINE_S
        before = time.monotonic()
        while before < deadline:
            looked = time.monotonic()
            [answer] = await self._admin.describe_consumer_groups([self._name])
            _, _, state, _, _, present, *_ = answer.groups[0]
            if state == "Stable" and members in (None, len(present)):
                return before
            before = looked
            if contestant.has_ended:
                break
            contestant.resident_mb()
            await asyncio.sleep(LOOK_S / 2)
        raise Failed(f"{contestant.name} did not join within {JOIN_DEADLINE_S:g} s:\n{contestant.last_lines()}")

    async def committed(self) -> int:
        """How many events of the topic are committed (its offsets begin at 0)."""
        offsets = await self._admin.list_consumer_group_offsets(self._name)
        return sum(max(0, at.offset) for partition, at in offsets.items() if partition.topic == self._topic)


def _get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=5) as answer:
        page: str = answer.read().decode()
        return page


def tree_cpu_s(pids: Sequence[int]) -> float:
    """CPU seconds so far of these processes and their children, also of those that have ended."""
    spent = 0.0
    for pid in pids:
        found: list[psutil.Process] = []
        with contextlib.suppress(psutil.Error):
            parent = psutil.Process(pid)
            found = [parent, *parent.children(recursive=True)]
        for process in found:
            with contextlib.suppress(psutil.Error):
                times = process.cpu_times()
                spent += times.user + times.system + times.children_user + times.children_system
    return spent


def others_s() -> float:
    """CPU seconds since boot that were spent neither by this benchmark nor by anything it started."""
    machine = psutil.cpu_times()
    idle = sum(getattr(machine, name, 0.0) for name in ("idle", "iowait", "guest", "guest_nice"))
    ours = tree_cpu_s([os.getpid()])
    return float(sum(machine) - idle - ours)


def flush_s(directory: Path) -> float:
    """How long the disk takes for a small write that must last; a per-event consumer waits for that every time."""
    taken = []
    with (directory / "flush").open("wb", buffering=0) as file:
        for _ in range(200):
            file.write(bytes(8192))
            begun = time.perf_counter()
            os.fdatasync(file.fileno())
            taken.append(time.perf_counter() - begun)
    (directory / "flush").unlink()
    return statistics.median(taken)
