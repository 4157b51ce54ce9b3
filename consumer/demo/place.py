"""Where the demo happens: a private folder, a PostgreSQL and a Kafka, embedded or given; nothing of it is left."""

import asyncio
import contextlib
import os
import secrets
import shutil
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

import asyncpg

from consumer.broker import Connection, Publisher, create_topics, delete_topics
from consumer.demo.servers import EmbeddedBroker, Postgres, Server
from consumer.errors import ConfigError, ServiceError
from schemas.topics import Topics

T = TypeVar("T")

PARTITIONS: Final = 6
LONGEST_FOLDER: Final = 60  # the path of a Unix socket has 107 bytes at most
THROWN_AWAY: Final = {"fsync": "off", "full_page_writes": "off"}  # the embedded cluster lives for a minute


class DemoFailed(Exception):
    """The demo cannot go on; the message is for the person who started it."""


@dataclass(frozen=True, slots=True)
class Place:
    """Servers with a database and topics of our own. `embedded_kafka`: no idempotent producers, held fetches."""

    folder: Path
    database_url: str
    bootstrap: str
    topics: Topics
    embedded_kafka: bool

    @property
    def kafka(self) -> Connection:
        """For our own clients."""
        return Connection(self.bootstrap, {}, client_id="campaign-stats-demo")


async def finish(work: Awaitable[T], hurry: Callable[[], None] = lambda: None) -> T:
    """Await `work` to its end even when we are cancelled meanwhile, so that the clean-up knows all that it made.

    `hurry` is then called again and again: it may make the work fail sooner.
    """
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        while not task.done():
            hurry()
            await asyncio.wait([task], timeout=0.05)
        if not task.cancelled():
            task.exception()
        raise


async def start(server: Server, begin: Callable[[], None], stack: AsyncExitStack) -> None:
    """Start a child; it is ended with the stack, also when starting it fails or is interrupted."""
    stack.callback(server.stop)
    await finish(asyncio.to_thread(begin), server.stop)


def private_folder(stack: AsyncExitStack) -> Path:
    """A new folder with a short path, removed with the stack."""
    parent = tempfile.gettempdir()
    if len(parent) > LONGEST_FOLDER and os.access("/tmp", os.W_OK):  # noqa: S108  # mkdtemp makes it private
        parent = "/tmp"  # noqa: S108
    folder = Path(tempfile.mkdtemp(prefix="csdemo-", dir=parent))
    stack.callback(_remove, folder)
    if os.geteuid() == 0:
        folder.chmod(0o755)  # PostgreSQL runs as another account
    return folder


async def settle_in(
    stack: AsyncExitStack, folder: Path, kafka: str | None, database_url: str | None, say: Callable[[str], None]
) -> Place:
    """Start or reach the servers, make a database and topics; all of it goes with the stack.

    Raises DemoFailed, ServerFailed, or the service's own errors for servers that cannot be used.
    """
    name = f"campaign_stats_demo_{secrets.token_hex(4)}"
    if database_url is None:
        say("starting PostgreSQL 18 on a private socket")
        postgres = Postgres(folder / "pg", options=THROWN_AWAY)
        await start(postgres, postgres.start, stack)
        server_url = postgres.url()
    else:
        server_url = database_url
    own_url = with_database(server_url, name)
    if database_url is not None:
        await _execute(server_url, "SELECT 1")  # what cannot be reached needs no clean-up
        stack.push_async_callback(_drop_database, server_url, name)
    await finish(_execute(server_url, f'CREATE DATABASE "{name}"'))

    topics = Topics(f"demo-{secrets.token_hex(4)}.")
    if kafka is None:
        say("starting the embedded Kafka broker on loopback")
        broker = EmbeddedBroker(folder / "kafka")
        await start(broker, broker.start, stack)
        bootstrap = broker.bootstrap
    else:
        bootstrap = kafka
    place = Place(folder, own_url, bootstrap, topics, kafka is None)
    if kafka is None:
        await _make_topics(place)
    else:
        await _check_kafka(place)
        stack.push_async_callback(_delete_topics, place)
        await finish(_make_topics(place))
    return place


def with_database(url: str, name: str) -> str:
    """The same server, another database."""
    parts = urlsplit(url)
    query = [(key, value) for key, value in parse_qsl(parts.query) if key not in ("dbname", "database")]
    return urlunsplit(parts._replace(path=f"/{name}", query=urlencode(query)))


async def _execute(url: str, statement: str) -> None:
    try:
        connection = await asyncpg.connect(url, timeout=10)
    except (OSError, TimeoutError, ValueError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
        raise DemoFailed(f"the database cannot be reached ({type(error).__name__}): check --database") from error
    try:
        await connection.execute(statement)
    except asyncpg.InsufficientPrivilegeError as error:
        raise DemoFailed("the role of --database may not create a database: give it CREATEDB") from error
    finally:
        await connection.close(timeout=5)


async def _drop_database(url: str, name: str) -> None:
    try:
        await _execute(url, f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)')
    except (DemoFailed, OSError, TimeoutError, asyncpg.PostgresError) as error:
        print(f"the database {name} could not be dropped ({type(error).__name__}): drop it by hand", file=sys.stderr)


async def _check_kafka(place: Place) -> None:
    publisher = Publisher(place.kafka, idempotence=True)
    try:
        await publisher.check([])
    except ServiceError as error:
        raise DemoFailed(f"Kafka cannot be reached ({error}): check --kafka") from error
    finally:
        await publisher.close(5.0)


async def _make_topics(place: Place) -> None:
    wanted: dict[str, dict[str, str]] = {name: {} for name in place.topics.all}
    for replication in (1,) if place.embedded_kafka else (3, 1):
        try:
            await create_topics(place.kafka, wanted, partitions=PARTITIONS, replication=replication)
        except ConfigError:
            if replication == 1:
                raise
        else:
            return


async def _delete_topics(place: Place) -> None:
    try:
        await delete_topics(place.kafka, place.topics.all)
    except ServiceError as error:
        print(f"topics {place.topics.prefix}* could not be deleted ({error}): delete them by hand", file=sys.stderr)


def _remove(folder: Path) -> None:
    # A program that was killed while it wrote may add a last file: try again for a moment.
    give_up = time.monotonic() + 5
    while folder.exists():
        with contextlib.suppress(OSError):
            shutil.rmtree(folder)
        if time.monotonic() > give_up:
            print(f"{folder} could not be removed: remove it by hand", file=sys.stderr)
            return
        if folder.exists():
            time.sleep(0.1)
