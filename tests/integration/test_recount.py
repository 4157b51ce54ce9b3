"""The recount and its race, on real SQL."""

import asyncio
import contextlib
import json
import random
from collections.abc import Awaitable, Callable
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from consumer import migrations
from consumer.database import Database, statement
from consumer.deferred import DeferredWorker
from consumer.generation import Work
from consumer.guard import Limits
from consumer.health import Health
from consumer.metrics import Metrics
from consumer.recount import Rules, recount_campaigns
from schemas.events import Trigger
from tests.conftest import eventually
from tests.world import REFERENCE, add_campaign, add_prospects, expected_stats, stats_of, truth

ONE_STATEMENT = """
WITH locked AS MATERIALIZED (
    SELECT id FROM campaigns WHERE id = ANY ($1::uuid[]) ORDER BY id FOR NO KEY UPDATE
), counted AS (
    SELECT l.id, t.stats FROM locked l CROSS JOIN LATERAL campaign_stats.count_prospects(l.id) AS t
)
UPDATE campaigns c SET stats = counted.stats FROM counted WHERE c.id = counted.id
"""


async def recount(connection: asyncpg.Connection, *campaign_ids: UUID, caller: str = "chunk") -> dict[UUID, Any]:
    rows = await connection.fetch(
        "SELECT * FROM campaign_stats.recalculate_campaign_stats($1, $2)", campaign_ids, caller
    )
    return {row["campaign_id"]: row for row in rows}


async def overlapping_rounds(
    database_url: str, recounter: Callable[[asyncpg.Connection, UUID], Awaitable[None]], rounds: int
) -> int:
    """The product holds the row, three consumers recount meanwhile and nothing follows: how many rounds went stale.

    The product moves a prospect with its own function, every third time after a bulk import, every other time with the
    row locked first.
    """
    product, watcher, *consumers = [await asyncpg.connect(database_url) for _ in range(5)]
    for connection in (product, watcher, *consumers):
        await connection.set_type_codec("jsonb", schema="pg_catalog", encoder=json.dumps, decoder=json.loads)
    campaign_id = await add_campaign(product, {"pending": 400})
    await recounter(consumers[0], campaign_id)
    pending = [row["id"] for row in await product.fetch("SELECT id FROM campaign_prospects WHERE status = 'pending'")]
    dice, stale = random.Random(4), 0
    for number, prospect in enumerate(pending[:rounds]):

        async def move(number: int = number, prospect: UUID = prospect) -> None:
            async with product.transaction():
                if number % 2:
                    await product.execute("SELECT 1 FROM campaigns WHERE id = $1 FOR UPDATE", campaign_id)
                if number % 3 == 0:
                    # An import counts itself in, as the product's does.
                    await add_prospects(product, campaign_id, "pending", 20)
                    await product.execute(
                        "UPDATE campaigns SET stats = jsonb_set(stats, '{total}',"
                        " to_jsonb((stats ->> 'total')::int + 20)) WHERE id = $1",
                        campaign_id,
                    )
                await product.execute("SELECT update_prospect_with_stat($1, 'sent')", prospect)
                await asyncio.sleep(dice.uniform(0.002, 0.006))

        moving = asyncio.create_task(move())
        await asyncio.sleep(dice.uniform(0, 0.003))
        await asyncio.gather(*(recounter(consumer, campaign_id) for consumer in consumers))
        await moving
        stale += await stats_of(watcher, campaign_id) != expected_stats(await truth(watcher, campaign_id))
    for connection in (product, watcher, *consumers):
        await connection.close()
    return stale


async def test_an_overlapping_recount_never_undoes_the_products_change_unlike_the_control(database_url: str) -> None:
    async def two_statements(connection: asyncpg.Connection, campaign_id: UUID) -> None:
        while (await recount(connection, campaign_id))[campaign_id]["held"] is not None:
            await asyncio.sleep(0.001)

    async def one_statement(connection: asyncpg.Connection, campaign_id: UUID) -> None:
        # Two of the control's statements can also lock each other out (3 of 4 525 did, none of the product's). Rolled
        # back, the loser changed nothing.
        with contextlib.suppress(asyncpg.DeadlockDetectedError):
            await connection.execute(ONE_STATEMENT, [campaign_id])

    assert await overlapping_rounds(database_url, one_statement, 60) > 0, "the control must go stale"
    assert await overlapping_rounds(database_url, two_statements, 60) == 0


