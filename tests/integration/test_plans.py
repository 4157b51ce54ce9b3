"""What the hot statements read at more than 10 million prospects: which indexes, and how many blocks. Never how long.

33 000 campaigns of 300 prospects and one of a million, on a server of its own. Each campaign's rows lie as far apart as
they can, one a page: whoever reads the table where the index would do reads 300 blocks instead of a few. Blocks are
those of shared buffers, found there or not, so they are the same on every machine.
"""

import asyncio
import json
import re
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Final
from uuid import UUID

import asyncpg
import pytest

from consumer import migrations
from consumer.database import SESSION, statement
from consumer.demo.servers import Postgres
from tests.conftest import NO_FSYNC

pytestmark = pytest.mark.xdist_group("plans")  # one worker loads it

CAMPAIGNS: Final = 33_000
PROSPECTS: Final = 300
HUGE: Final = 1_000_000
CHUNK: Final = 1_000
CONTACTED_OF_TEN: Final = 8
WINDOW: Final = 500
SHARDS: Final = 32
TURN: Final = 2_000
BACKLOG: Final = 160_000  # fewer, and a turn of a single shard would rather read the whole shard
SERVER: Final = {
    **NO_FSYNC,
    "autovacuum": "off",  # what is vacuumed and analyzed is said here
    "full_page_writes": "off",
    "wal_level": "minimal",  # rows that are loaded into a table of the same transaction need no WAL
    "max_wal_senders": "0",
    "max_wal_size": "8GB",
    "shared_buffers": "512MB",
    "maintenance_work_mem": "512MB",
}

LOAD_CAMPAIGNS: Final = """
INSERT INTO campaigns (id, user_id, type, name, status)
SELECT md5(n::text)::uuid, md5((n % 500)::text)::uuid, 'email', n::text, 'active' FROM generate_series(0, $1::int) AS n
"""
# One prospect of each campaign, and so many of the huge one (the first) that both are complete after 300 of these.
LOAD_PROSPECTS: Final = """
INSERT INTO campaign_prospects (id, campaign_id, user_id, status, contacted_at, created_at, updated_at)
SELECT md5(c.name || '/' || k)::uuid, c.id, c.user_id, s.status,
       CASE WHEN s.status <> 'pending' THEN now() - make_interval(mins => 1 + k % 30000) END, now(), now()
  FROM campaigns AS c,
       generate_series($1::int, CASE WHEN c.name = '0' THEN $2::int ELSE $1::int END, $3::int) AS k,
       LATERAL (SELECT (ARRAY['pending', 'pending', 'sent', 'sent', 'sent', 'sent', 'replied', 'completed', 'timed_out',
                              'bounced'])[1 + k % 10]) AS s (status)
"""
LOAD_OUTBOX: Final = """
INSERT INTO campaign_stats.outbox (shard, campaign_id, type, event)
SELECT n % 32, md5(n::text)::uuid, 'type' || n % $2::int, decode(repeat('7b', 700), 'hex')
  FROM generate_series(1, $1::int) AS n
"""
LOAD_DEFERRED: Final = """
INSERT INTO campaign_stats.deferred (campaign_id, reason, not_before, trigger)
SELECT md5(n::text)::uuid, 'sweep', now() - interval '1 minute', 'reconciliation' FROM generate_series(1, $1::int) AS n
"""


@pytest.fixture(scope="module")
def millions(servers_directory: Path) -> Iterator[str]:
    """URL of the database with all the prospects."""
    server = Postgres(servers_directory / "plans", options=SERVER)
    try:
        server.start()
        asyncio.run(load(server))
        yield server.url("plans")
    finally:
        server.stop()


