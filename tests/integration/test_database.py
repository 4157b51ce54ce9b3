"""Sessions that are lost or go dead at a bad moment, and locks that must not be waited for in a circle."""

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from uuid import UUID

import asyncpg
import pytest

from consumer import migrations, turn
from consumer.database import SESSION, Connection, Database, pool, session
from consumer.demo.servers import Postgres, free_port
from consumer.errors import Unavailable
from consumer.outcome import Outcome, State
from tests.conftest import NO_FSYNC, eventually
from tests.faults.proxy import Proxy

SESSIONS = 3
SOMEBODY_WAITS_FOR_US = "SELECT EXISTS (SELECT FROM pg_locks WHERE pg_backend_pid() = ANY (pg_blocking_pids(pid)))"


@asynccontextmanager
async def opened(url: str) -> AsyncIterator[Database]:
    database = Database(url)
    await database.open()
    try:
        yield database
    finally:
        await database.close(0.2)


@pytest.fixture(scope="module")
def tcp_postgres(servers_directory: Path) -> Iterator[Postgres]:
    """A PostgreSQL behind a port, with our tables."""
    server = Postgres(servers_directory / "tcp", options=NO_FSYNC, tcp=True)
    try:
        server.start()
        asyncio.run(migrations.migrate(server.url(), reference_schema=True))
        yield server
    finally:
        server.stop()


@pytest.fixture
def proxy(tcp_postgres: Postgres) -> Iterator[Proxy]:
    """In front of it; can fall silent."""
    door = Proxy(free_port(), tcp_postgres.port)
    door.start()
    yield door
    door.stop()


async def test_work_that_is_cancelled_stays_cancelled_although_its_session_is_lost(
    database_url: str, db: asyncpg.Connection
) -> None:
    inside = asyncio.Event()

    async def work(database: Database) -> None:
        async with database.transaction() as transaction:
            await transaction.now()
            inside.set()
            await asyncio.sleep(60)

    async with opened(database_url) as database:
        task = asyncio.create_task(work(database))
        try:
            await inside.wait()
            await db.execute(
                "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE state = 'idle in transaction'"
            )
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        finally:
            task.cancel()


def state(campaign_id: UUID, version: int) -> State:
    return State(
        campaign_id, version, published=None, guard_paused_at=None, observed_trip=False, last_total=1, cooldown_s=None
    )


async def test_a_save_never_holds_what_somebody_wants_who_locks_states_in_id_order(
    database_url: str, db: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SESSION, "lock_timeout", "30s")  # the save is to wait, however slow we are
    lowest, *others = [UUID(int=number) for number in range(1, 6)]
    everything = [lowest, *others]
    await db.executemany(
        "INSERT INTO campaign_stats.campaign_state (campaign_id) VALUES ($1)", [(one,) for one in everything]
    )
    outcome = Outcome(states=[state(one, 7) for one in reversed(everything)])
    lock = "SELECT FROM campaign_stats.campaign_state WHERE campaign_id = $1 FOR UPDATE NOWAIT"

    async def save(database: Database) -> None:
        async with database.transaction() as transaction:
            await transaction.save(outcome)

    async with opened(database_url) as database, asyncio.timeout(20):
        async with db.transaction():
            await db.execute(lock, lowest)
            saving = asyncio.create_task(save(database))
            await eventually(lambda: db.fetchval(SOMEBODY_WAITS_FOR_US), "the save waits")
            for one in reversed(others):
                await db.execute(lock, one)
            assert not saving.done()
        await saving
    versions = await db.fetch("SELECT version FROM campaign_stats.campaign_state")
    assert [row["version"] for row in versions] == [7] * len(everything)


async def test_the_lock_of_a_command_outlives_the_patience_of_its_session(database_url: str) -> None:
    patience = "SELECT current_setting('idle_in_transaction_session_timeout')"
    async with opened(database_url) as database, database.connection() as connection:
        assert await connection.fetchval(patience) == "20s"
        async with turn.locked(connection, "replay of a group"):
            assert await connection.fetchval(patience) == "0"
        assert await connection.fetchval(patience) == "20s"
        with pytest.raises(RuntimeError):
            async with turn.locked(connection, "replay of a group"):
                raise RuntimeError("the brokers are gone")
        assert await connection.fetchval(patience) == "20s"


async def begin(database: Database) -> None:
    """The usual work; what it asks is quick."""
    async with database.transaction() as transaction:
        await transaction.now()


async def fill(database: Database) -> None:
    """Open several sessions: all are in use at the same moment."""
    together = asyncio.Barrier(SESSIONS)

    async def work() -> None:
        async with database.transaction() as transaction:
            await transaction.now()
            await together.wait()

    await asyncio.gather(*(work() for _ in range(SESSIONS)))


