"""The database all examples share: emptied for each of them, with sessions of the product and of an observer."""

import asyncio
import json
from collections.abc import Coroutine, Mapping, Sequence
from datetime import datetime
from typing import Any, Final, TypeVar
from uuid import UUID

import asyncpg

from tests.faults.model import Prospect, Snapshot
from tests.faults.replica import Watched

T = TypeVar("T")

REPLICAS: Final = 2
EMPTY: Final = """
DELETE FROM campaigns; DELETE FROM campaign_stats.campaign_state; DELETE FROM campaign_stats.outbox;
DELETE FROM campaign_stats.deferred; DELETE FROM campaign_stats.guard_decisions;
UPDATE campaign_stats.sweep SET after_id = NULL, due_at = '-infinity', lap_started = NULL, lap_finished = NULL;
"""
# What is not due yet never comes due by itself, however slow this machine is: only `time_passes` makes it due.
FREEZE: Final = """
UPDATE campaign_stats.deferred SET not_before = not_before + interval '1 day'
 WHERE not_before BETWEEN now() AND now() + interval '3 hours';
UPDATE campaign_stats.campaign_state SET retry_at = retry_at + interval '1 day'
 WHERE retry_at BETWEEN now() AND now() + interval '3 hours';
"""
TIME_PASSES: Final = """
UPDATE campaign_stats.deferred SET not_before = '2020-01-01';
UPDATE campaign_stats.campaign_state SET retry_at = '2020-01-01', next_recount_at = '2020-01-01' WHERE failures > 0;
"""
WAITERS: Final = """
SELECT count(*) FROM pg_locks l JOIN pg_stat_activity a ON a.pid = l.pid
 WHERE NOT l.granted AND a.datname = current_database() AND a.application_name = 'campaign-stats'
"""


class Arena:
    """Sessions and an event loop for all examples. Synchronous from outside: `run` steps the loop."""

    observer: asyncpg.Pool  # of one session: several tasks ask it, one after the other
    writer: asyncpg.Connection
    holder: asyncpg.Connection

    def __init__(self, url: str) -> None:
        self._url = url
        self._runner = asyncio.Runner()
        self.databases: list[Watched] = []
        self.run(self._open())

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Step the loop until this is done."""
        return self._runner.run(coroutine)

    def close(self) -> None:
        """End all sessions."""
        self.run(self._close())
        self._runner.close()

    async def _open(self) -> None:
        self.observer = await asyncpg.create_pool(self._url, min_size=1, max_size=1, init=_read_json)
        self.writer = await self._session()
        self.holder = await self._session()
        self.databases = [await self._database(number) for number in range(REPLICAS)]

    async def _session(self) -> asyncpg.Connection:
        session: asyncpg.Connection = await asyncpg.connect(self._url)
        await _read_json(session)
        return session

    async def _database(self, replica: int) -> Watched:
        database = Watched(self._url, replica)
        await database.open()
        return database

    async def _close(self) -> None:
        for database in self.databases:
            await database.close(5.0)
        for session in (self.observer, self.writer, self.holder):
            await session.close()

    async def crashed(self, replica: int) -> None:
        """The sessions of a replica end, the next process has new ones."""
        self.databases[replica].terminate()
        self.databases[replica] = await self._database(replica)

    async def end_session(self, pid: int) -> None:
        """As after a failover; returns when the session and its locks are gone."""
        if not await self.observer.fetchval("SELECT pg_terminate_backend($1, 5000)", pid):
            raise AssertionError("a session did not end within 5 s")

    async def waiters(self) -> int:
        """How many sessions wait for a lock."""
        count: int = await self.observer.fetchval(WAITERS)
        return count

    async def deferred(self) -> dict[int, tuple[UUID, frozenset[str]]]:
        """Row id -> campaign and the ids of requests that wait there."""
        rows = await self.observer.fetch("SELECT id, campaign_id, requests FROM campaign_stats.deferred")
        return {
            row["id"]: (row["campaign_id"], frozenset(request["cause"]["id"] for request in row["requests"]))
            for row in rows
        }

    async def campaigns(self) -> dict[UUID, asyncpg.Record]:
        """Every campaign's row."""
        rows = await self.observer.fetch("SELECT id, status, pause_reason, stats, last_synced_at FROM campaigns")
        return {row["id"]: row for row in rows}

    async def statuses(self) -> dict[UUID, list[str]]:
        """The status of every prospect, by campaign."""
        found: dict[UUID, list[str]] = {}
        for row in await self.observer.fetch("SELECT campaign_id, status FROM campaign_prospects"):
            found.setdefault(row["campaign_id"], []).append(row["status"])
        return found


async def _read_json(session: Any) -> None:
    await session.set_type_codec("jsonb", schema="pg_catalog", encoder=json.dumps, decoder=json.loads)


async def snapshots(session: Any, campaign_ids: Sequence[UUID]) -> Mapping[UUID, Snapshot]:
    """These campaigns as this session sees them now."""
    # The service's sessions hand out timestamptz by a codec of their own; as text both kinds of session read it alike.
    rows = await session.fetch(
        "SELECT c.id, c.type, c.status, p.id AS prospect_id, p.status AS prospect_status, p.contacted_at::text AS at"
        " FROM campaigns c LEFT JOIN campaign_prospects p ON p.campaign_id = c.id WHERE c.id = ANY ($1::uuid[])",
        campaign_ids,
    )
    prospects: dict[UUID, list[Prospect]] = {campaign_id: [] for campaign_id in campaign_ids}
    heads: dict[UUID, tuple[str, str]] = {}
    for row in rows:
        heads[row["id"]] = (row["type"], row["status"])
        if row["prospect_id"] is not None:
            at = None if row["at"] is None else datetime.fromisoformat(row["at"])
            prospects[row["id"]].append(Prospect(row["prospect_id"], row["prospect_status"], at))
    return {
        campaign_id: Snapshot(*head, tuple(prospects[campaign_id])) for campaign_id, head in heads.items()
    }  # fmt: skip
