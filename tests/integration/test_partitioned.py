"""The product's tables partitioned by campaign: `migrate`, and each statement tells what it tells on plain ones."""

import asyncio
import json
import re
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, is_dataclass
from datetime import datetime
from typing import Any, Final
from uuid import UUID, uuid4

import asyncpg
import msgspec
import pytest
from prometheus_client import CollectorRegistry

from consumer import migrations
from consumer.database import SESSION, Database, statement
from consumer.deferred import DeferredWorker
from consumer.demo.servers import Postgres
from consumer.doctor.database import examine_connection
from consumer.errors import Unavailable
from consumer.generation import Work
from consumer.guard import Limits
from consumer.health import Health
from consumer.metrics import Metrics
from consumer.reconcile import Sweep
from consumer.recount import Rules, recount_campaigns
from schemas.events import Trigger
from tests.benchmarks.adopt import CATALOG
from tests.benchmarks.partitioned import Shape, reference
from tests.conftest import eventually
from tests.integration.test_adoption import MARGIN_S, see_tries, transaction_of_somebody, waits_for_a_lock, writing
from tests.integration.test_plans import Plan, Who, inside, undone, windows_of
from tests.servers import REPOSITORY
from tests.world import USER

PARTITIONS: Final = 8
INDEXES: Final = ("campaign_prospects_by_campaign_and_status", "campaign_prospects_by_contact")

[LEAVING] = re.findall(r"```sql\n(.*?)```", (REPOSITORY / "deploy" / "scaling.md").read_text("utf-8"), re.DOTALL)


@pytest.fixture
async def product(empty_database_url: str) -> AsyncIterator[asyncpg.Connection]:
    """A connection to a database with the product's partitioned tables and nothing of ours."""
    connection = await connect(empty_database_url)
    await connection.execute(reference(Shape(PARTITIONS, PARTITIONS)))
    yield connection
    await connection.close()


async def connect(url: str) -> asyncpg.Connection:
    """jsonb comes as Python values."""
    connection = await asyncpg.connect(url)
    await connection.set_type_codec("jsonb", schema="pg_catalog", encoder=json.dumps, decoder=json.loads)
    return connection


async def parts(connection: asyncpg.Connection, index: str) -> list[tuple[str, bool]]:
    """The table and partitions that have this index, each with whether it is valid."""
    rows = await connection.fetch(
        """SELECT i.indrelid::regclass::text AS table, i.indisvalid
             FROM pg_partition_tree($1::text::regclass) t JOIN pg_index i ON i.indexrelid = t.relid ORDER BY 1""",
        index,
    )
    return [(row["table"], row["indisvalid"]) for row in rows]


def everywhere(table: str) -> list[tuple[str, bool]]:
    """What `parts` says of a complete index."""
    return sorted([(table, True), *((f"{table}_{number}", True) for number in range(PARTITIONS))])


async def test_migrate_builds_indexes_partition_by_partition_and_sets_options_on_partitions(
    product: asyncpg.Connection, empty_database_url: str
) -> None:
    assert await migrations.migrate(empty_database_url) == [migration.name for migration in migrations.released()]
    for index in INDEXES:
        assert await parts(product, index) == everywhere("campaign_prospects")
    options = await product.fetch(
        "SELECT relname, reloptions FROM pg_class WHERE relkind = 'r' AND relname ~ '^campaign(s|_prospects)_[0-9]'"
    )
    assert len(options) == 2 * PARTITIONS
    for row in options:
        assert f"fillfactor={90 if 'prospects' in row['relname'] else 70}" in row["reloptions"]
    assert await migrations.migrate(empty_database_url) == []
    found = await examine_connection(product, Limits(), api=True)
    assert [finding for _, findings in found for finding in findings] == []


