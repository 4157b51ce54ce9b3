"""What errors of PostgreSQL and its client mean: an outage to wait out, a chunk too slow, a setting to mend."""

import asyncio
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import asyncpg

from consumer.errors import TooSlow, Unavailable

OUTAGE_CLASSES: Final = ("08", "53", "57P", "40", "28", "3D")  # 28, 3D: login refused, database missing
LOST: Final = (  # of the client: also that no server of several has the attributes asked for, as in a failover
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
    OSError,
    TimeoutError,
)
REFUSED_CLASSES: Final = ("28", "3D")
OUTAGE_STATES: Final = frozenset(
    ("25006", "42501", "0A000", "42P01", "42883", "42703", "3F000", "57014", "55P03")
)  # the last two only outside a recount, where TooSlow stands for them: a table of ours is locked, a page was too slow


@contextmanager
def translated() -> Iterator[None]:
    """Raise Unavailable for what design section 6 calls an outage of the database; everything else goes through.

    A task that is being cancelled stays so: the ROLLBACK on its way out may find its session lost, and that error would
    hide the cancellation.
    """
    try:
        yield
    except asyncpg.PostgresError as error:
        _cancelled_first(error)
        if is_outage(error.sqlstate):
            raise Unavailable("database", f"{type(error).__name__} ({error.sqlstate})") from error
        raise
    except LOST as error:
        _cancelled_first(error)
        raise Unavailable("database", f"{type(error).__name__}") from error


@contextmanager
def slow_is_an_error() -> Iterator[None]:
    """Inside a recount a cancelled statement or a lock waited for in vain concerns its chunk alone: TooSlow."""
    try:
        yield
    except asyncpg.LockNotAvailableError as error:
        raise TooSlow(is_lock=True) from error
    except asyncpg.QueryCanceledError as error:
        raise TooSlow(is_lock=False) from error


def is_outage(sqlstate: str | None) -> bool:
    """Away, full, read-only, serialization, rights or tables or functions not as they should be."""
    if sqlstate is None:
        return True
    return sqlstate.startswith(OUTAGE_CLASSES) or sqlstate in OUTAGE_STATES


def is_silence(error: BaseException) -> bool:
    """Whether it says that no answer came in time."""
    return isinstance(error, TimeoutError) or isinstance(error.__cause__, TimeoutError)


def _cancelled_first(error: BaseException) -> None:
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError from error


def refusal(error: BaseException | None) -> str | None:
    """What a person must put right in DATABASE_URL, if this error of connecting says so; never quotes the URL."""
    if isinstance(error, asyncpg.PostgresError) and (error.sqlstate or "").startswith(REFUSED_CLASSES):
        return f"DATABASE_URL: the server refuses it ({error.sqlstate}); check user, password and database"
    if isinstance(error, asyncpg.UndefinedObjectError):
        return f"DATABASE_URL: {error.message}; the driver knows no such option, leave it out"
    if isinstance(error, asyncpg.DataError):
        return f"DATABASE_URL: the server refuses the value of an option in it ({error.sqlstate}); put it right"
    if isinstance(error, asyncpg.ClientConfigurationError):
        return f"DATABASE_URL: {str(error).splitlines()[0]}; put this option right"
    if isinstance(error, ssl.SSLError):
        return (
            f"DATABASE_URL: TLS fails ({error.reason or type(error).__name__}); check sslmode, sslrootcert, sslcert and"
            " sslkey against what the server has"
        )
    if isinstance(error, ConnectionError) and "rejected SSL upgrade" in str(error):  # asyncpg has no class for it
        return "DATABASE_URL: the server has no TLS, but sslmode asks for it; turn TLS on or choose another sslmode"
    if isinstance(error, ValueError | OverflowError):  # of reading the URL, a PG* variable or a password file
        return f"DATABASE_URL: {type(error).__name__} in it, or in a PG* variable of the environment; put it right"
    return None