async def test_under_a_hammer_of_writers_locks_consumers_and_workers_every_count_ends_right(
    database_url: str, db: asyncpg.Connection
) -> None:
    campaigns = [await add_campaign(db, {"pending": 60}) for _ in range(6)]
    database, rules, metrics = Database(database_url, size=12), Rules(Limits()), Metrics(CollectorRegistry())
    await database.open()
    workers = [DeferredWorker(database, rules, metrics, Health(), wake_relay=lambda: None) for _ in range(2)]
    hints: asyncio.Queue[UUID | None] = asyncio.Queue()
    dice = random.Random(11)

    async def product() -> None:
        async with database.connection() as connection:
            for _ in range(40):
                campaign_id = dice.choice(campaigns)
                async with connection.transaction():
                    prospect = await connection.fetchval(
                        "SELECT id FROM campaign_prospects WHERE campaign_id = $1 AND status = 'pending'"
                        " ORDER BY random() LIMIT 1 FOR UPDATE SKIP LOCKED",
                        campaign_id,
                    )
                    if prospect is not None:
                        status = dice.choice(("sent", "replied", "bounced"))
                        await connection.execute("SELECT update_prospect_with_stat($1, $2)", prospect, status)
                    await asyncio.sleep(dice.uniform(0, 0.004))
                hints.put_nowait(campaign_id)

    async def imports() -> None:
        async with database.connection() as connection:
            for _ in range(15):
                campaign_id = dice.choice(campaigns)
                await connection.execute(
                    "INSERT INTO campaign_prospects (campaign_id, user_id, status)"
                    " SELECT $1, $1, 'pending' FROM generate_series(1, 40)",
                    campaign_id,
                )
                hints.put_nowait(campaign_id)
                await asyncio.sleep(dice.uniform(0, 0.01))

    async def row_locks() -> None:
        async with database.connection() as connection:
            for _ in range(20):
                async with connection.transaction():
                    await connection.execute("SELECT 1 FROM campaigns WHERE id = $1 FOR UPDATE", dice.choice(campaigns))
                    await asyncio.sleep(dice.uniform(0, 0.01))

    async def consumer() -> None:
        while (campaign_id := await hints.get()) is not None:
            dirty = {campaign_id}
            while not hints.empty() and len(dirty) < 4:
                if (another := hints.get_nowait()) is None:
                    hints.put_nowait(None)
                    break
                dirty.add(another)
            async with database.transaction() as transaction:
                works = [Work(one, Trigger.STATUS_CHANGED) for one in dirty]
                await recount_campaigns(transaction, works, "chunk", rules)

    async def work_off(worker: DeferredWorker, done: asyncio.Event) -> None:
        while not done.is_set():
            if not await worker.turn():
                await asyncio.sleep(0.005)

    done = asyncio.Event()
    background = [asyncio.create_task(work_off(worker, done)) for worker in workers]
    consumers = [asyncio.create_task(consumer()) for _ in range(3)]
    await asyncio.gather(product(), product(), product(), imports(), row_locks())
    for _ in consumers:
        hints.put_nowait(None)
    await asyncio.gather(*consumers)
    deferred = "SELECT count(*) = 0 FROM campaign_stats.deferred"
    await eventually(lambda: db.fetchval(deferred), "everything deferred is worked off")
    done.set()
    await asyncio.gather(*background)
    await database.close(5)
    for campaign_id in campaigns:
        assert await stats_of(db, campaign_id) == expected_stats(await truth(db, campaign_id))
    assert metrics.registry.get_sample_value("campaign_stats_recounts_total", {"caller": "worker"}), (
        "nothing was locked"
    )


statuses = st.sampled_from(
    ["pending", "sent", "connection_sent", "connected", "message_sent", "replied", "bounced", "completed", "timed_out",
     "cancelled", "weird", ""]
)  # fmt: skip
garbage = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text("ab"),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(["total", "sent", "x"]), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