async def test_partitions_that_come_later_have_the_indexes_and_the_trigger_but_not_the_options(
    product: asyncpg.Connection, empty_database_url: str
) -> None:
    await product.execute("DROP TABLE campaign_prospects_7")
    await migrations.migrate(empty_database_url)
    await product.execute(
        "CREATE TABLE campaign_prospects_7 PARTITION OF campaign_prospects"
        f" FOR VALUES WITH (MODULUS {PARTITIONS}, REMAINDER 7)"
    )
    for index in INDEXES:
        assert await parts(product, index) == everywhere("campaign_prospects")
    triggers = (
        "SELECT count(*) FROM pg_trigger WHERE tgrelid = 'campaign_prospects_7'::regclass AND tgname ~ 'contacted'"
    )
    assert await product.fetchval(triggers) == 2
    assert await product.fetchval("SELECT reloptions FROM pg_class WHERE relname = 'campaign_prospects_7'") is None


async def test_partitions_of_partitions_and_names_that_need_quotes(empty_database_url: str) -> None:
    connection = await connect(empty_database_url)
    await connection.execute(reference(Shape(1, 2)))
    await connection.execute(
        """DROP TABLE campaign_prospects_1;
           CREATE SCHEMA "More parts";
           CREATE TABLE "More parts"."The other half" PARTITION OF campaign_prospects
               FOR VALUES WITH (MODULUS 2, REMAINDER 1) PARTITION BY RANGE (id);
           CREATE TABLE "More parts".low PARTITION OF "More parts"."The other half"
               FOR VALUES FROM (MINVALUE) TO ('80000000-0000-0000-0000-000000000000');
           CREATE TABLE "More parts"."else" PARTITION OF "More parts"."The other half" DEFAULT"""
    )
    assert len(await migrations.migrate(empty_database_url)) == len(migrations.released())
    for index in INDEXES:
        assert [is_valid for _, is_valid in await parts(connection, index)] == [True] * 5
    assert await connection.fetchval("SELECT reloptions IS NOT NULL FROM pg_class WHERE relname = 'else'")
    assert await migrations.migrate(empty_database_url) == []
    await connection.close()


@pytest.fixture
def released(monkeypatch: pytest.MonkeyPatch) -> list[migrations.Migration]:
    """The released migrations, to be changed by a test."""
    found = migrations.released()
    monkeypatch.setattr(migrations, "released", lambda: found)
    return found


async def test_an_interrupted_build_is_gone_on_with(
    product: asyncpg.Connection, empty_database_url: str, released: list[migrations.Migration]
) -> None:
    [name, _], later = INDEXES, [migration for migration in released if migration.number > 3]
    del released[3:]
    await migrations.migrate(empty_database_url)
    oids = await product.fetch("SELECT oid FROM pg_class WHERE relname ~ '^campaign_prospects_[012]$' ORDER BY relname")
    first, second, third = [f"{name}_{row['oid']}" for row in oids]
    # The whole, one part done, one that is built but not a part yet, and half a one.
    await product.execute(f"CREATE INDEX {name} ON ONLY campaign_prospects (campaign_id, status)")
    await product.execute(f"CREATE INDEX {first} ON campaign_prospects_0 (campaign_id, status)")
    await product.execute(f"ALTER INDEX {name} ATTACH PARTITION {first}")
    await product.execute(f"CREATE INDEX {second} ON campaign_prospects_1 (campaign_id, status)")
    await product.execute(f"CREATE INDEX {third} ON campaign_prospects_2 (id)")
    await product.execute(f"UPDATE pg_index SET indisvalid = false WHERE indexrelid = '{third}'::regclass")
    kept = await product.fetch("SELECT $1::regclass::oid, $2::regclass::oid", first, second)
    released.extend(later)
    await migrations.migrate(empty_database_url)
    assert await parts(product, name) == everywhere("campaign_prospects")
    assert await product.fetch("SELECT $1::regclass::oid, $2::regclass::oid", first, second) == kept
    indexes = await product.fetchval("SELECT count(*) FROM pg_indexes WHERE tablename = 'campaign_prospects_2'")
    assert indexes == await product.fetchval("SELECT count(*) FROM pg_indexes WHERE tablename = 'campaign_prospects_3'")


