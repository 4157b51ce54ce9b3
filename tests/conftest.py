"""Real servers for the tests: started once, a fresh database, topics and group for each test."""

import asyncio
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar, overload
from urllib.request import urlopen
from uuid import uuid4

import asyncpg
import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition

from consumer import broker, migrations
from consumer.demo.servers import EmbeddedBroker, Postgres, machine_binaries
from schemas.topics import Topics
from tests.servers import REPOSITORY, ApacheKafka, java_available

T = TypeVar("T")

REQUIRED = os.environ.get("CAMPAIGN_STATS_REQUIRE_KAFKA") == "1"
NO_FSYNC = {"fsync": "off", "max_connections": "200", "autovacuum_naptime": "1s"}  # no test crashes the whole machine
AVAILABLE = {
    "apache_kafka": java_available(),
    "kcat": shutil.which("kcat") is not None,
    "machine_postgres": machine_binaries() is not None,
    "chromium": shutil.which("chromium") is not None,
    "prometheus": shutil.which("prometheus") is not None,
    "javac": java_available() and shutil.which("javac") is not None,
}
ORDER = ("faults", "unit", "integration", "service")
NEEDS = {
    "apache_kafka": "Java 17 or Maven",
    "kcat": "kcat",
    "machine_postgres": "a PostgreSQL of the machine's own",
    "chromium": "Chromium",
    "prometheus": "Prometheus",
    "javac": "a Java compiler",
}
not_run: list[str] = []
os.environ.setdefault("CAMPAIGN_STATS_FAULT_SEED", str(random.randrange(10**6)))  # one for all workers


class Kafka(Protocol):
    """Either broker."""

    @property
    def bootstrap(self) -> str: ...


def pytest_configure(config: pytest.Config) -> None:
    """In CI a missing server is a failure, not a fallback."""
    # A shell that starts us in the background lets us ignore SIGINT, and every process we test would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    problems = []
    if REQUIRED and not java_available():
        problems.append("Java 17 and Maven are missing (Debian: openjdk-17-jre-headless maven)")
    if REQUIRED and machine_binaries() is None:
        problems.append("the machine's own PostgreSQL is missing (Debian: postgresql)")
    if REQUIRED and shutil.which("kcat") is None:
        problems.append("kcat is missing (Debian: kcat)")
    if REQUIRED and shutil.which("chromium") is None:
        problems.append("Chromium is missing (Debian: chromium)")
    if REQUIRED and shutil.which("prometheus") is None:
        problems.append("Prometheus is missing (Debian: prometheus)")
    if REQUIRED and shutil.which("javac") is None:
        problems.append("a Java compiler is missing (Debian: openjdk-17-jdk-headless)")
    if problems:
        raise pytest.UsageError("; ".join(problems))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What takes long first, then quick tests; what this machine cannot run is left out by name and said at the end."""

    def rank(item: pytest.Item) -> int:
        parts = item.path.relative_to(REPOSITORY / "tests").parts
        return ORDER.index(parts[0]) if parts[0] in ORDER else len(ORDER)

    items.sort(key=rank)
    for item in items:
        if "grid" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.xdist_group("grid"))  # one worker, so that three brokers are enough
    absent = {marker for marker, present in AVAILABLE.items() if not present}
    left_out = [item for item in items if any(item.get_closest_marker(marker) for marker in absent)]
    if left_out:
        not_run.extend(item.nodeid for item in left_out)
        items[:] = [item for item in items if item not in left_out]
        config.hook.pytest_deselected(items=left_out)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A worker of several tells the one that writes the summary."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["not_run"] = not_run


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Every worker looked at all tests and left the same ones out."""
    not_run.extend(name for name in getattr(node, "workeroutput", {}).get("not_run", ()) if name not in not_run)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """What was not run, and how to run it."""
    write = terminalreporter.write_line
    if terminalreporter.stats.get("failed"):
        write(f"Seed of the faults: CAMPAIGN_STATS_FAULT_SEED={os.environ['CAMPAIGN_STATS_FAULT_SEED']}")
    if not java_available():
        write("")
        write("The tests ran on the embedded broker, not on Apache Kafka.")
    if not_run:
        missing = " and ".join(NEEDS[name] for name, present in AVAILABLE.items() if not present)
        write(f"NOT RUN: {len(not_run)} tests, because this machine lacks {missing}:")
        for nodeid in not_run:
            write(f"  {nodeid}")
    if machine_binaries() is None:
        write("NOT RUN: migrations on the machine's own PostgreSQL (install one, 15 or newer); PostgreSQL 18 was used.")


