"""One scenario: servers, a database and topics of its own, an upstream, replicas of the service, a checker."""

import asyncio
import json
import os
import signal
import time
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final
from uuid import UUID, uuid4

import asyncpg
from aiokafka.admin import AIOKafkaAdminClient, NewTopic

from consumer import broker
from consumer.demo.servers import Postgres, free_port
from schemas.topics import Topics
from tests.conftest import RunningService, command, end_services, eventually, start_service
from tests.faults import checker
from tests.faults.checker import Findings
from tests.faults.proxy import Proxy
from tests.faults.rigged import COMMAND_POINTS
from tests.faults.upstream import Upstream
from tests.servers import REPOSITORY, ApacheCluster
from tests.world import hint

SEED: Final = int(os.environ["CAMPAIGN_STATS_FAULT_SEED"])  # tests/conftest.py sets it if nobody did
SLACK: Final = 1.0 if os.environ.get("CAMPAIGN_STATS_FAULTS") == "all" else 4.0
"""For promised times: `make faults` has the machine to itself and holds them, `make test` shares it between workers."""
PARTITIONS: Final = 3
GROUP_PATIENCE_MS: Final = 6_000  # the least that a broker takes; what is real about 15 s has tests of its own
SETTLE_S: Final = 60.0


class Grid:
    """Three brokers, each behind a proxy that the service must go through."""

    def __init__(
        self, directory: Path, properties: Mapping[str, str] | None = None, controllers: Collection[int] = (1, 2, 3)
    ) -> None:
        doors = {number: free_port() for number in (1, 2, 3)}
        self.cluster = ApacheCluster(directory, doors, properties, controllers)
        self.proxies = {number: Proxy(port, self.cluster.behind[number]) for number, port in doors.items()}

    @property
    def bootstrap(self) -> str:
        """Through the proxies."""
        return ",".join(f"127.0.0.1:{proxy.port}" for proxy in self.proxies.values())

    def start(self) -> None:
        """Start everything. Raises ServerFailed."""
        self.cluster.start()
        for proxy in self.proxies.values():
            proxy.start()

    def stop(self) -> None:
        """End everything."""
        for proxy in self.proxies.values():
            proxy.stop()
        self.cluster.stop()


@dataclass
class Stage:
    """What a scenario needs. `url` is the database as the tests see it, past any proxy."""

    grid: Grid
    url: str
    topics: Topics
    upstream: Upstream
    environment: dict[str, str]
    replicas: list[RunningService] = field(default_factory=list)
    patience_s: float = SETTLE_S  # until all must be quiet
    quiet_at: float = 0.0  # monotonic seconds when all was found quiet for the first time in a row

    @property
    def group(self) -> str:
        """Of the service."""
        return f"{self.topics.prefix}campaign-stats"

    async def replica(
        self,
        *arguments: str,
        ready: bool = True,
        point: str = "",
        passes: int = 1,
        number: int = 9,
        breakage: str = "",
        real_patience: bool = False,
        **settings: object,
    ) -> RunningService:
        """Start one. With `point` it gets the signal `number` there, at its n-th passing."""
        rigged = {
            "FAULT_POINT": point,
            "FAULT_PASSES": str(passes),
            "FAULT_SIGNAL": str(number),
            "FAULT_BREAKAGE": breakage,
            "FAULT_SESSION_MS": "" if real_patience else str(GROUP_PATIENCE_MS),
        }
        named = {f"CAMPAIGN_STATS_{name.upper()}": str(value) for name, value in settings.items()}
        one = await start_service({**self.environment, **rigged, **named}, *arguments, module="tests.faults.rigged")
        if point and number == 9:
            one.expected_exit = None
        self.replicas.append(one)
        if ready:
            await one.ready(60)
        return one

    async def command(
        self,
        *arguments: str,
        point: str = "",
        passes: int = 1,
        breakage: str = "",
        directory: Path = REPOSITORY,
        **settings: object,
    ) -> tuple[int, str, str]:
        """Run an operator's command to its end: exit code (-9 when killed at the `point`), stdout, stderr."""
        assert point in ("", *COMMAND_POINTS) or point.startswith("migration "), point
        rigged = {"FAULT_POINT": point, "FAULT_PASSES": str(passes), "FAULT_BREAKAGE": breakage}
        named = {f"CAMPAIGN_STATS_{name.upper()}": str(value) for name, value in settings.items()}
        environment = {**self.environment, **rigged, **named}
        return await command(environment, *arguments, timeout_s=90, module="tests.faults.rigged", directory=directory)

    async def settled(self, timeout_s: float | None = None) -> None:
        """Wait until every record is committed and nothing waits in our tables, twice in a row."""
        quiet = 0

        async def is_quiet() -> bool:
            nonlocal quiet
            left = await checker.lag(self.grid.cluster.bootstrap, self.group, self.topics.read)
            db = await asyncpg.connect(self.url)
            try:
                waiting = await db.fetchval(
                    "SELECT (SELECT count(*) FROM campaign_stats.outbox WHERE set_aside_at IS NULL)"
                    " + (SELECT count(*) FROM campaign_stats.deferred)"
                )
            finally:
                await db.close()
            quiet = quiet + 1 if not left and not waiting else 0
            if quiet == 1:
                self.quiet_at = time.monotonic()
            return quiet > 1

        await eventually(is_quiet, "all is quiet", timeout_s=timeout_s or self.patience_s)

    async def check(self, *, paused: Sequence[UUID] = (), untold: Sequence[UUID] = ()) -> Findings:
        """What the checker finds now."""
        return await checker.check(
            self.url,
            self.grid.cluster.bootstrap,
            self.topics,
            self.group,
            requested=self.upstream.requested,
            garbage=self.upstream.garbage,
            paused=paused,
            bouncing=self.upstream.bouncing,
            untold=untold,
        )

    async def settled_and_checked(self, *, paused: Sequence[UUID] = (), untold: Sequence[UUID] = ()) -> Findings:
        """Wait for quiet, then check; a service that never gets there is a finding too."""
        late = None
        try:
            await self.settled()
        except AssertionError as error:
            late = str(error)
        findings = await self.check(paused=paused, untold=untold)
        findings.must(late is None, f"never quiet: {late}")
        return findings


