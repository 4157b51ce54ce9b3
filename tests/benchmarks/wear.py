"""What an hour of load leaves behind: HOT updates, bloat, vacuum, and what a recount and an idle relay have to read.

Databases that differ in storage options only live through the same hour side by side, tick by tick, on the service's
own engines and statements; only Kafka is left out, every event counts as acknowledged. The product moves prospects with
its own function, edits and imports. The hour is compressed, and autovacuum's clock with it: it looks 60 times and may
do as much between two looks. What goes by transactions (pruning, dead index entries, when a table is due) needs no
compression.
"""

import json
import random
import time
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final
from uuid import UUID

import asyncpg
from prometheus_client import CollectorRegistry

from consumer.broker.publisher import ACKNOWLEDGED, Sent
from consumer.database import SESSION, Database, statement
from consumer.deferred import DeferredWorker
from consumer.generation import Work
from consumer.guard import Limits
from consumer.health import Health
from consumer.metrics import Metrics
from consumer.outcome import SHARDS
from consumer.reconcile import PAGE_CAMPAIGNS, Sweep
from consumer.recount import Rules, recount_campaigns
from consumer.relay import TURN_BYTES, TURN_ROWS, Relay
from schemas.events import Trigger
from tests.benchmarks import workload
from tests.benchmarks.report import Figure, Report
from tests.benchmarks.stage import Stage

HOUR_S: Final = 3_600
TOOK_S: Final = 240.0  # about; the pace of autovacuum follows what it really takes
TICK_S: Final = 10  # of the hour; what is hinted in it is one chunk
SAMPLE_S: Final = 300  # of the hour; also how often the sweep goes round
RECOUNTS: Final = 250  # in a tick: 25 a second
SAMPLED: Final = 100  # campaigns, counted without changing anything
NEWS_SHARE: Final = 0.7  # of the recounted campaigns had a prospect moved; the rest are hinted for nothing
EDITS_SHARE: Final = 0.1  # per moved prospect: another one is edited without a move
LOCKED: Final = 5  # recounted campaigns that are in the product's hands at that moment, every other tick
IMPORTED: Final = 10  # prospects, into one campaign, every tick
TABLES: Final = ("campaigns", "campaign_prospects", "campaign_state", "outbox", "deferred")

VARIANTS: Final[Mapping[str, Sequence[str]]] = {
    "as migrated": (),
    "campaigns at fillfactor 100": ("ALTER TABLE campaigns SET (fillfactor = 100)", "VACUUM (FULL) campaigns"),
    "queues give pages back": (
        "ALTER TABLE campaign_stats.outbox SET (vacuum_truncate = true)",
        "ALTER TABLE campaign_stats.deferred SET (vacuum_truncate = true)",
    ),
    "prospects vacuumed at 0.5 %": ("ALTER TABLE campaign_prospects SET (autovacuum_vacuum_scale_factor = 0.005)",),
}

MOVE: Final = """
SELECT count(*) FROM (
    SELECT update_prospect_with_stat(p.id, drawn.next)
      FROM (SELECT c.id, d.status, floor(random() * 20)::int AS skip,
                   CASE d.status WHEN 'pending' THEN CASE c.type WHEN 'email' THEN 'sent' ELSE 'connection_sent' END
                                 WHEN 'connection_sent' THEN 'connected'
                                 WHEN 'connected' THEN 'message_sent'
                                 ELSE (ARRAY['replied', 'completed', 'completed', 'timed_out', 'bounced'])
                                      [1 + floor(4.1 * random())::int] END AS next
              FROM unnest($1::uuid[]) AS hinted (id) JOIN campaigns AS c ON c.id = hinted.id
             CROSS JOIN LATERAL (
                   SELECT CASE WHEN random() < 0.4 THEN 'pending' WHEN c.type = 'email' THEN 'sent'
                               WHEN random() < 0.5 THEN 'connection_sent' ELSE 'connected' END AS status) AS d
            OFFSET 0) AS drawn
     CROSS JOIN LATERAL (SELECT id FROM campaign_prospects
                          WHERE campaign_id = drawn.id AND status = drawn.status OFFSET drawn.skip LIMIT 1) AS p
    OFFSET 0) AS moved
"""
EDIT: Final = """
UPDATE campaign_prospects SET company = 'Company ' || floor(random() * 1000), updated_at = clock_timestamp()
 WHERE id IN (SELECT p.id FROM unnest($1::uuid[]) AS hinted (campaign_id)
               CROSS JOIN LATERAL (SELECT id FROM campaign_prospects
                                    WHERE campaign_id = hinted.campaign_id
                                   OFFSET floor(random() * 100)::int LIMIT 1) AS p)
"""
IMPORT: Final = """
INSERT INTO campaign_prospects (campaign_id, user_id, status, email, company)
SELECT id, user_id, 'pending', 'new-' || n || '@company.example', 'Company' FROM campaigns, generate_series(1, $2) AS n
 WHERE id = $1
"""
STATISTICS: Final = """
SELECT relname::text, n_tup_upd, n_tup_hot_upd, autovacuum_count FROM pg_stat_user_tables WHERE relname = ANY ($1)
"""
SIZES: Final = """
SELECT r.relname::text, pg_relation_size(r.oid) AS bytes
  FROM pg_class t LEFT JOIN pg_index i ON i.indrelid = t.oid JOIN pg_class r ON r.oid IN (t.oid, i.indexrelid)
 WHERE t.relname = ANY ($1) AND t.relkind = 'r'
"""
COUNT: Final = """
SELECT c.id, t.total FROM unnest($1::uuid[]) AS c (id) CROSS JOIN LATERAL campaign_stats.count_prospects(c.id) AS t
"""