async def test_a_long_transaction_holds_up_migrate_but_no_writer(
    product: asyncpg.Connection, empty_database_url: str, released: list[migrations.Migration]
) -> None:
    """The indexes' own locks: of the whole while it is made, of a part while it becomes one."""
    later = [migration for migration in released if migration.number > 3]
    del released[3:]
    await migrations.migrate(empty_database_url)
    released.extend(later)
    campaign_id = await product.fetchval(
        "INSERT INTO campaigns (user_id, type, name) VALUES (gen_random_uuid(), 'email', 'x') RETURNING id"
    )
    prospects = "INSERT INTO campaign_prospects (campaign_id, user_id) VALUES ($1, $1), ($1, $1) RETURNING id"
    held, moved = [row["id"] for row in await product.fetch(prospects, campaign_id)]
    write = "UPDATE campaign_prospects SET company = 'y' WHERE id = $1"
    async with writing(empty_database_url, moved) as writer:
        async with transaction_of_somebody(empty_database_url, write, held):
            running = asyncio.create_task(migrations.migrate(empty_database_url))
            await see_tries(product, 2)
            assert not running.done()
        await running
        assert len(writer.latencies) > 10
        assert writer.longest_s < migrations.LOCK_TIMEOUT_S + MARGIN_S
    assert await parts(product, INDEXES[0]) == everywhere("campaign_prospects")


LAST_BY_HAND: Final = {
    "created": f"""CREATE TABLE campaign_prospects_7 PARTITION OF campaign_prospects
                       FOR VALUES WITH (MODULUS {PARTITIONS}, REMAINDER 7)""",
    "attached": f"""CREATE TABLE campaign_prospects_7 (LIKE campaign_prospects INCLUDING DEFAULTS);
                    ALTER TABLE campaign_prospects ATTACH PARTITION campaign_prospects_7
                       FOR VALUES WITH (MODULUS {PARTITIONS}, REMAINDER 7)""",
}


@pytest.fixture
async def building(
    product: asyncpg.Connection, empty_database_url: str, released: list[migrations.Migration]
) -> list[migrations.Migration]:
    """The product lacks its last partition, and everything is migrated up to the first index on prospects."""
    await product.execute("DROP TABLE campaign_prospects_7")
    later = [migration for migration in released if migration.number > 3]
    del released[3:]
    await migrations.migrate(empty_database_url)
    released.extend(later)
    return later


@pytest.mark.parametrize("way", LAST_BY_HAND)
async def test_a_partition_that_comes_while_others_are_built_has_its_part_of_the_index(
    product: asyncpg.Connection, empty_database_url: str, building: list[migrations.Migration], way: str
) -> None:
    write = "LOCK TABLE campaign_prospects_0 IN ROW EXCLUSIVE MODE"
    async with transaction_of_somebody(empty_database_url, write):
        running = asyncio.create_task(migrations.migrate(empty_database_url))
        await eventually(lambda: waits_for_a_lock(product), "migrate waits for a writer")
        await product.execute(LAST_BY_HAND[way])
        assert (await parts(product, INDEXES[0]))[0] == ("campaign_prospects", False)
    assert await running == [migration.name for migration in building]
    for index in INDEXES:
        assert await parts(product, index) == everywhere("campaign_prospects")


@pytest.fixture
async def half_done(
    product: asyncpg.Connection,
    empty_database_url: str,
    building: list[migrations.Migration],
    monkeypatch: pytest.MonkeyPatch,
) -> list[str]:
    """What `migrate` still has to do: it failed, as the last partition came between its look and its first lock."""
    look = migrations._tree

    async def and_then(connection: asyncpg.Connection, table: str) -> list[asyncpg.Record]:
        found = await look(connection, table)
        await product.execute(LAST_BY_HAND["created"])
        return found

    with monkeypatch.context() as patched:
        patched.setattr(migrations, "_tree", and_then)
        with pytest.raises(Unavailable, match=r"got a partition while .* run `migrate` again"):
            await migrations.migrate(empty_database_url)
    assert await parts(product, INDEXES[0]) == [("campaign_prospects", False), *everywhere("campaign_prospects")[1:-1]]
    return [migration.name for migration in building]


