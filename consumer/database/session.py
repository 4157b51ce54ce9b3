"""A session with PostgreSQL as all of ours are set up (design, section 5), and the texts of its statements."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from functools import cache, lru_cache
from importlib import resources
from typing import Final

import asyncpg
import orjson
from asyncpg.pool import PoolConnectionProxy

from consumer.database.outages import is_silence

Connection = asyncpg.Connection | PoolConnectionProxy

ANSWER_DEADLINE_S: Final = 5.0  # for what a server answers at once: a session that went dead is noticed this soon
# A host that vanished is noticed within 11 s also in the middle of a long statement, which a deadline for answers can't
# tell from a slow one. After 5 s of silence the kernel asks every 2 s, and gives up when three were in vain; Linux goes
# by TCP_USER_TIMEOUT alone where that is set (measured), also for what was never acknowledged.
KEEPALIVE: Final = {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 2, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 11_000}  # s, s, -, ms
SESSION: Final = {
    "application_name": "campaign-stats",
    "row_security": "off",  # filtered rows would silently count every campaign to zero; now it is an error
    "default_transaction_isolation": "read committed",  # the recount's second snapshot depends on it
    "jit": "off",
    "plan_cache_mode": "force_generic_plan",  # else a single recount is planned anew every time: 3x its CPU (measured)
    "statement_timeout": "30s",
    "lock_timeout": "2s",
    "idle_in_transaction_session_timeout": "20s",  # longer than the relay's send deadline
    "timezone": "UTC",
}
EARLIEST: Final = datetime.min.replace(tzinfo=UTC)
LATEST: Final = datetime.max.replace(tzinfo=UTC)

_EPOCH: Final = datetime(2000, 1, 1, tzinfo=UTC)  # PostgreSQL's


@cache
def statement(name: str) -> str:
    """The text of sql/`name`.sql."""
    return (resources.files("consumer") / "sql" / f"{name}.sql").read_text("utf-8")


@asynccontextmanager
async def in_transaction(connection: Connection) -> AsyncIterator[None]:
    """As `connection.transaction()`, but a server that has fallen silent is not asked for a ROLLBACK too.

    It would wait as long as the statement before it; whoever holds the session ends it instead.
    """
    transaction = connection.transaction()
    try:
        async with asyncio.timeout(ANSWER_DEADLINE_S):
            await transaction.start()
        yield
    except BaseException as error:
        if not is_silence(error):
            async with asyncio.timeout(ANSWER_DEADLINE_S):
                await transaction.rollback()
        raise
    else:
        await transaction.commit()


async def prepare(connection: Connection) -> None:
    """Set a new session up: kernel's keepalive, jsonb and times as we read and write them."""
    _keep_alive(connection)
    await connection.set_type_codec("jsonb", schema="pg_catalog", encoder=_to_json, decoder=orjson.loads)
    # asyncpg's own decoder raises for times that Python cannot hold, and so fails every row read with them.
    await connection.set_type_codec(
        "timestamptz", schema="pg_catalog", encoder=_to_microseconds, decoder=_from_microseconds, format="tuple"
    )


def _keep_alive(connection: Connection) -> None:
    """Set KEEPALIVE, as far as the platform knows it, on a session over TCP; a Unix socket ends with its server."""
    ours: socket.socket = connection._transport.get_extra_info("socket")  # type: ignore[union-attr]  # no public way
    if ours.family not in (socket.AF_INET, socket.AF_INET6):
        return
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in KEEPALIVE.items():
        if hasattr(socket, name):
            ours.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _to_json(value: object) -> str:
    return orjson.dumps(value, default=str).decode()  # str: asyncpg's own subclass of UUID


@lru_cache(maxsize=4_096)  # three of the five in a row are those of its chunk: 0.6 us each
def _from_microseconds(since_2000: tuple[int]) -> datetime:
    try:
        return _EPOCH + timedelta(microseconds=since_2000[0])
    except OverflowError:  # BC, beyond the year 9999, infinity: such a row must not stop its neighbours
        return LATEST if since_2000[0] > 0 else EARLIEST


def _to_microseconds(moment: datetime) -> tuple[int]:
    return ((moment - _EPOCH) // timedelta(microseconds=1),)


async def fetch_one(connection: Connection, query: str, *arguments: object) -> asyncpg.Record:
    """The row of a statement that always returns one."""
    row = await connection.fetchrow(query, *arguments)
    if row is None:
        raise LookupError("a statement that always returns one row returned none")
    return row