@pytest.fixture(scope="session")
def servers_directory() -> Iterator[Path]:
    """A private folder with a short path (Unix sockets); gone afterwards."""
    directory = Path(tempfile.mkdtemp(prefix="cs-"))
    directory.chmod(0o755)  # PostgreSQL may run as another account
    yield directory
    shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(scope="session")
def postgres(servers_directory: Path) -> Iterator[Postgres]:
    """PostgreSQL 18 from the wheel, with the template database `template_cs`."""
    yield from _postgres(Postgres(servers_directory / "pg18", options=NO_FSYNC))


@pytest.fixture(scope="session")
def machine_postgres(servers_directory: Path) -> Iterator[Postgres]:
    """The machine's own PostgreSQL (15 on Debian 12), with the template database."""
    yield from _postgres(Postgres(servers_directory / "pg", machine_binaries(), options=NO_FSYNC))


def _postgres(server: Postgres) -> Iterator[Postgres]:
    try:
        server.start()
        asyncio.run(_make_template(server))
        yield server
    finally:
        server.stop()


async def _make_template(server: Postgres) -> None:
    await _admin(server, "CREATE DATABASE template_cs")
    await migrations.migrate(server.url("template_cs"), reference_schema=True)


async def _admin(server: Postgres, statement: str) -> None:
    connection = await asyncpg.connect(server.url())
    try:
        await connection.execute(statement)
    finally:
        await connection.close()


@pytest.fixture(params=["postgres", *(["machine_postgres"] if machine_binaries() is not None else [])])
def any_postgres(request: pytest.FixtureRequest) -> Postgres:
    """Each PostgreSQL that is here, one after the other."""
    server: Postgres = request.getfixturevalue(request.param)
    return server