async def test_a_partition_that_came_before_the_index_is_named_and_the_next_migrate_builds_its_part(
    product: asyncpg.Connection, empty_database_url: str, half_done: list[str]
) -> None:
    assert await migrations.pending(product) == half_done
    assert await migrations.migrate(empty_database_url) == half_done
    for index in INDEXES:
        assert await parts(product, index) == everywhere("campaign_prospects")


async def test_a_partition_that_came_and_went_leaves_nothing_that_migrate_cannot_finish(
    product: asyncpg.Connection, empty_database_url: str, half_done: list[str]
) -> None:
    await product.execute("DROP TABLE campaign_prospects_7")
    assert await migrations.migrate(empty_database_url) == half_done
    for index in INDEXES:
        assert await parts(product, index) == everywhere("campaign_prospects")[:-1]


async def test_the_way_out_leaves_nothing(product: asyncpg.Connection, empty_database_url: str) -> None:
    before = set(await product.fetch(CATALOG))
    await migrations.migrate(empty_database_url)
    await product.execute(LEAVING)
    assert set(await product.fetch(CATALOG)) == before
    assert len(await migrations.migrate(empty_database_url)) == len(migrations.released())


# The same world on plain tables and on partitioned ones


IDS: Final = [UUID(int=0x1000 + number * 0x0F0F0F0F0F0F0F0F0F0F0F0F0F0F0F0F % 2**120) for number in range(1, 41)]
CAMPAIGNS: Final = """
INSERT INTO campaigns (id, user_id, type, name, status, stats, created_at, updated_at)
SELECT id, CASE WHEN n % 5 = 0 THEN id ELSE $2 END, CASE WHEN n % 7 = 0 THEN 'linkedin' ELSE 'email' END,
       'Campaign ' || n,
       CASE n % 11 WHEN 3 THEN 'paused' WHEN 5 THEN 'draft' ELSE 'active' END,
       CASE WHEN n % 3 = 0 THEN '{"total": 7, "sent": "x"}' ELSE '{}' END::jsonb, '2020-01-01', '2020-01-01'
  FROM unnest($1::uuid[]) WITH ORDINALITY AS c (id, n)
"""
PROSPECTS: Final = """
INSERT INTO campaign_prospects (id, campaign_id, user_id, status, contacted_at)
SELECT md5(id || '/' || k)::uuid, id, id, s.status,
       CASE WHEN s.status <> 'pending' THEN '2020-02-01'::timestamptz + make_interval(mins => k) END
  FROM unnest($1::uuid[]) WITH ORDINALITY AS c (id, n), generate_series(1, (n * 37 % 260)::int) AS k,
       LATERAL (SELECT (ARRAY['pending', 'sent', 'sent', 'sent', 'replied', 'completed', 'cancelled', 'odd', 'sent',
                                     'sent'])[1 + (k * 7 + n) % 10] AS usual, k % (12 + n) = 0 AS is_bounced) AS u,
       LATERAL (SELECT CASE WHEN is_bounced THEN 'bounced' ELSE usual END AS status) AS s
"""