async def backlog(one: Stage, campaigns: Sequence[UUID], hints: int) -> None:
    """So many hints, each campaign in turn, that may wait."""
    topic = one.topics.of("prospect.status_changed.v1")
    said = [(topic, str(campaign), json.dumps(hint(campaign)).encode()) for campaign in campaigns]
    for begin in range(0, hints, len(said)):
        await one.upstream.publish(said[: hints - begin])


@asynccontextmanager
async def held_by_the_product(one: Stage, campaign_id: UUID, doomed: RunningService) -> AsyncIterator[None]:
    """The campaign's row is held inside, and then until `doomed` has put its recount off, or is dead or frozen.

    Its prospects change meanwhile, and a hint tells it.
    """
    holder, watcher = await asyncpg.connect(one.url), await asyncpg.connect(one.url)
    try:
        async with holder.transaction():
            await holder.execute("SELECT FROM campaigns WHERE id = $1 FOR UPDATE", campaign_id)
            yield
            # The row is held, so this is a change of which only the prospects know.
            await holder.execute("UPDATE campaign_prospects SET status = 'sent' WHERE campaign_id = $1", campaign_id)
            topic = one.topics.of("prospect.status_changed.v1")
            await one.upstream.publish([(topic, str(campaign_id), hint(campaign_id))])
            put_off = "SELECT count(*) > 0 FROM campaign_stats.deferred WHERE campaign_id = $1"
            async with asyncio.timeout(SETTLE_S):
                while not (is_still(doomed) or await watcher.fetchval(put_off, campaign_id)):
                    await asyncio.sleep(0.05)
    finally:
        await holder.close()
        await watcher.close()


def is_still(one: RunningService) -> bool:
    """Whether the process has ended or a signal has stopped it."""
    try:
        with open(f"/proc/{one.process.pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] in "TZ"
    except (FileNotFoundError, ProcessLookupError):  # gone, also in the middle of reading
        return True


async def has_begun(one: RunningService) -> None:
    """Wait until its own code runs; before that, the interpreter is on its way up and a signal is the system's."""

    def handles_sigterm() -> bool:
        with open(f"/proc/{one.process.pid}/status") as status:
            [caught] = [int(line.split()[1], 16) for line in status if line.startswith("SigCgt")]
        return bool(caught >> (signal.SIGTERM - 1) & 1)

    await eventually(handles_sigterm, "our code has begun", one)


@asynccontextmanager
async def stage(
    grid: Grid,
    postgres: Postgres,
    *,
    partitions: int = PARTITIONS,
    door: Proxy | None = None,
    template: str = "template_cs",
    brokers: Sequence[int] = (),
) -> AsyncIterator[Stage]:
    """A fresh database (like `template`) and fresh topics. `door`: a proxy to PostgreSQL.

    `brokers`: those that hold the topics, the first one leads; each alone may acknowledge. If none is named, all three
    hold them, and two must have a record.
    """
    name = f"f{uuid4().hex[:12]}"
    admin = await asyncpg.connect(postgres.url())
    await admin.execute(f"CREATE DATABASE {name} TEMPLATE {template}")
    await admin.close()
    topics = Topics(f"{name}.")
    if brokers:
        await _create_on(grid.cluster.bootstrap, topics.all, partitions, brokers)
    else:
        await broker.create_topics(
            broker.Connection(grid.cluster.bootstrap, {}),
            {topic: {} for topic in topics.all},
            partitions=partitions,
            replication=3,
        )
    url = postgres.url(name)
    upstream = Upstream(url, grid.cluster.bootstrap, topics, SEED)
    inherited = {
        name: value for name, value in os.environ.items() if not name.startswith(("CAMPAIGN_STATS_", "FAULT_"))
    }
    one = Stage(
        grid,
        url,
        topics,
        upstream,
        {
            **inherited,
            "DATABASE_URL": url if door is None else f"postgresql://postgres@127.0.0.1:{door.port}/{name}",
            "KAFKA_BOOTSTRAP_SERVERS": grid.bootstrap,
            "CAMPAIGN_STATS_TOPIC_PREFIX": topics.prefix,
            "CAMPAIGN_STATS_HTTP_PORT": "0",
            "CAMPAIGN_STATS_SWEEP_INTERVAL_S": "0",
            "CAMPAIGN_STATS_DRIFT_GRACE_S": "0.2",
        },
    )
    try:
        yield one
        await end_services(one.replicas)
    finally:
        for replica in one.replicas:
            if replica.process.returncode is None:
                replica.process.kill()
                await replica.process.wait()
        await upstream.close()


async def _create_on(bootstrap: str, topics: Sequence[str], partitions: int, brokers: Sequence[int]) -> None:
    admin = AIOKafkaAdminClient(bootstrap_servers=bootstrap)
    await admin.start()
    try:
        everywhere = {number: list(brokers) for number in range(partitions)}
        settings = {"min.insync.replicas": "1"}
        response = await admin.create_topics([NewTopic(topic, -1, -1, everywhere, settings) for topic in topics])
        assert [error for _, error, *_ in response.topic_errors if error] == []
    finally:
        await admin.close()
