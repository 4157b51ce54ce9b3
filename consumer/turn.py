"""One at a time: a lock for commands that must not do the same thing at once."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

from consumer.database import Connection, statement
from consumer.errors import ServiceError

POLL_S: Final = 0.05
PATIENCE_S: Final = 60.0


@asynccontextmanager
async def locked(connection: Connection, name: str) -> AsyncIterator[None]:
    """A transaction in which no other has the lock `name`; it ends with the transaction, also when we are killed.

    Raises ServiceError when somebody else has it for a minute.
    """
    deadline = asyncio.get_running_loop().time() + PATIENCE_S
    while asyncio.get_running_loop().time() < deadline:
        async with connection.transaction():
            if await connection.fetchval(statement("try_lock"), name):
                # Slow brokers may take longer than the session's patience; the lock would be another one's then.
                await connection.execute("SET LOCAL idle_in_transaction_session_timeout = 0")
                yield
                return
        await asyncio.sleep(POLL_S)
    raise ServiceError(f"another `{name}` is at work for a minute already: try again when it is done")