@pytest.fixture
async def two_worlds(any_postgres: Postgres) -> AsyncIterator[list[str]]:
    """Databases that hold the same: plain and partitioned."""
    admin = await asyncpg.connect(any_postgres.url())
    names = [f"t{uuid4().hex[:12]}" for _ in range(2)]
    for name, partitions in zip(names, (1, PARTITIONS), strict=True):
        await admin.execute(f"CREATE DATABASE {name}")
        connection = await asyncpg.connect(any_postgres.url(name))
        await connection.execute(reference(Shape(partitions, partitions)))
        await migrations.migrate(any_postgres.url(name))
        await connection.execute(CAMPAIGNS, IDS, USER)
        await connection.execute(PROSPECTS, IDS)
        await connection.execute("INSERT INTO campaign_stats.guard_limits VALUES ('user', $1, 'observe', 300)", IDS[9])
        await connection.execute(
            "INSERT INTO campaign_stats.campaign_state (campaign_id, failures, retry_at) VALUES ($1, 2, now() + '1h')",
            IDS[2],
        )
        await connection.execute(
            "INSERT INTO campaign_stats.campaign_state (campaign_id, last_total) VALUES ($1, 20001)", IDS[3]
        )
        await connection.close()
    yield [any_postgres.url(name) for name in names]
    for name in names:
        await admin.execute(f"DROP DATABASE {name} WITH (FORCE)")
    await admin.close()


def bare(value: Any) -> Any:
    """A value without what follows from the moment it was made: versions, ids, times (this world's are of 2020)."""
    if isinstance(value, msgspec.Struct):
        value = msgspec.structs.asdict(value)
    elif is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, dict):
        return {str(key): bare(value[key]) for key in value if key not in ("version", "id", "time", "causationid")}
    if isinstance(value, list | tuple):
        return [bare(one) for one in value]
    if isinstance(value, datetime):
        return value.isoformat() if value.year == 2020 else "a moment of the run"
    if isinstance(value, str) and re.match(r"20\d\d-\d\d-\d\dT", value):
        return value if value.startswith("2020") else "a moment of the run"
    return str(value) if isinstance(value, UUID) else value


async def everything(url: str) -> dict[str, Any]:
    """What the service's statements and engines tell and leave behind, one after the other."""
    told: dict[str, Any] = {}
    database, rules, metrics, health = Database(url, size=4), Rules(Limits()), Metrics(CollectorRegistry()), Health()
    await database.open()
    db = await connect(url)
    works = [Work(one, Trigger.STATUS_CHANGED) for one in [*IDS, uuid4()]]

    async def tables(*names: str) -> dict[str, Any]:
        return {
            name: bare([dict(row) for row in await db.fetch(f"SELECT * FROM {name} ORDER BY {order}")])
            for name, order in (one.split(":") for one in names)
        }

    told["drift"] = bare([dict(row) for row in await db.fetch(statement("drift_page"), None, 15)])
    lock = "SELECT 1 FROM campaigns WHERE id = $1 FOR NO KEY UPDATE"
    async with transaction_of_somebody(url, lock, IDS[5]), database.transaction() as transaction:
        outcome = await recount_campaigns(transaction, works, "chunk", rules)
    told["recounts"] = {str(key): bare(recount) for key, recount in sorted(outcome.recounts.items())}
    told["outcome"] = {name: bare(getattr(outcome, name)) for name in ("states", "decisions", "deferrals")}
    told["counted"] = (outcome.recounted, outcome.missing, outcome.verdicts, outcome.told, outcome.unknown_statuses)
    told["after a chunk"] = await tables(
        "campaigns:id",
        "campaign_stats.campaign_state:campaign_id",
        "campaign_stats.guard_decisions:id",
        "campaign_stats.deferred:reason, campaign_id",
    )
    outbox = await db.fetch("SELECT shard, campaign_id, type, event FROM campaign_stats.outbox ORDER BY id")
    told["outbox"] = [bare({**row, "event": json.loads(row["event"])}) for row in outbox]
    async with database.transaction() as transaction:
        windows = await transaction.windows([(one, 50, None) for one in IDS])
        told["windows"] = {str(key): bare(window) for key, window in sorted(windows.items())}
        told["pause"] = sorted(map(str, await transaction.pause(IDS[20:])))
        told["describe"] = bare((await transaction.describe(IDS[4])).campaign)
    async with database.connection() as connection:
        told["reconcile"] = await connection.fetchval(statement("reconcile"), IDS[:7], 0.0)
    told["why"] = bare([dict(row) for row in await db.fetch(statement("why"), IDS[6])])
    sweep = Sweep(database, Limits(), metrics, health, interval_s=300, grace_s=0.0, retention_days=90)
    assert await sweep.page()
    told["swept"] = await tables("campaign_stats.deferred:reason, campaign_id")
    worker = DeferredWorker(database, rules, metrics, health, wake_relay=lambda: None)
    while await worker.turn() or (await database.next_due_s() or 60) < 30:  # what was locked is due in a moment
        pass
    told["worked off"] = await tables("campaigns:id", "campaign_stats.deferred:reason, campaign_id")
    told["backlog"] = bare({"deferred": (await database.backlog()).deferred})
    await db.execute("DELETE FROM campaigns WHERE id = $1", IDS[0])
    told["forgotten"] = await database.forget(0)
    told["owner"] = [await database.owner(one) for one in IDS[:3]]
    told["the end"] = await tables("campaigns:id", "campaign_stats.campaign_state:campaign_id")
    await database.close(5)
    await db.close()
    return told