def through(proxy: Proxy) -> str:
    return f"postgresql://postgres@127.0.0.1:{proxy.port}/postgres"


@pytest.mark.parametrize("ask", [begin, Database.backlog, Database.next_due_s])
async def test_a_session_that_went_dead_is_given_up_soon_and_with_it_all_of_its_time(
    proxy: Proxy, monkeypatch: pytest.MonkeyPatch, ask: Callable[[Database], Awaitable[object]]
) -> None:
    for module in (pool, session):
        monkeypatch.setattr(module, "ANSWER_DEADLINE_S", 0.5)
    async with opened(through(proxy)) as database:
        await fill(database)
        await ask(database)
        assert proxy.taken == SESSIONS
        proxy.silence()
        proxy.heal()  # for new connections; those there are stay dead
        async with asyncio.timeout(3):
            with pytest.raises(Unavailable):
                await ask(database)
        async with asyncio.timeout(2):
            await ask(database)


async def test_a_transaction_whose_session_goes_dead_inside_is_not_rolled_back_in_vain(
    proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A statement may take as long as statement_timeout lets it; a test must not.
    monkeypatch.setattr(pool, "COMMAND_DEADLINE_S", 1.5)
    dead_since: list[float] = []

    async def work(database: Database) -> None:
        async with database.transaction() as transaction:
            await transaction.now()
            proxy.silence()
            proxy.heal()
            dead_since.append(time.monotonic())
            await transaction.now()

    async with opened(through(proxy)) as database:
        await fill(database)
        async with asyncio.timeout(20):
            with pytest.raises(Unavailable):
                await work(database)
        assert 1.4 < time.monotonic() - dead_since[0] < 2.5  # one deadline, not another one for a ROLLBACK
        async with asyncio.timeout(2):
            await begin(database)


def socket_of(connection: Connection) -> socket.socket:
    ours: socket.socket = connection._transport.get_extra_info("socket")  # type: ignore[union-attr]  # no public way
    return ours


@pytest.mark.parametrize("unknown", [None, "TCP_USER_TIMEOUT"])
async def test_the_kernel_watches_a_session_over_tcp(
    tcp_postgres: Postgres, monkeypatch: pytest.MonkeyPatch, unknown: str | None
) -> None:
    wanted = {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 2, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 11_000}
    numbers = {name: getattr(socket, name) for name in wanted if hasattr(socket, name)}
    expected = {name: 0 if name == unknown else wanted[name] for name in numbers}
    if unknown is not None:  # as on a platform that has it not
        monkeypatch.delattr(socket, unknown, raising=False)
    async with opened(tcp_postgres.url()) as database, database.connection() as connection:
        ours = socket_of(connection)
        assert ours.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        assert {name: ours.getsockopt(socket.IPPROTO_TCP, number) for name, number in numbers.items()} == expected
        assert await connection.fetchval("SELECT 1") == 1


async def test_a_session_over_a_unix_socket_works_without_being_watched(database_url: str) -> None:
    async with opened(database_url) as database, database.connection() as connection:
        ours = socket_of(connection)
        assert ours.family == socket.AF_UNIX
        assert ours.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 0
        assert await connection.fetchval("SELECT 1") == 1


async def test_only_the_relay_does_not_wait_for_the_disk(database_url: str, db: asyncpg.Connection) -> None:
    """What it deletes was acknowledged: should the server forget the deletion, the same events are sent once more."""
    ids = [
        await db.fetchval(
            "INSERT INTO campaign_stats.outbox (shard, campaign_id, type, event)"
            " VALUES (0, gen_random_uuid(), 'campaign.stats_updated.v1', '{}') RETURNING id"
        )
        for _ in range(3)
    ]
    async with opened(database_url) as database:
        async with database.transaction() as relay:
            assert await relay._connection.fetchval("SHOW synchronous_commit") == "on"
            await relay.finish_outbox(ids[:1], {ids[1]: "too large"})
            assert await relay._connection.fetchval("SHOW synchronous_commit") == "off"
            session = relay._connection.get_server_pid()
        async with database.transaction() as recount:
            assert recount._connection.get_server_pid() == session, "another session shows nothing"
            await recount.save(Outcome())
            assert await recount._connection.fetchval("SHOW synchronous_commit") == "on"
    left = await db.fetch("SELECT id, error FROM campaign_stats.outbox ORDER BY id")
    assert [tuple(row) for row in left] == [(ids[1], "too large"), (ids[2], None)]
