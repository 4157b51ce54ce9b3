"""Sessions that are lost at a bad moment."""

import asyncio

import asyncpg
import pytest

from consumer.database import Database


async def test_work_that_is_cancelled_stays_cancelled_although_its_session_is_lost(
    database_url: str, db: asyncpg.Connection
) -> None:
    database = Database(database_url)
    await database.open()
    inside = asyncio.Event()

    async def work() -> None:
        async with database.transaction() as transaction:
            await transaction.now()
            inside.set()
            await asyncio.sleep(60)

    task = asyncio.create_task(work())
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
        await database.close(1)