@dataclass(frozen=True, slots=True)
class Sample:
    """What work would cost at one moment."""

    looked_up: float  # of the index entries a recount reads, the share it must look up in the table
    recount_blocks: float  # to count a campaign
    relay_blocks: int  # an idle turn: lock and read


async def _acknowledge(rows: Sequence[tuple[str, UUID, bytes]]) -> Sequence[Sent]:
    return [ACKNOWLEDGED] * len(rows)


class Life:
    """One database's hour: a product and a service at work on it."""

    def __init__(self, variant: str, url: str, ids: Sequence[UUID]) -> None:
        self.variant = variant
        self.url = url
        self.samples: list[Sample] = []
        self.recounted = 0
        self._ids = ids
        self._dice = random.Random(7)
        self._database = Database(url, size=4)
        metrics, health = Metrics(CollectorRegistry()), Health()
        self._rules = Rules(Limits())
        self._relay = Relay(self._database, _acknowledge, metrics, health)
        self._worker = DeferredWorker(self._database, self._rules, metrics, health, wake_relay=self._relay.wake)
        self._sweep = Sweep(self._database, Limits(), metrics, health, interval_s=0.0, grace_s=1.0, retention_days=90)
        self._product: asyncpg.Connection
        self._onlooker: asyncpg.Connection
        self._statistics: dict[str, Mapping[str, int]] = {}
        self._sizes: dict[str, int] = {}

    @asynccontextmanager
    async def lived(self, changes: Sequence[str]) -> AsyncIterator["Life"]:
        """With these options, from now on."""
        await self._database.open()
        self._product = await asyncpg.connect(self.url)
        self._onlooker = await asyncpg.connect(self.url, server_settings={**SESSION, "statement_timeout": "0"})
        try:
            for change in changes:
                await self._product.execute(change)
            await workload.settle(self._product)
            await self._product.execute("SELECT setseed(0.7)")
            self._statistics, self._sizes = await self._read_statistics(), await self._read_sizes()
            yield self
        finally:
            await self._database.close(5)
            await self._product.close()
            await self._onlooker.close()

    async def tick(self, second: int) -> None:
        """Some seconds of the hour."""
        hinted = self._dice.sample(self._ids, RECOUNTS)
        moved = hinted[: round(len(hinted) * NEWS_SHARE)]
        await self._product.fetchval(MOVE, moved)
        await self._product.execute(EDIT, moved[: round(len(moved) * EDITS_SHARE)])
        await self._product.execute(IMPORT, hinted[0], IMPORTED)
        async with self._product.transaction():
            locked = hinted[:LOCKED] if second % (2 * TICK_S) else []
            await self._product.execute("SELECT 1 FROM campaigns WHERE id = ANY ($1) FOR NO KEY UPDATE", locked)
            async with self._database.transaction() as db:
                works = [Work(one, Trigger.STATUS_CHANGED) for one in hinted]
                self.recounted += (await recount_campaigns(db, works, "chunk", self._rules)).recounted
        await self._work_off()
        await self._database.backlog()
        if second % SAMPLE_S == 0:
            for _ in range(len(self._ids) // PAGE_CAMPAIGNS + 1):
                await self._sweep.page()

    async def _work_off(self) -> None:
        while await self._worker.turn() or await self._relay.turn():
            pass

    async def sample(self, second: int) -> None:
        """Look what work would cost now. Changes nothing."""
        ids = random.Random(second).sample(self._ids, SAMPLED)
        plan = await self._explain(COUNT, ids)
        entries = sum(row["total"] for row in await self._onlooker.fetch(COUNT, ids))
        fetches = sum(node.get("Heap Fetches", entries) for node in _scans(plan))
        relay = [
            await self._explain(statement("relay_lock")),
            await self._explain(statement("relay_read"), list(range(SHARDS)), TURN_ROWS, TURN_BYTES),
        ]
        self.samples.append(Sample(fetches / entries, _blocks(plan) / SAMPLED, sum(map(_blocks, relay))))

    async def figures(self) -> list[Figure]:
        """What the hour did."""
        found = []
        for table, now in (await self._read_statistics()).items():
            was = self._statistics[table]
            updated, hot = (now[name] - was[name] for name in ("n_tup_upd", "n_tup_hot_upd"))
            if updated:
                found.append(self._figure(f"{table}: updates", updated, ",.0f"))
                found.append(self._figure(f"{table}: share of them HOT", hot / updated))
            found.append(self._figure(f"{table}: vacuums", now["autovacuum_count"] - was["autovacuum_count"], ".0f"))
        for relation, size in sorted((await self._read_sizes()).items()):
            if (was_size := self._sizes[relation]) > 2**20:
                found.append(self._figure(f"{relation}: size beside that before", size / was_size))
        for name, title in (
            ("looked_up", "share of index entries looked up in the table"),
            ("recount_blocks", "blocks to count a campaign"),
            ("relay_blocks", "blocks of an idle turn of the relay"),
        ):
            values = [float(getattr(sample, name)) for sample in self.samples]
            found.append(Figure(f"{self.variant}: {title}", values))
        return found

    def _figure(self, title: str, value: float, form: str = ",.2f") -> Figure:
        return Figure(f"{self.variant}: {title}", [value], form)

    async def problems(self) -> list[str]:
        """What is wrong at the end."""
        await self._work_off()
        truth = await workload.read_truth(self.url)
        return [
            f"{self.variant}: {len(found)} campaigns {what}"
            for found, what in ((truth.drifted(), "have wrong stats"), (truth.overlooked(), "should be paused"))
            if found
        ]

    async def _explain(self, query: str, *arguments: object) -> Mapping[str, Any]:
        transaction = self._onlooker.transaction()
        await transaction.start()
        try:
            found = await self._onlooker.fetchval(f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {query}", *arguments)
        finally:
            await transaction.rollback()
        plan: Mapping[str, Any] = json.loads(found)[0]["Plan"]
        return plan

    async def _read_statistics(self) -> dict[str, Mapping[str, int]]:
        await self._onlooker.execute("SELECT pg_stat_force_next_flush()")
        return {row["relname"]: dict(row) for row in await self._onlooker.fetch(STATISTICS, TABLES)}

    async def _read_sizes(self) -> dict[str, int]:
        return {row["relname"]: row["bytes"] for row in await self._onlooker.fetch(SIZES, TABLES)}


def _scans(plan: Mapping[str, Any]) -> Iterable[Mapping[str, Any]]:
    if plan.get("Relation Name") == "campaign_prospects":
        yield plan
    for child in plan.get("Plans", ()):
        yield from _scans(child)


def _blocks(plan: Mapping[str, Any]) -> int:
    return int(plan["Shared Hit Blocks"] + plan["Shared Read Blocks"])


async def measure(stage: Stage) -> Report:
    """The hour, for all databases at once."""
    await stage.template()
    async with AsyncExitStack() as stack:
        lives = []
        for number, (variant, changes) in enumerate(VARIANTS.items()):
            name = await stack.enter_async_context(stage.database(f"wear{number}"))
            lives.append(await stack.enter_async_context(
                Life(variant, stage.postgres.url(name), stage.ids).lived(changes)))  # fmt: skip
        await stack.enter_async_context(_autovacuum_reset(stage))
        await _pace(stage, HOUR_S / TOOK_S)
        begun = time.monotonic()
        for second in range(0, HOUR_S + 1, TICK_S):
            if second % SAMPLE_S == 0:
                for life in lives:
                    await life.sample(second)
                if second:
                    await _pace(stage, second / (time.monotonic() - begun))
            for life in lives:
                await life.tick(second)
        took_s = time.monotonic() - begun
        stage.say(f"  an hour with {lives[0].recounted:,} recounts for each in {took_s:.0f} s")
        figures = [figure for life in lives for figure in await life.figures()]
        problems = [problem for life in lives for problem in await life.problems()]
    return Report("wear", figures, problems, [{"took_s": took_s, "recounts": life.recounted} for life in lives])


async def _pace(stage: Stage, factor: float) -> None:
    """Let autovacuum's clock go so many times faster, as the load does."""
    async with workload.connected(stage.postgres.url()) as admin:
        await admin.execute(f"ALTER SYSTEM SET autovacuum_naptime = '{max(1, round(60 / factor))}s'")
        await admin.execute(f"ALTER SYSTEM SET autovacuum_vacuum_cost_limit = {min(10_000, round(200 * factor))}")
        await admin.execute("SELECT pg_reload_conf()")


@asynccontextmanager
async def _autovacuum_reset(stage: Stage) -> AsyncIterator[None]:
    try:
        yield
    finally:
        async with workload.connected(stage.postgres.url()) as admin:
            await admin.execute("ALTER SYSTEM RESET ALL")
            await admin.execute("SELECT pg_reload_conf()")