async def test_every_statement_tells_the_same_on_partitioned_tables(two_worlds: Sequence[str]) -> None:
    plain, partitioned = [await everything(url) for url in two_worlds]
    for step, told in plain.items():
        assert partitioned[step] == told, step
    held = [deferral["reason"] for deferral in plain["outcome"]["deferrals"]]
    assert sorted(held) == ["failing", "huge", "locked"]  # nothing of that was left out
    assert plain["counted"][:2] == (len(IDS) - 3, 1)
    left = {row["reason"] for row in plain["worked off"]["campaign_stats.deferred"]}
    assert left == {"failing"}
    assert {row["type"] for row in plain["outbox"]} == {"campaign.stats_updated.v1", "campaign.paused.v1"}


# Plans


@asynccontextmanager
async def many(url: str) -> AsyncIterator[asyncpg.Connection]:
    """A connection to partitioned tables with enough in them for an index to be worth it."""
    connection = await connect(url)
    await connection.execute(
        "INSERT INTO campaigns (id, user_id, type, name, status)"
        " SELECT md5(n::text)::uuid, gen_random_uuid(), 'email', n::text, 'active' FROM generate_series(1, 2000) AS n"
    )
    await connection.execute(
        "INSERT INTO campaign_prospects (id, campaign_id, user_id, status)"
        " SELECT md5(n || '/' || k)::uuid, md5(n::text)::uuid, md5('u')::uuid,"
        "        CASE k % 3 WHEN 0 THEN 'pending' ELSE 'sent' END"
        "   FROM generate_series(1, 2000) AS n, generate_series(1, 20) AS k"
    )
    await connection.execute("VACUUM (ANALYZE)")
    yield connection
    await connection.close()


async def test_each_campaign_is_counted_in_its_own_partition_only(
    product: asyncpg.Connection, empty_database_url: str
) -> None:
    await migrations.migrate(empty_database_url)
    async with many(empty_database_url) as db:
        await db.execute(f"SET jit = {SESSION['jit']}; SET plan_cache_mode = {SESSION['plan_cache_mode']}")
        rows = await db.fetch("SELECT id FROM campaigns ORDER BY md5(name) LIMIT 50")
        chunk = Who([row["id"] for row in rows], 50 * 20)
        write = (await inside(db))["write"]
        for query, values in (
            (write, f"{chunk.array}, now()"),
            (statement("guard_windows"), windows_of(chunk, 15, "NULL")),
        ):
            await db.execute(f"PREPARE probe AS {query}")
            async with undone(db):
                plan = Plan(await db.fetchval(f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) EXECUTE probe({values})"))
            await db.execute("DEALLOCATE probe")
            scans = [scan for scan in plan.scans if scan.table.startswith("campaign_prospects_")]
            assert {scan.kind for scan in scans} <= {"Index Scan", "Index Only Scan"}
            assert sum(scan.loops for scan in scans) == len(chunk.ids)  # not times the number of partitions
            assert sum(scan.rows for scan in scans) <= chunk.prospects