def difference(expected: dict[str, int], stored: Any) -> dict[str, int]:
    """Truth minus stored by the words of the design: absent is 0, and what is no integer is 0."""
    found: dict[str, int] = {}
    for key in ("total", "sent", "replied", "bounced", "completed", "timed_out", "connection_sent", "connected",
                "message_sent"):  # fmt: skip
        value = stored.get(key, 0) if isinstance(stored, dict) else 0
        is_whole = isinstance(value, int | float) and not isinstance(value, bool) and value == int(value)
        before = int(value) if is_whole and abs(value) < 2**53 else 0
        if expected.get(key, 0) != before:
            found[key] = expected.get(key, 0) - before
    return found


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(counts=st.dictionaries(statuses, st.integers(1, 5), max_size=6), stored=garbage)
def test_sql_counts_equal_a_naive_recount_whatever_was_stored(
    database_url: str, counts: dict[str, int], stored: Any
) -> None:
    async def check() -> None:
        connection = await asyncpg.connect(database_url)
        try:
            await connection.set_type_codec("jsonb", schema="pg_catalog", encoder=json.dumps, decoder=json.loads)
            campaign_id = await add_campaign(connection, counts)
            await connection.execute(
                "UPDATE campaigns SET stats = $2::text::jsonb WHERE id = $1", campaign_id, json.dumps(stored)
            )
            row = (await recount(connection, campaign_id))[campaign_id]
            assert row["counts"] == await truth(connection, campaign_id)
            assert await stats_of(connection, campaign_id) == expected_stats(counts)
            assert row["drift"] == difference(expected_stats(counts), stored)
        finally:
            await connection.close()

    asyncio.run(check())


async def test_it_counts_on_every_postgresql_that_is_here(empty_database_url: str) -> None:
    await migrations.migrate(empty_database_url, reference_schema=True)
    connection = await asyncpg.connect(empty_database_url)
    await connection.set_type_codec("jsonb", schema="pg_catalog", encoder=json.dumps, decoder=json.loads)
    campaign_id = await add_campaign(connection, {**REFERENCE, "weird": 3})
    await recount(connection, campaign_id)
    assert await stats_of(connection, campaign_id) == expected_stats({**REFERENCE, "weird": 3})
    database = Database(empty_database_url)
    await database.open()
    bouncing = await add_campaign(connection, {"sent": 95, "bounced": 5})
    async with database.transaction() as transaction:
        await recount_campaigns(transaction, [Work(bouncing, Trigger.STATUS_CHANGED)], "chunk", Rules(Limits()))
    await database.close(5)
    assert await connection.fetchval("SELECT status FROM campaigns WHERE id = $1", bouncing) == "paused"
    await connection.close()


async def test_an_unchanged_recount_stamps_last_synced_at_only(db: asyncpg.Connection) -> None:
    campaign_id = await add_campaign(db, REFERENCE, stats={**expected_stats(REFERENCE), "completed": 0, "x": 1})
    future = await add_campaign(db, REFERENCE)
    await db.execute("UPDATE campaigns SET last_synced_at = now() + interval '1 day' WHERE id = $1", future)
    before = {row["id"]: row for row in await db.fetch("SELECT id, updated_at, last_synced_at FROM campaigns")}
    await recount(db, campaign_id, future)
    after = {row["id"]: row for row in await db.fetch("SELECT * FROM campaigns")}
    assert after[campaign_id]["updated_at"] == before[campaign_id]["updated_at"]  # explicit zeros are no change
    assert after[campaign_id]["last_synced_at"] is not None
    assert after[campaign_id]["stats"] == expected_stats(REFERENCE)
    assert after[future]["last_synced_at"] == before[future]["last_synced_at"]  # never backwards
    assert after[future]["updated_at"] > before[future]["updated_at"]


