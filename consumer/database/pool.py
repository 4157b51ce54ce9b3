"""The pool of sessions, one transaction at a time out of it, and what is asked outside of any."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Final
from uuid import UUID

import asyncpg

from consumer.database.outages import is_silence, refusal, translated
from consumer.database.session import (
    ANSWER_DEADLINE_S,
    SESSION,
    Connection,
    fetch_one,
    in_transaction,
    prepare,
    statement,
)
from consumer.database.transaction import Transaction
from consumer.errors import ConfigError, Unavailable

POOL_SIZE: Final = 6  # pipeline (two chunks at once), deferred, relay, sweep, gauges
COMMAND_DEADLINE_S: Final = (
    35.0  # statement_timeout plus the time its answer may take; beyond it the connection is dead
)
ACQUIRE_DEADLINE_S: Final = 10.0
STALE_POOL: Final = frozenset(("25006", "57P01"))  # after a failover a pool keeps talking to the old node


@dataclass(frozen=True, slots=True)
class Pause:
    """A campaign that the guard paused, and the window that led to it."""

    campaign_id: UUID
    paused_at: datetime
    sent: int
    bounced: int
    threshold_bp: int


@dataclass(frozen=True, slots=True)
class Backlog:
    """What waits in our tables. Ages in seconds, 0 when nothing waits."""

    outbox_rows: int
    set_aside_rows: int
    outbox_age_s: float
    deferred: Mapping[str, int]
    deferred_age_s: float
    failing_campaigns: int


class Database:
    """A pool of sessions set up as design section 5 says. Opening it connects to nothing yet."""

    def __init__(self, url: str, *, size: int = POOL_SIZE) -> None:
        self._pool = asyncpg.create_pool(
            url,
            min_size=0,
            max_size=size,
            server_settings=SESSION,
            command_timeout=COMMAND_DEADLINE_S,
            timeout=ACQUIRE_DEADLINE_S,
            init=prepare,
            reset=_leave_alone,
            max_inactive_connection_lifetime=300,
        )

    async def open(self) -> None:
        """Make the pool usable."""
        with translated():
            await self._pool

    async def close(self, deadline_s: float) -> None:
        """End all sessions, the hard way after the deadline."""
        try:
            async with asyncio.timeout(deadline_s):
                await self._pool.close()
        except TimeoutError:
            self.terminate()

    def terminate(self) -> None:
        """End all sessions now: whoever waits for a server that does not answer stops waiting."""
        self._pool.terminate()

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[Connection]:
        """A session outside any transaction. Raises Unavailable when none can be had or it is lost."""
        try:
            with translated():
                async with self._pool.acquire(timeout=ACQUIRE_DEADLINE_S) as connection:
                    try:
                        yield connection
                    except (TimeoutError, Unavailable) as error:
                        if is_silence(error):
                            connection.terminate()  # else giving it back waits once more for the same silent server
                        raise
        except Unavailable as error:
            cause = error.__cause__
            if is_silence(error) or (isinstance(cause, asyncpg.PostgresError) and cause.sqlstate in STALE_POOL):
                await self._pool.expire_connections()  # the others are of the same time
            raise

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[Transaction]:
        """One READ COMMITTED transaction: committed on the way out, rolled back when anything is raised.

        Raises Unavailable for an outage; after one on COMMIT the result is unknown: repeat the whole, it is idempotent.
        """
        async with self.connection() as connection, in_transaction(connection):
            yield Transaction(connection)

    async def check_reachable(self) -> None:
        """Raises ConfigError when DATABASE_URL can never work as it is, Unavailable when no session can be had now."""
        try:
            async with self.connection():
                return
        except (Unavailable, asyncpg.PostgresError, ValueError, OverflowError) as error:
            if problem := refusal(error.__cause__ if isinstance(error, Unavailable) else error):
                raise ConfigError([problem]) from error
            raise

    async def owner(self, campaign_id: UUID) -> UUID | None:
        """Whose campaign this is; None when there is none of this id."""
        async with self.connection() as connection:
            user_id: UUID | None = await connection.fetchval(
                "SELECT user_id FROM public.campaigns WHERE id = $1", campaign_id
            )
            return user_id

    async def check_writable(self) -> None:
        """Raises Unavailable unless a write is possible now (a standby after a failover only reads)."""
        async with self.connection() as connection:
            if await connection.fetchval(
                "SELECT pg_is_in_recovery() OR current_setting('transaction_read_only')::bool"
            ):
                raise Unavailable("database", "read-only")

    async def backlog(self) -> Backlog:
        """What waits in our tables."""
        async with self.connection() as connection, asyncio.timeout(ANSWER_DEADLINE_S):
            return Backlog(**dict(await fetch_one(connection, statement("backlog"))))

    async def last_pauses(self, count: int) -> list[Pause]:
        """The latest pauses of the guard, the newest first."""
        async with self.connection() as connection, asyncio.timeout(ANSWER_DEADLINE_S):
            return [Pause(*row.values()) for row in await connection.fetch(statement("last_pauses"), count)]

    async def next_due_s(self) -> float | None:
        """Seconds until a deferred row is due, negative when one waits already, None when there is none."""
        async with self.connection() as connection, asyncio.timeout(ANSWER_DEADLINE_S):
            seconds: float | None = await connection.fetchval(statement("next_due"))
            return seconds

    async def forget(self, days: int) -> int:
        """Apply retention; returns how many rows went."""
        async with self.connection() as connection:
            gone: int = await connection.fetchval(statement("retention"), days)
            return gone

    async def horizon(self) -> tuple[datetime, int]:
        """The database's clock and the highest outbox id handed out so far."""
        async with self.connection() as connection:
            row = await fetch_one(
                connection,
                "SELECT clock_timestamp() AS now, coalesce((SELECT max(id) FROM campaign_stats.outbox), 0) AS last",
            )
            return row["now"], row["last"]

    async def is_caught_up(self, moment: datetime, last_outbox_id: int) -> bool:
        """Whether nothing of that moment is still deferred (but sweep and failing ones) or unpublished."""
        async with self.connection() as connection:
            row = await fetch_one(connection, statement("caught_up"), moment, last_outbox_id)
            return bool(row["deferred"] == 0 and row["unpublished"] == 0)


async def _leave_alone(connection: Connection) -> None:
    """Every session is ours alone and set up once: the pool's RESET would be a round trip per transaction."""