@pytest.fixture
async def empty_database_url(any_postgres: Postgres) -> AsyncIterator[str]:
    """A fresh database without any table."""
    name = f"t{uuid4().hex[:12]}"
    await _admin(any_postgres, f"CREATE DATABASE {name}")
    yield any_postgres.url(name)
    await _admin(any_postgres, f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
async def database_url(postgres: Postgres) -> AsyncIterator[str]:
    """A fresh, migrated database."""
    name = f"t{uuid4().hex[:12]}"
    await _admin(postgres, f"CREATE DATABASE {name} TEMPLATE template_cs")
    yield postgres.url(name)
    await _admin(postgres, f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
async def db(database_url: str) -> AsyncIterator[asyncpg.Connection]:
    """A connection to the fresh database; jsonb comes as Python values."""
    connection = await asyncpg.connect(database_url)
    await connection.set_type_codec("jsonb", schema="pg_catalog", encoder=json.dumps, decoder=json.loads)
    yield connection
    await connection.close()


@pytest.fixture(scope="session")
def kafka(servers_directory: Path) -> Iterator[Kafka]:
    """Apache Kafka, or the embedded broker where there is no Java or no Maven."""
    server = (
        ApacheKafka(servers_directory / "kafka") if java_available() else EmbeddedBroker(servers_directory / "broker")
    )
    try:
        server.start()
        yield server
    finally:
        server.stop()


@pytest.fixture
async def topics(kafka: Kafka) -> Topics:
    """Fresh topics with three partitions, under a prefix of their own."""
    names = Topics(f"t{uuid4().hex[:8]}.")
    await broker.create_topics(
        broker.Connection(kafka.bootstrap, {}), {name: {} for name in names.all}, partitions=3, replication=1
    )
    return names


@dataclass
class Bus:
    """An independent client of the broker: aiokafka directly, none of our code."""

    bootstrap: str
    topics: Topics
    _producer: AIOKafkaProducer = None

    async def publish(
        self,
        topic: str,
        value: bytes | dict[str, Any] | None,
        *,
        key: str | None = None,
        headers: Sequence[tuple[str, bytes | None]] = (),
        partition: int | None = None,
    ) -> Any:
        """Publish one record and wait for its acknowledgement; returns its coordinates."""
        if self._producer is None:
            self._producer = AIOKafkaProducer(bootstrap_servers=self.bootstrap, acks="all", max_request_size=2**24)
            await self._producer.start()
        content = json.dumps(value).encode() if isinstance(value, dict) else value
        return await self._producer.send_and_wait(
            topic, content, key=key and key.encode(), headers=list(headers), partition=partition
        )

    async def read(self, topic: str) -> list[Any]:
        """Every record of the topic from its beginning to its present end, in offset order within partitions."""
        consumer = AIOKafkaConsumer(
            bootstrap_servers=self.bootstrap,
            enable_auto_commit=False,
            auto_offset_reset="earliest",
            fetch_max_wait_ms=20,
        )
        await consumer.start()
        try:
            metadata = await consumer._client.fetch_all_metadata()
            partitions = [TopicPartition(topic, number) for number in metadata.partitions_for_topic(topic) or ()]
            consumer.assign(partitions)
            ends = await consumer.end_offsets(partitions)
            records: list[Any] = []
            while any([await consumer.position(partition) < ends[partition] for partition in partitions]):
                for some in (await consumer.getmany(timeout_ms=100)).values():
                    records.extend(some)
            return records
        finally:
            await consumer.stop()

    async def events(self, topic: str) -> list[dict[str, Any]]:
        """Every event of the topic, as JSON."""
        return [json.loads(record.value) for record in await self.read(topic)]

    async def close(self) -> None:
        """Stop the producer."""
        if self._producer is not None:
            await self._producer.stop()


@pytest.fixture
async def bus(kafka: Kafka, topics: Topics) -> AsyncIterator[Bus]:
    """An independent client of the broker."""
    client = Bus(kafka.bootstrap, topics)
    yield client
    await client.close()


@dataclass
class RunningService:
    """The service as a process, seen through its doors."""

    process: asyncio.subprocess.Process
    logs: list[dict[str, Any]] = field(default_factory=list)
    raw: list[str] = field(default_factory=list)
    port: int = 0
    api_port: int = 0
    expected_exit: int | None = 0
    reader: asyncio.Task[None] | None = None

    @property
    def url(self) -> str:
        """Of the operators' port."""
        return f"http://127.0.0.1:{self.port}"

    def messages(self, event: str) -> list[dict[str, Any]]:
        """Log lines with this message."""
        return [line for line in self.logs if line.get("event") == event]

    def terminate(self) -> None:
        """SIGTERM."""
        self.process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL."""
        self.expected_exit = None
        self.process.kill()

    async def wait(self, timeout_s: float = 20) -> int:
        """Its exit code."""
        async with asyncio.timeout(timeout_s):
            code = await self.process.wait()
            if self.reader is not None:
                await self.reader
            return code

    async def ready(self, timeout_s: float = 20) -> None:
        """Wait until it says so."""

        async def is_ready() -> bool:
            return self.port > 0 and (await self.get("/readyz"))[0] == 200

        await eventually(is_ready, "the service is ready", self, timeout_s=timeout_s)

    async def get(self, path: str) -> tuple[int, str]:
        """Status and body of a GET on the operators' port."""

        def fetch() -> tuple[int, str]:
            from urllib.error import HTTPError

            try:
                with urlopen(self.url + path, timeout=5) as response:
                    return response.status, response.read().decode()
            except HTTPError as error:
                with error:
                    return error.code, error.read().decode()

        return await asyncio.to_thread(fetch)

    async def metrics(self) -> dict[str, float]:
        """Every sample: `name{labels}` as exposed -> value."""
        _, text = await self.get("/metrics")
        samples = (line.rsplit(" ", 1) for line in text.splitlines() if line and not line.startswith("#"))
        return {name: float(value) for name, value in samples}


StartService = Callable[..., Awaitable[RunningService]]


@pytest.fixture
def environment(kafka: Kafka, topics: Topics, database_url: str) -> dict[str, str]:
    """What the service and the commands need to find this test's servers."""
    settings = {
        "DATABASE_URL": database_url,
        "KAFKA_BOOTSTRAP_SERVERS": kafka.bootstrap,
        "CAMPAIGN_STATS_TOPIC_PREFIX": topics.prefix,
        "CAMPAIGN_STATS_HTTP_PORT": "0",
        "CAMPAIGN_STATS_SWEEP_INTERVAL_S": "0",
        "CAMPAIGN_STATS_DRIFT_GRACE_S": "0.2",
        "CAMPAIGN_STATS_FETCH_MAX_WAIT_MS": "20",
    }
    if isinstance(kafka, EmbeddedBroker):
        settings["CAMPAIGN_STATS_PRODUCER_IDEMPOTENCE"] = "false"
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("CAMPAIGN_STATS_")}
    return {**inherited, **settings}


@pytest.fixture
async def service(environment: dict[str, str]) -> AsyncIterator[StartService]:
    """Starts the service as a process; settings by keyword in lower case without prefix. Ended by SIGTERM, exit 0."""
    running: list[RunningService] = []

    async def start(
        *arguments: str, ready: bool = True, module: str = "consumer", **settings: object
    ) -> RunningService:
        names = {f"CAMPAIGN_STATS_{name.upper()}": str(value) for name, value in settings.items()}
        one = await start_service({**environment, **names}, *arguments, module=module)
        running.append(one)
        if ready:
            await one.ready()
        return one

    yield start
    await end_services(running)


async def start_service(
    environment: dict[str, str], *arguments: str, module: str = "consumer", directory: Path = REPOSITORY
) -> RunningService:
    """The service as a process, not waited for. `module` stands in for it in tests that rig it.

    `directory`: where it is, if another version is meant.
    """
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", module, "run", *arguments,
        env=environment, cwd=directory, limit=2**24,
        stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    one = RunningService(process)
    one.reader = asyncio.create_task(_read_logs(one))
    return one


async def end_services(running: Sequence[RunningService]) -> None:
    """SIGTERM to those that still run; AssertionError for any that did not end as it should."""
    problems = []
    for one in running:
        if one.process.returncode is None:
            one.terminate()
    for one in running:
        try:
            code = await one.wait()
        except TimeoutError:
            one.process.kill()
            code = await one.wait()
            problems.append("had to be killed")
        if one.expected_exit is not None and code != one.expected_exit:
            problems.append(f"exit code {code}, last lines: {one.raw[-10:]}")
    assert not problems, problems


async def _read_logs(one: RunningService) -> None:
    assert one.process.stdout is not None
    async for raw in one.process.stdout:
        text = raw.decode().rstrip()
        one.raw.append(text)
        with suppress(json.JSONDecodeError):
            line = json.loads(text)
            one.logs.append(line)
            if line.get("event") == "listening" and line.get("door") == "operators":
                one.port = line["port"]
            if line.get("event") == "listening" and line.get("door") == "api":
                one.api_port = line["port"]


@overload
async def eventually(
    check: Callable[[], Coroutine[Any, Any, T]], what: str = ..., service: Any = ..., *, timeout_s: float = ...
) -> T: ...
@overload
async def eventually(check: Callable[[], T], what: str = ..., service: Any = ..., *, timeout_s: float = ...) -> T: ...
async def eventually(
    check: Callable[[], Any],
    what: str = "the condition holds",
    service: RunningService | None = None,
    *,
    timeout_s: float = 20,
) -> Any:
    """Poll `check` until it returns something true; AssertionError with what was waited for after the deadline."""
    deadline = time.monotonic() + timeout_s
    last: object = None
    while time.monotonic() < deadline:
        try:
            found = check()
            result = await found if isinstance(found, Awaitable) else found
            if result:
                return result
            last = result
        except (AssertionError, OSError, LookupError) as error:
            last = error
        if service is not None and service.process.returncode is not None:
            raise AssertionError(f"{what}: the service ended; last lines: {service.raw[-15:]}")
        await asyncio.sleep(0.05)
    raise AssertionError(f"not within {timeout_s} s: {what}; last: {last!r}")


async def command(
    environment: dict[str, str],
    *arguments: str,
    timeout_s: float = 30,
    module: str = "consumer",
    directory: Path = REPOSITORY,
) -> tuple[int, str, str]:
    """Run a `campaign-stats` command as a process: exit code, stdout, stderr. The rest as in `start_service`."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", module, *arguments, env=environment, cwd=directory,
        stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        async with asyncio.timeout(timeout_s):
            out, err = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()