async def test_locked_failing_huge_and_later_ones_are_left_out(database_url: str, db: asyncpg.Connection) -> None:
    locked, failing, huge, big, bigger, plain = [await add_campaign(db, {"sent": 2}) for _ in range(6)]
    await db.executemany(
        "INSERT INTO campaign_stats.campaign_state (campaign_id, failures, last_total) VALUES ($1, $2, $3)",
        [(failing, 1, None), (huge, 0, 20_001), (big, 0, 20_000), (bigger, 0, 20_000)],
    )
    await db.execute("UPDATE campaign_stats.campaign_state SET retry_at = now() + interval '1 hour' WHERE failures > 0")
    other = await asyncpg.connect(database_url)
    async with other.transaction():
        await other.execute("SELECT 1 FROM campaigns WHERE id = $1 FOR NO KEY UPDATE", locked)
        rows = await recount(db, locked, failing, huge, big, bigger, plain, uuid4())
    await other.close()
    assert {key: row["held"] for key, row in rows.items()} == {
        locked: "locked", failing: "failing", huge: "huge", big: None, bigger: None, plain: None,
    }  # fmt: skip
    many = [await add_campaign(db) for _ in range(17)]
    await db.executemany(
        "INSERT INTO campaign_stats.campaign_state (campaign_id, last_total) VALUES ($1, 20000)",
        [(one,) for one in many],
    )
    rows = await recount(db, *many)
    assert [rows[one]["held"] for one in many] == [None] * 15 + ["later"] * 2  # 300 000 prospects a chunk
    assert (await recount(db, failing, caller="worker"))[failing]["held"] == "failing"  # not due
    assert (await recount(db, failing, caller="door"))[failing]["held"] is None
    assert (await recount(db, huge, caller="worker"))[huge]["held"] is None


PLANS = {
    "counting": ("SELECT * FROM campaign_stats.count_prospects($1::uuid)", "'{campaign}'", "by_campaign_and_status"),
    "window": (
        statement("guard_windows"),
        "ARRAY['{campaign}']::uuid[], ARRAY[500], ARRAY[NULL]::timestamptz[]",
        "campaign_prospects_by_contact",
    ),
    "window after a pause": (
        statement("guard_windows"),
        "ARRAY['{campaign}']::uuid[], ARRAY[500], ARRAY[now() - interval '1 hour']",
        "campaign_prospects_by_contact",
    ),
    "outbox": (statement("relay_read"), "ARRAY[1, 2, 3]::smallint[], 2000, 4000000", "outbox_pending"),
    "outbox, some types held back": (
        statement("relay_read_types"),
        "ARRAY[1, 2, 3]::smallint[], 200, 4000000, ARRAY['t', 'u']",
        "outbox_by_type",
    ),
    "outbox shards": (statement("relay_lock"), None, "outbox_pending"),
    "deferred": (statement("take_deferred"), None, "deferred_due"),
}


@pytest.mark.parametrize("name", PLANS)
async def test_hot_statements_stay_on_their_indexes(db: asyncpg.Connection, name: str) -> None:
    campaign_id = await add_campaign(db, {"pending": 2_000, "sent": 2_000, "bounced": 20})
    for _ in range(10):
        await add_campaign(db, {"pending": 500, "sent": 500})
    await db.execute(
        "INSERT INTO campaign_stats.outbox (shard, campaign_id, type, event)"
        " SELECT n % 32, gen_random_uuid(), 't', 'x' FROM generate_series(1, 20000) n"
    )
    await db.execute(
        "INSERT INTO campaign_stats.deferred (campaign_id, reason, not_before, trigger)"
        " SELECT gen_random_uuid(), 'sweep', now(), 'reconciliation' FROM generate_series(1, 20000)"
    )
    for table in ("campaign_prospects", "campaign_stats.outbox", "campaign_stats.deferred"):
        await db.execute(f"VACUUM ANALYZE {table}")
    query, arguments, index = PLANS[name]
    await db.execute("SET jit = off")
    await db.execute("SET plan_cache_mode = force_custom_plan")
    await db.execute(f"PREPARE hot AS {query}")
    values = f"({arguments.format(campaign=campaign_id)})" if arguments else ""
    plan = json.dumps(await db.fetchval(f"EXPLAIN (FORMAT JSON) EXECUTE hot{values}"))
    assert index in plan
    for table in ("campaign_prospects", "outbox", "deferred"):
        assert f'"Seq Scan", "Parallel Aware": false, "Async Capable": false, "Relation Name": "{table}"' not in plan
    if name == "counting":
        assert "Index Only Scan" in plan
