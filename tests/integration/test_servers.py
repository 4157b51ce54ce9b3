"""The servers that the demo and the tests start: they come up, answer, end, and leave neither process nor file."""

import asyncio
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import asyncpg
import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from aiokafka.admin import AIOKafkaAdminClient, NewTopic

from consumer.demo import servers
from consumer.demo.servers import (
    EmbeddedBroker,
    Postgres,
    Server,
    ServerFailed,
    free_port,
    machine_binaries,
    wheel_binaries,
)
from tests.servers import REPOSITORY, ApacheKafka

BINARIES = [wheel_binaries, *([machine_binaries] if machine_binaries() is not None else [])]
BROKERS = [EmbeddedBroker, pytest.param(ApacheKafka, marks=pytest.mark.apache_kafka)]

LOOP = "DO 'BEGIN FOR i IN 1..2000000000 LOOP END LOOP; END'"  # a backend that does not notice a dead postmaster
INTERRUPTED = """
import sys
from pathlib import Path
from typing import Any
from consumer.demo.servers import EmbeddedBroker, Postgres
server = {"postgres": Postgres, "broker": EmbeddedBroker}[sys.argv[1]](Path(sys.argv[2]))
try:
    print("begun", flush=True)
    server.start()
    print("started", flush=True)
    sys.stdin.read()
finally:
    server.stop()
"""


@pytest.fixture
def directory() -> Iterator[Path]:
    """A private folder with a short path; at the end no process works in it, and removing it removes everything."""
    folder = Path(tempfile.mkdtemp(prefix="cs-"))
    try:
        yield folder
        assert at_work_in(folder) == []
    finally:
        shutil.rmtree(folder)
    assert not folder.exists()