async def load(server: Postgres) -> None:
    """Rows first, then the indexes as the migrations make them, only not CONCURRENTLY, then all the migrations."""
    admin = await asyncpg.connect(server.url())
    await admin.execute("CREATE DATABASE plans")
    await admin.close()
    db = await asyncpg.connect(server.url("plans"))
    await db.execute((resources.files(migrations) / "reference" / "0001_product_tables.sql").read_text("utf-8"))
    await db.execute(LOAD_CAMPAIGNS, CAMPAIGNS)
    async with db.transaction():
        await db.execute("ALTER TABLE campaign_prospects DROP CONSTRAINT campaign_prospects_pkey")
        await db.execute("ALTER TABLE campaign_prospects DROP CONSTRAINT campaign_prospects_campaign_id_fkey")
        await db.execute("TRUNCATE campaign_prospects")
        for number in range(PROSPECTS):
            await db.execute(LOAD_PROSPECTS, number, HUGE - 1, PROSPECTS)
        await db.execute("ALTER TABLE campaign_prospects ADD PRIMARY KEY (id)")
        await db.execute(
            "ALTER TABLE campaign_prospects ADD FOREIGN KEY (campaign_id) REFERENCES campaigns ON DELETE CASCADE"
        )
        for migration in migrations.released():
            if migrations.CONCURRENTLY.match(migration.sql):
                await db.execute(migration.sql.replace("CONCURRENTLY", ""))
    await migrations.migrate(server.url("plans"))
    for table in ("campaigns", "campaign_prospects"):
        await db.execute(f"VACUUM (ANALYZE) {table}")
    await db.close()


@pytest.fixture
async def db(millions: str) -> AsyncIterator[asyncpg.Connection]:
    """A session set up as the service's; the campaigns as they were, however many updates of them were undone."""
    connection = await asyncpg.connect(millions, server_settings={**SESSION, "statement_timeout": "300s"})
    await connection.execute("VACUUM (INDEX_CLEANUP ON) campaigns")
    yield connection
    await connection.close()


@asynccontextmanager
async def undone(db: asyncpg.Connection) -> AsyncIterator[None]:
    """A transaction that is rolled back."""
    transaction = db.transaction()
    await transaction.start()
    try:
        yield
    finally:
        await transaction.rollback()


@dataclass(frozen=True)
class Who:
    """Whose turn it is: their ids, and how many prospects they have."""

    ids: Sequence[UUID]
    prospects: int

    @property
    def array(self) -> str:
        """As SQL."""
        return f"'{{{','.join(map(str, self.ids))}}}'::uuid[]"


@pytest.fixture(params=["a chunk", "one", "the huge one"])
async def who(request: pytest.FixtureRequest, db: asyncpg.Connection) -> Who:
    """A chunk of a thousand campaigns from all over the table; one campaign; the one with a million prospects."""
    name = request.param
    if name == "the huge one":
        return Who([await db.fetchval("SELECT id FROM campaigns WHERE name = '0'")], HUGE)
    count = CHUNK if name == "a chunk" else 1
    rows = await db.fetch("SELECT id FROM campaigns WHERE name <> '0' ORDER BY md5(name || 'x') LIMIT $1", count)
    return Who([row["id"] for row in rows], count * PROSPECTS)


@dataclass(frozen=True)
class Scan:
    """A node of a plan that reads a table. Counts are None when the plan was not carried out."""

    kind: str
    table: str
    index: str | None
    rows: int
    loops: int
    heap_fetches: int | None


class Plan:
    """What EXPLAIN says of a statement."""

    def __init__(self, explained: str) -> None:
        [document] = json.loads(explained)
        self.top: Mapping[str, Any] = document["Plan"]
        self.scans = [
            Scan(
                kind=node["Node Type"],
                table=node["Relation Name"],
                index=node.get("Index Name"),
                rows=round(node.get("Actual Rows", 0) * node.get("Actual Loops", 0)),
                loops=round(node.get("Actual Loops", 0)),
                heap_fetches=node.get("Heap Fetches"),
            )
            for node in _nodes(self.top)
            if "Relation Name" in node and node["Node Type"].endswith("Scan")
        ]

    @property
    def blocks(self) -> int:
        """Blocks looked at, those of statements inside functions included."""
        return int(self.top["Shared Hit Blocks"] + self.top["Shared Read Blocks"])

    def of(self, table: str) -> list[Scan]:
        """The nodes that read `table`."""
        return [scan for scan in self.scans if scan.table == table]

    def strays(self, table: str, *indexes: str) -> list[Scan]:
        """The nodes that read `table` in any other way than along one of `indexes`."""
        return [
            scan
            for scan in self.of(table)
            if scan.kind not in ("Index Scan", "Index Only Scan") or scan.index not in indexes
        ]