def at_work_in(folder: Path) -> list[str]:
    """Command lines of processes that stand in `folder`: PostgreSQL's children too, whose titles do not name it."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (process / "cwd").readlink().is_relative_to(folder):
                found.append((process / "cmdline").read_text().replace("\0", " "))
        except OSError:
            continue
    return found


@pytest.mark.parametrize("tcp", [False, True], ids=["socket", "tcp"])
@pytest.mark.parametrize("binaries", BINARIES)
async def test_postgres_starts_answers_and_ends(binaries: Callable[[], Path], tcp: bool, directory: Path) -> None:
    server = Postgres(directory, binaries(), options={"fsync": "off", "max_connections": "17"}, tcp=tcp)
    try:
        server.start()
        connection = await asyncpg.connect(server.url())
        assert await connection.fetchval("SHOW max_connections") == "17"
        assert await connection.fetchval("SHOW listen_addresses") == ("127.0.0.1" if tcp else "")
        assert at_work_in(directory)  # the control: the check at the end does see them
        await connection.close()
    finally:
        server.stop()
    server.stop()  # a second time does nothing


async def test_a_killed_postgres_leaves_no_backend_and_starts_again_with_its_data(directory: Path) -> None:
    server = Postgres(directory)
    try:
        server.start()
        observer, busy = await asyncpg.connect(server.url()), await asyncpg.connect(server.url())
        await observer.execute("CREATE TABLE kept AS SELECT 1 AS one")
        looping = asyncio.create_task(busy.execute(LOOP))
        working = "SELECT count(*) FROM pg_stat_activity WHERE state = 'active' AND query = $1"
        while not await observer.fetchval(working, LOOP):
            await asyncio.sleep(0.01)
        server.kill()
        assert at_work_in(directory) == []
        with pytest.raises((OSError, asyncpg.PostgresError)):
            await looping
        observer.terminate()
        server.start()
        connection = await asyncpg.connect(server.url())
        assert await connection.fetchval("SELECT one FROM kept") == 1
        await connection.close()
    finally:
        server.stop()


@pytest.mark.parametrize("kind", BROKERS)
async def test_a_broker_starts_carries_a_record_and_ends(
    kind: type[EmbeddedBroker] | type[ApacheKafka], directory: Path
) -> None:
    server = kind(directory)
    try:
        server.start()
        await _check_it_carries(server.bootstrap)
    finally:
        server.stop()


async def _check_it_carries(bootstrap: str) -> None:
    topic = f"t{uuid4().hex[:8]}"
    admin = AIOKafkaAdminClient(bootstrap_servers=bootstrap)
    await admin.start()
    try:
        await admin.create_topics([NewTopic(topic, 1, 1)])
    finally:
        await admin.close()
    producer = AIOKafkaProducer(bootstrap_servers=bootstrap, acks="all")
    await producer.start()
    try:
        await producer.send_and_wait(topic, b"value", key=b"key")
    finally:
        await producer.stop()
    consumer = AIOKafkaConsumer(
        topic, bootstrap_servers=bootstrap, group_id=topic, auto_offset_reset="earliest", fetch_max_wait_ms=10
    )
    await consumer.start()
    try:
        record = await consumer.getone()
    finally:
        await consumer.stop()
    assert (record.key, record.value) == (b"key", b"value")


def test_the_embedded_broker_leaves_the_home_folder_alone(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = directory / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    server = EmbeddedBroker(directory / "broker")
    try:
        server.start()
    finally:
        server.stop()
    assert list(home.iterdir()) == []


def test_postgres_that_dies_while_starting_says_why(directory: Path) -> None:
    server = Postgres(directory, options={"no_such_option": "1"})
    try:
        with pytest.raises(ServerFailed, match="no_such_option"):
            server.start()
    finally:
        server.stop()


@pytest.mark.apache_kafka
def test_kafka_that_dies_while_starting_says_why(directory: Path) -> None:
    server = ApacheKafka(directory, {"node.id": "none"})
    try:
        with pytest.raises(ServerFailed, match="Invalid value none"):
            server.start()
    finally:
        server.stop()


def test_a_folder_too_long_for_a_socket_is_refused_in_a_sentence(directory: Path) -> None:
    with pytest.raises(ServerFailed, match="shorter path"):
        Postgres(directory / ("x" * 100)).start()


@pytest.mark.parametrize("kind", BROKERS)
def test_a_port_of_somebody_else_is_refused(kind: type[EmbeddedBroker] | type[ApacheKafka], directory: Path) -> None:
    server = kind(directory)
    try:
        with socket.socket() as somebody:
            somebody.bind(("127.0.0.1", server.port))
            somebody.listen()
            with pytest.raises(ServerFailed, match="taken by another program"):
                server.start()
    finally:
        server.stop()


def test_ports_differ_and_lie_below_those_of_outgoing_connections() -> None:
    ports = [free_port() for _ in range(200)]
    assert len(set(ports)) == len(ports)
    first_outgoing = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    assert max(ports) < max(first_outgoing, servers.PORTS[1])


@pytest.mark.parametrize("kind", ["postgres", "broker"])
def test_an_interrupt_at_any_moment_of_the_start_leaves_no_process(kind: str, directory: Path) -> None:
    rounds = 6
    for moment in range(rounds):
        process = subprocess.Popen(
            [sys.executable, "-c", INTERRUPTED, kind, str(directory)],
            cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        with process:
            assert process.stdout is not None
            assert process.stdout.readline() == "begun\n"
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(random.uniform(moment, moment + 1) / rounds)
            process.send_signal(signal.SIGINT)
            assert process.wait(20) in (130, -signal.SIGINT, 1)
        assert at_work_in(directory) == [], f"interrupted in round {moment}"
    server: Server = Postgres(directory) if kind == "postgres" else EmbeddedBroker(directory)
    try:
        server.start()  # type: ignore[attr-defined]  # both have it; what the interrupts left does not disturb it
    finally:
        server.stop()


def test_an_interrupt_in_the_middle_of_making_a_process_forgets_none(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, make = Server(directory), subprocess.Popen

    def made(*arguments: Any, **named: Any) -> Any:
        process = make(*arguments, **named)
        signal.raise_signal(signal.SIGINT)  # before anybody knows of it
        return process

    monkeypatch.setattr(subprocess, "Popen", made)
    with pytest.raises(KeyboardInterrupt):
        server.spawn(["sleep", "60"])
    server.kill()
    assert at_work_in(directory) == []


def test_an_interrupted_stop_still_ends_the_server(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = EmbeddedBroker(directory)
    server.start()
    process = server.process
    assert process is not None
    wait = process.wait

    def interrupted(timeout: float | None = None) -> int:
        if timeout is not None:
            raise KeyboardInterrupt
        return wait()

    monkeypatch.setattr(process, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        server.stop()
    assert at_work_in(directory) == []


@pytest.mark.parametrize("closed", ["programs", "folder"])
def test_as_root_programs_out_of_reach_are_copied_and_a_closed_folder_is_refused(
    closed: str, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if os.geteuid() != 0:
        monkeypatch.setattr(servers, "unprivileged_account", lambda: None)  # nothing to hand over: both start
        server = Postgres(directory / "pg")
    elif closed == "folder":
        with pytest.raises(ServerFailed, match="may not enter"):  # mkdtemp made the parent for us alone
            Postgres(directory / "pg").start()
        return
    else:
        wheel = wheel_binaries().parent.parent
        closed_folder = directory / "closed"
        for part in (wheel, wheel.with_name(f"{wheel.name}.libs")):
            shutil.copytree(part, closed_folder / part.name, symlinks=True)
        closed_folder.chmod(0o700)
        directory.chmod(0o755)
        server = Postgres(directory / "pg", closed_folder / wheel.name / "pginstall18" / "bin")
    try:
        server.start()
    finally:
        server.stop()


def test_a_child_that_starts_while_its_predecessor_is_ended_is_not_forgotten(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, children = Server(directory), servers._children
    server.spawn(["sleep", "60"])
    first = server.pid

    def meanwhile(pid: int) -> list[int]:
        if pid == first:
            server.spawn(["sleep", "60"])  # as PostgreSQL after initdb, in another thread
        return children(pid)

    monkeypatch.setattr(servers, "_children", meanwhile)
    server.kill()
    assert server.pid != first
    server.kill()
    assert at_work_in(directory) == []