def _nodes(node: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    yield node
    for child in node.get("Plans", ()):
        yield from _nodes(child)


async def explain(db: asyncpg.Connection, query: str, values: str = "", *, run: bool = True) -> Plan:
    """The plan of a prepared statement with these values (SQL); carried out and undone, if `run`.

    Twice then: the first time a session reads the catalog too.
    """
    options = "ANALYZE, BUFFERS, TIMING OFF, " if run else ""
    await db.execute(f"PREPARE probe AS {query}")
    try:
        for _ in range(1 + run):
            async with undone(db):
                explained = await db.fetchval(f"EXPLAIN ({options}FORMAT JSON) EXECUTE probe{values and f'({values})'}")
        return Plan(explained)
    finally:
        await db.execute("DEALLOCATE probe")


async def inside(db: asyncpg.Connection) -> dict[str, str]:
    """The statements of the recount function as they stand in the database, its variables as parameters.

    lock: $1 ids, $2 caller, $3 huge_from, $4 chunk_budget. write: $1 mine, $2 stamp. held: $1 to $4 as lock, $5 mine,
    $6 stamp.
    """
    source = await db.fetchval(
        "SELECT prosrc FROM pg_proc WHERE oid = 'campaign_stats.recalculate_campaign_stats'::regproc"
    )
    found = {}
    for name, pattern, variables in (
        ("lock", r"mine := ARRAY\((.*?)\);", ("campaign_ids", "caller", "huge_from", "chunk_budget")),
        ("write", r"RETURN QUERY\s+(WITH .*?);\n", ("mine", "stamp")),
        ("held", r"RETURN QUERY\s+(SELECT .*?);\n",
         ("campaign_ids", "caller", "huge_from", "chunk_budget", "mine", "stamp")),
    ):  # fmt: skip
        match = re.search(pattern, source, re.DOTALL)
        assert match is not None, name
        text = match[1]
        types = {"campaign_ids": "uuid[]", "mine": "uuid[]", "caller": "text", "stamp": "timestamptz"}
        for number, variable in enumerate(variables, 1):
            text, count = re.subn(rf"\b{variable}\b", f"${number}::{types.get(variable, 'bigint')}", text)
            assert count, (name, variable)
        found[name] = text
    return found


def recount_allowed(campaigns: int, prospects: int) -> int:
    """Blocks for a recount: whatever the table holds, so many a campaign, and the pages of its index entries.

    An entry takes 6 bytes and each status its own list, a page holds more than a thousand: 500 is generous.
    """
    return 100 + 80 * campaigns + prospects // 500


async def recount_plans(db: asyncpg.Connection, who: Who, *, run: bool = True) -> dict[str, Plan]:
    limits = "'worker', 20000, 300000"
    values = {
        "lock": f"{who.array}, {limits}",
        "write": f"{who.array}, now()",
        "held": f"{who.array}, {limits}, '{{}}', now()",
    }
    return {name: await explain(db, text, values[name], run=run) for name, text in (await inside(db)).items()}


BY_STATUS: Final = "campaign_prospects_by_campaign_and_status"
BY_CONTACT: Final = "campaign_prospects_by_contact"


async def test_the_recount_reads_of_the_prospects_its_campaigns_index_entries_only(
    db: asyncpg.Connection, who: Who
) -> None:
    plans = await recount_plans(db, who)
    assert [plan.of("campaign_prospects") for name, plan in plans.items() if name != "write"] == [[], []]
    [scan] = plans["write"].of("campaign_prospects")
    assert (scan.kind, scan.index, scan.heap_fetches) == ("Index Only Scan", BY_STATUS, 0)
    assert (scan.loops, scan.rows) == (len(who.ids), who.prospects)
    assert sum(plan.blocks for plan in plans.values()) <= recount_allowed(len(who.ids), who.prospects)


async def test_the_function_itself_reads_what_its_statements_read(db: asyncpg.Connection, who: Who) -> None:
    """Its plans cannot be seen from outside, but what they read is counted (of two calls)."""
    counted = "SELECT seq_scan, idx_scan, idx_tup_fetch FROM pg_stat_xact_user_tables WHERE relname = $1"
    async with undone(db):
        before = await db.fetchrow(counted, "campaign_prospects")
        plan = await explain(db, statement("recount"), f"{who.array}, 'worker'")
        after = await db.fetchrow(counted, "campaign_prospects")
    assert before is not None
    assert after is not None
    assert [after[key] - before[key] for key in ("seq_scan", "idx_scan", "idx_tup_fetch")] == [0, 2 * len(who.ids), 0]
    assert plan.top["Actual Rows"] == len(who.ids)
    assert plan.blocks <= recount_allowed(len(who.ids), who.prospects)


async def test_controls_a_recount_without_its_index_or_past_it_is_noticed(db: asyncpg.Connection) -> None:
    rows = await db.fetch("SELECT id FROM campaigns WHERE name <> '0' ORDER BY md5(name || 'x') LIMIT $1", CHUNK)
    chunk, one = Who([row["id"] for row in rows], CHUNK * PROSPECTS), Who([rows[0]["id"]], PROSPECTS)
    async with undone(db):
        await db.execute(f"DROP INDEX {BY_STATUS}")
        plan = (await recount_plans(db, chunk, run=False))["write"]
        assert [scan.kind for scan in plan.strays("campaign_prospects", BY_STATUS)] == ["Seq Scan"]
    async with undone(db):
        await db.execute("SET LOCAL enable_indexonlyscan = off")
        plan = (await recount_plans(db, chunk))["write"]
        assert plan.strays("campaign_prospects", BY_STATUS)  # by bitmap here: the rows lie everywhere
        assert plan.blocks > recount_allowed(CHUNK, chunk.prospects)
    async with undone(db):  # a visibility map that is behind: every entry is looked up in the table
        await db.execute("UPDATE campaign_prospects SET company = 'x' WHERE campaign_id = $1", one.ids[0])
        plan = (await recount_plans(db, one))["write"]
    await db.execute("VACUUM (INDEX_CLEANUP ON) campaign_prospects")  # the pages' bits in the map were not rolled back
    [scan] = plan.of("campaign_prospects")
    assert (scan.kind, scan.heap_fetches) == ("Index Only Scan", 2 * PROSPECTS)
    assert plan.blocks > recount_allowed(1, PROSPECTS)


def windows_of(who: Who, size: int, opened: str) -> str:
    """Values for guard_windows."""
    many = len(who.ids)
    return f"{who.array}, array_fill({size}, ARRAY[{many}]), array_fill(({opened})::timestamptz, ARRAY[{many}])"


@pytest.mark.parametrize("opened", ["NULL", "now() - interval '100 minutes'"])
async def test_the_guards_window_reads_the_latest_contacts_and_no_more(
    db: asyncpg.Connection, who: Who, opened: str
) -> None:
    plan = await explain(db, statement("guard_windows"), windows_of(who, WINDOW, opened))
    assert plan.strays("campaign_prospects", BY_CONTACT) == []
    read = sum(scan.rows for scan in plan.of("campaign_prospects"))
    assert 0 < read <= min(who.prospects * CONTACTED_OF_TEN // 10, WINDOW * len(who.ids))
    assert plan.blocks <= 100 + 10 * len(who.ids) + read


async def test_control_a_window_without_its_index_is_noticed(db: asyncpg.Connection) -> None:
    huge = Who([await db.fetchval("SELECT id FROM campaigns WHERE name = '0'")], HUGE)
    async with undone(db):
        await db.execute(f"DROP INDEX {BY_CONTACT}")
        plan = await explain(db, statement("guard_windows"), windows_of(huge, WINDOW, "NULL"), run=False)
    assert plan.strays("campaign_prospects", BY_CONTACT)


async def test_without_any_statistics_nothing_reads_the_whole_table_either(db: asyncpg.Connection, who: Who) -> None:
    """After a restore or a large import, before ANALYZE and VACUUM came by."""
    async with undone(db):
        await db.execute("DELETE FROM pg_statistic WHERE starelid = 'campaign_prospects'::regclass")
        await db.execute("UPDATE pg_class SET relallvisible = 0, reltuples = -1 WHERE relname = 'campaign_prospects'")
        plans = await recount_plans(db, who, run=False)
        plans["window"] = await explain(db, statement("guard_windows"), windows_of(who, WINDOW, "NULL"), run=False)
    kinds = {scan.kind for plan in plans.values() for scan in plan.of("campaign_prospects")}
    assert kinds <= {"Index Scan", "Index Only Scan", "Bitmap Heap Scan"}
    assert kinds


ALL_SHARDS: Final = f"'{{{','.join(map(str, range(SHARDS)))}}}'::smallint[]"
PENDING: Final = "outbox_pending"


async def fill_queues(db: asyncpg.Connection, rows: int, *, types: int = 1) -> None:
    """Outbox and deferred with so many rows, as an ANALYZE sees them."""
    await db.execute("TRUNCATE campaign_stats.outbox, campaign_stats.deferred")
    await db.execute(LOAD_OUTBOX, rows, types)
    await db.execute(LOAD_DEFERRED, rows)
    for table in ("outbox", "deferred"):
        await db.execute(f"VACUUM (ANALYZE) campaign_stats.{table}")


async def explain_queues(db: asyncpg.Connection) -> dict[str, Plan]:
    """The relay's turn and the worker's take."""
    rows = await db.fetch("SELECT id FROM campaign_stats.outbox ORDER BY id LIMIT $1", TURN)
    oldest = [row["id"] for row in rows]
    values = {
        "relay_lock": "",
        "relay_read": f"{ALL_SHARDS}, {TURN}, 4194304",
        "relay_read_types": f"{ALL_SHARDS}, {TURN}, 4194304, ARRAY['type0']",
        "relay_done": f"'{{{','.join(map(str, oldest))}}}', '{{}}', '{{}}'",
        "take_deferred": "",
    }
    return {name: await explain(db, statement(name), given) for name, given in values.items()}


@pytest.mark.parametrize("rows", [BACKLOG // 8, BACKLOG])
async def test_the_relays_turn_costs_the_same_however_much_is_waiting(db: asyncpg.Connection, rows: int) -> None:
    await fill_queues(db, rows)
    plans = await explain_queues(db)
    lock, read, done = plans["relay_lock"], plans["relay_read"], plans["relay_done"]
    assert lock.strays("outbox", PENDING) == []
    assert sum(scan.rows for scan in lock.of("outbox")) == SHARDS  # one probe each
    assert lock.blocks <= 100 + 6 * SHARDS
    assert read.strays("outbox", PENDING) == []
    assert sum(scan.rows for scan in read.of("outbox")) <= TURN
    assert read.blocks <= 100 + 6 * SHARDS + TURN
    assert done.strays("outbox", "outbox_pkey", PENDING) == []
    one = await explain(db, statement("relay_read"), f"'{{3}}'::smallint[], {TURN}, 4194304")
    assert one.blocks <= 100 + 6 + TURN


async def test_rows_of_a_type_that_is_held_back_cost_nothing(db: asyncpg.Connection) -> None:
    await fill_queues(db, BACKLOG, types=1_000)
    await db.execute("ANALYZE campaign_stats.outbox")
    plan = await explain(
        db, statement("relay_read_types"), f"{ALL_SHARDS}, {TURN}, 4194304, ARRAY['type0', 'type1', 'none']"
    )
    assert plan.strays("outbox", "outbox_by_type") == []
    assert 0 < sum(scan.rows for scan in plan.of("outbox")) <= 2 * BACKLOG // 1_000
    assert plan.blocks <= 100 + 3 * 6 * SHARDS + TURN


async def test_the_worker_takes_a_campaign_without_reading_the_others(db: asyncpg.Connection) -> None:
    await fill_queues(db, BACKLOG)
    plan = (await explain_queues(db))["take_deferred"]
    assert plan.strays("deferred", "deferred_due", "deferred_campaign", "deferred_pkey") == []
    assert plan.blocks <= 100


async def test_control_a_turn_without_its_index_is_noticed(db: asyncpg.Connection) -> None:
    await fill_queues(db, BACKLOG)
    async with undone(db):
        await db.execute("DROP INDEX campaign_stats.outbox_pending, campaign_stats.deferred_due")
        plans = await explain_queues(db)
    assert plans["relay_lock"].strays("outbox", PENDING)
    assert plans["relay_read"].strays("outbox", PENDING)
    assert plans["relay_read"].blocks > 100 + 6 * SHARDS + TURN
    assert plans["take_deferred"].blocks > 100


async def plan_while_empty(db: asyncpg.Connection, rows: int) -> dict[str, Plan]:
    """Plans as a session keeps them that asked for work while there was none, now that there is a lot.

    Statements without parameters are planned once and kept until the table's statistics change. Where VACUUM emptied
    the queue and gave all its pages back, they are planned for a table of no page.
    """
    await fill_queues(db, 10_000)
    await db.execute("DELETE FROM pg_statistic WHERE starelid::regclass::text ~ 'campaign_stats.(outbox|deferred)$'")
    for table in ("outbox", "deferred"):
        await db.execute(f"DELETE FROM campaign_stats.{table}")
        await db.execute(f"VACUUM (ANALYZE) campaign_stats.{table}")
    names = {"relay_lock": "", "relay_read": f"({ALL_SHARDS}, {TURN}, 4194304)", "take_deferred": ""}
    for name, values in names.items():
        await db.execute(f"PREPARE {name} AS {statement(name)}")
        await db.execute(f"EXECUTE {name}{values}")
    await db.execute(LOAD_OUTBOX, rows, 1)
    await db.execute(LOAD_DEFERRED, rows)
    plans = {}
    for name, values in names.items():
        async with undone(db):
            explained = await db.fetchval(f"EXPLAIN (ANALYZE, BUFFERS, TIMING OFF, FORMAT JSON) EXECUTE {name}{values}")
        plans[name] = Plan(explained)
        await db.execute(f"DEALLOCATE {name}")
    return plans


async def test_plans_made_while_the_queues_were_empty_still_serve_a_burst(db: asyncpg.Connection) -> None:
    plans = await plan_while_empty(db, 3_000)
    assert plans["relay_lock"].strays("outbox", PENDING) == []
    assert plans["relay_lock"].blocks <= 100 + 6 * SHARDS
    assert plans["relay_read"].strays("outbox", PENDING) == []
    assert plans["relay_read"].blocks <= 100 + 6 * SHARDS + TURN
    assert plans["take_deferred"].blocks <= 100


async def test_control_a_queue_whose_pages_were_given_back_is_read_whole_for_each_shard(db: asyncpg.Connection) -> None:
    for option in ("SET (vacuum_truncate = true)", "SET (vacuum_truncate = false)"):
        await db.execute(f"ALTER TABLE campaign_stats.outbox {option}")
        plans = await plan_while_empty(db, 3_000)
        is_read_whole = bool(plans["relay_lock"].strays("outbox", PENDING))
        assert is_read_whole == ("true" in option)
        assert (sum(scan.rows for scan in plans["relay_lock"].of("outbox")) >= 3_000) == is_read_whole


LATE: Final = 500  # campaigns from the end
NEXT_ALLOWED: Final = 10  # blocks: the way down the index, and the campaign's own page


async def late_page(db: asyncpg.Connection, query: str, campaigns: int = 100) -> tuple[Plan, int]:
    """The plan of a page near the end, and how many campaigns it found."""
    start = await db.fetchval("SELECT id FROM campaigns ORDER BY id DESC OFFSET $1 LIMIT 1", LATE)
    plan = await explain(db, query, f"'{start}', {campaigns}")
    return plan, int(plan.top["Actual Rows"])


@pytest.mark.parametrize("name", ["sweep_page", "drift_page"])
async def test_a_page_begins_in_the_index_where_it_begins(db: asyncpg.Connection, name: str) -> None:
    plan, found = await late_page(db, statement(name))
    assert found == 100
    assert plan.strays("campaigns", "campaigns_pkey") == []
    assert plan.blocks <= recount_allowed(100, 100 * PROSPECTS)
    first = await explain(db, statement(name), "NULL, 100")
    assert int(first.top["Actual Rows"]) == 100


async def test_the_campaign_after_one_that_cannot_be_compared_is_found_in_the_index(db: asyncpg.Connection) -> None:
    start = await db.fetchval("SELECT id FROM campaigns ORDER BY id DESC OFFSET $1 LIMIT 1", LATE)
    for after in (f"'{start}'", "NULL"):
        plan = await explain(db, statement("sweep_next"), after)
        assert plan.strays("campaigns", "campaigns_pkey") == []
        assert sum(scan.rows for scan in plan.of("campaigns")) == 1
        assert plan.blocks <= NEXT_ALLOWED


async def test_control_a_page_that_begins_with_or_reads_all_that_is_before_it(db: asyncpg.Connection) -> None:
    page = "SELECT * FROM campaigns WHERE $1::uuid IS NULL OR id > $1::uuid ORDER BY id LIMIT $2::bigint"
    plan, found = await late_page(db, page)
    assert found == 100
    assert plan.blocks > recount_allowed(100, 100 * PROSPECTS)
    single, found = await late_page(db, page.replace("SELECT *", "SELECT id"), campaigns=1)
    assert found == 1
    assert single.blocks > NEXT_ALLOWED
