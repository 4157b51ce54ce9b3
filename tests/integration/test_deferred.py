"""Deferred work, outbox and sweep on the real database."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from uuid import UUID, uuid4

import asyncpg
import pytest
from prometheus_client import CollectorRegistry
from structlog.testing import capture_logs

from consumer.broker import ACKNOWLEDGED, Sent
from consumer.database import Database
from consumer.deferred import DeferredWorker
from consumer.envelope import Cause, SyncRequest
from consumer.errors import Unavailable
from consumer.generation import Work
from consumer.guard import Limits
from consumer.health import Health
from consumer.metrics import Metrics
from consumer.outcome import Deferral, OutboxRow, Outcome
from consumer.reconcile import Sweep
from consumer.recount import Rules, recount_campaigns
from consumer.relay import Relay
from schemas.events import PAUSED, STATS_UPDATED, Trigger
from tests.world import REFERENCE, add_campaign, expected_stats, stats_of


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    pool = Database(database_url, size=10)
    await pool.open()
    yield pool
    await pool.close(5)


@pytest.fixture
def metrics() -> Metrics:
    return Metrics(CollectorRegistry())


@pytest.fixture
def worker(database: Database, metrics: Metrics) -> DeferredWorker:
    return DeferredWorker(database, Rules(Limits()), metrics, Health(), wake_relay=lambda: None)


def request(campaign_id: UUID, name: str) -> SyncRequest:
    return SyncRequest(campaign_id, None, "crm", Cause(name, name))


async def put_off(database: Database, *deferrals: Deferral) -> None:
    async with database.transaction() as transaction:
        await transaction.save(Outcome(deferrals=list(deferrals)))


async def test_rows_of_one_campaign_are_taken_together_and_become_one(
    database: Database, worker: DeferredWorker, db: asyncpg.Connection
) -> None:
    campaign_id = await add_campaign(db, REFERENCE)
    await put_off(
        database,
        Deferral(Work(campaign_id, Trigger.RECONCILIATION), "sweep", 0),
        Deferral(Work(campaign_id, Trigger.STATUS_CHANGED, hint=Cause("hint-1", "c")), "locked", 0),
        Deferral(Work(campaign_id, Trigger.SYNC_REQUESTED, requests=(request(campaign_id, "r1"),)), "locked", 0),
        Deferral(Work(campaign_id, Trigger.STATUS_CHANGED, hint=Cause("later", "c")), "locked", 3600),
    )
    assert await worker.turn()
    events = await db.fetch("SELECT convert_from(event, 'UTF8')::jsonb AS event FROM campaign_stats.outbox ORDER BY id")
    assert [row["event"]["causationid"] for row in events] == ["hint-1", "r1"]
    assert {row["event"]["data"]["trigger"] for row in events} == {"sync_requested"}
    assert await db.fetchval("SELECT hint ->> 'id' FROM campaign_stats.deferred") == "later"
    assert not await worker.turn()


async def test_the_sweeps_rows_come_last_and_nothing_waits_behind_them(
    database: Database, db: asyncpg.Connection
) -> None:
    campaigns = [uuid4() for _ in range(5)]
    await put_off(
        database,
        *(Deferral(Work(one, Trigger.RECONCILIATION), "sweep", -10) for one in campaigns[:4]),
        Deferral(Work(campaigns[4], Trigger.STATUS_CHANGED), "locked", -1),
    )
    taken = []
    for _ in campaigns:
        async with database.transaction() as transaction:
            [row] = await transaction.take_deferred()
            taken.append(row.campaign_id)
    assert taken[0] == campaigns[4]
    assert sorted(taken[1:]) == sorted(campaigns[:4])


async def test_four_workers_take_every_row_exactly_once_without_waiting(
    database: Database, db: asyncpg.Connection
) -> None:
    campaigns = [uuid4() for _ in range(60)]
    await put_off(
        database,
        *(
            Deferral(Work(one, Trigger.STATUS_CHANGED, hint=Cause(f"{n}", "")), "alone", 0)
            for n in range(5)
            for one in campaigns
        ),
    )
    taken: list[str] = []

    async def work() -> None:
        while True:
            async with database.transaction() as transaction:
                rows = await transaction.take_deferred()
                taken.extend(f"{row.campaign_id}{row.hint and row.hint.id}" for row in rows)
                await asyncio.sleep(0.001)
            if not rows and not await db_count():
                return

    async def db_count() -> int:
        async with database.connection() as connection:
            count: int = await connection.fetchval("SELECT count(*) FROM campaign_stats.deferred")
            return count

    async with asyncio.timeout(30):  # a deadlock would be reported by the server, a wait would show here
        await asyncio.gather(*(work() for _ in range(4)))
    assert len(taken) == len(set(taken)) == 300


async def test_a_huge_campaign_cools_down_four_times_its_recount(
    database: Database, worker: DeferredWorker, db: asyncpg.Connection
) -> None:
    campaign_id = await add_campaign(db, {"pending": 20_001})
    work = Work(campaign_id, Trigger.STATUS_CHANGED)
    async with database.transaction() as transaction:
        await recount_campaigns(transaction, [work], "chunk", Rules(Limits()))  # its size is not known yet
    cooldown = await db.fetchval(
        "SELECT extract(epoch FROM next_recount_at - touched_at)::float8 FROM campaign_stats.campaign_state"
    )
    assert cooldown > 0
    await db.execute("UPDATE campaign_stats.campaign_state SET next_recount_at = now() + interval '1 hour'")
    async with database.transaction() as transaction:
        outcome = await recount_campaigns(transaction, [work], "chunk", Rules(Limits()))
    assert [(deferral.reason, deferral.delay_s > 3500) for deferral in outcome.deferrals] == [("huge", True)]
    await db.execute("UPDATE campaign_stats.deferred SET not_before = now()")
    assert await worker.turn()  # taken too early: it just goes back
    assert await db.fetchval("SELECT not_before > now() + interval '50 minutes' FROM campaign_stats.deferred")
    await db.execute("UPDATE campaign_stats.deferred SET not_before = now()")
    await db.execute("UPDATE campaign_stats.campaign_state SET next_recount_at = now()")
    await db.execute(
        "UPDATE campaign_prospects SET status = 'sent' WHERE ctid = (SELECT min(ctid) FROM campaign_prospects)"
    )
    assert await worker.turn()
    assert await db.fetchval("SELECT count(*) FROM campaign_stats.deferred") == 0
    assert (await stats_of(db, campaign_id))["sent"] == 1


async def test_a_failing_campaign_backs_off_and_is_answered_failed_once_at_the_fifth_failure(
    database: Database, worker: DeferredWorker, db: asyncpg.Connection
) -> None:
    campaign_id = await add_campaign(db, REFERENCE)
    await db.execute(
        """CREATE FUNCTION poison() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'no'; END $$;
           CREATE TRIGGER poison BEFORE UPDATE ON campaigns FOR EACH ROW EXECUTE FUNCTION poison()"""
    )
    work = Work(campaign_id, Trigger.SYNC_REQUESTED, requests=(request(campaign_id, "r1"),))
    await put_off(database, Deferral(work, "alone", 0))
    waits = []
    for failure in range(1, 7):
        await db.execute("UPDATE campaign_stats.deferred SET not_before = now()")
        await db.execute("UPDATE campaign_stats.campaign_state SET retry_at = now()")
        assert await worker.turn()
        state = await db.fetchrow("SELECT failures, retry_at - touched_at AS wait FROM campaign_stats.campaign_state")
        assert state is not None
        assert state["failures"] == failure
        waits.append(round(state["wait"].total_seconds()))
        assert await db.fetchval("SELECT count(*) FROM campaign_stats.outbox") == (1 if failure >= 5 else 0)
    assert waits == [1, 2, 4, 8, 16, 32]
    again = Work(campaign_id, Trigger.SYNC_REQUESTED, requests=(request(campaign_id, "r2"),))
    async with database.transaction() as transaction:  # from then on new ones at once
        outcome = await recount_campaigns(transaction, [again], "chunk", Rules(Limits()))
    assert outcome.told == {"campaign.sync_rejected.v1": 1}
    assert outcome.hurried == [campaign_id]
    await db.execute("DROP TRIGGER poison ON campaigns")
    await db.execute("UPDATE campaign_stats.campaign_state SET retry_at = now()")
    await db.execute("UPDATE campaign_stats.deferred SET not_before = now()")
    assert await worker.turn()
    assert await stats_of(db, campaign_id) == expected_stats(REFERENCE)
    assert await db.fetchval("SELECT failures FROM campaign_stats.campaign_state") == 0
    assert await db.fetchval("SELECT count(*) FROM campaign_stats.deferred") == 0


class Bus:
    """The edge to Kafka: acknowledges, fails or refuses as told; `closed` are types."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []
        self.refuse: set[bytes] = set()
        self.closed: set[str] = set()
        self.away = False

    async def __call__(self, rows: Sequence[tuple[str, UUID, bytes]]) -> list[Sent]:
        if self.away:
            raise Unavailable("kafka", "away")
        results = [self._result(event_type, event) for event_type, _, event in rows]
        self.sent.extend(event for (_, _, event), sent in zip(rows, results, strict=True) if sent is ACKNOWLEDGED)
        return results

    def _result(self, event_type: str, event: bytes) -> Sent:
        if event_type in self.closed:
            return Sent("no such topic", closed=True)
        return Sent("too large", refused=True) if event in self.refuse else ACKNOWLEDGED


async def fill(database: Database, campaign_id: UUID, *events: bytes, type: str = STATS_UPDATED) -> None:
    async with database.transaction() as transaction:
        rows = [OutboxRow(campaign_id, type, event) for event in events]
        await transaction.save(Outcome(outbox=rows))


async def test_a_row_that_can_never_be_sent_is_set_aside_and_its_neighbours_go_out(
    database: Database, metrics: Metrics, db: asyncpg.Connection
) -> None:
    bus, campaign_id = Bus(), uuid4()
    await fill(database, campaign_id, b"1", b"big", b"2")
    bus.refuse = {b"big"}
    relay = Relay(database, bus, metrics, Health())
    assert await relay.turn() == 3
    assert bus.sent == [b"1", b"2"]
    [row] = await db.fetch("SELECT event, error FROM campaign_stats.outbox")
    assert (row["event"], row["error"]) == (b"big", "too large")


async def test_an_outage_keeps_every_row_and_order(
    database: Database, metrics: Metrics, db: asyncpg.Connection
) -> None:
    bus, campaign_id = Bus(), uuid4()
    relay = Relay(database, bus, metrics, Health())
    bus.away = True
    await fill(database, campaign_id, *(b"%d" % number for number in range(10)))
    with pytest.raises(Unavailable):
        await relay.turn()
    assert await db.fetchval("SELECT count(*) FROM campaign_stats.outbox") == 10
    bus.away = False
    while await relay.turn():
        pass
    assert bus.sent == [b"%d" % number for number in range(10)]
    assert await db.fetchval("SELECT count(*) FROM campaign_stats.outbox") == 0


async def test_a_row_committed_late_under_a_low_id_is_still_published(
    database: Database, database_url: str, metrics: Metrics, db: asyncpg.Connection
) -> None:
    bus = Bus()
    relay = Relay(database, bus, metrics, Health())
    slow = await asyncpg.connect(database_url)
    transaction = slow.transaction()
    await transaction.start()
    insert = (
        "INSERT INTO campaign_stats.outbox (shard, campaign_id, type, event) VALUES (1, $1, 'campaign.paused.v1', $2)"
    )
    await slow.execute(insert, uuid4(), b"early id, late commit")
    await db.execute(insert, uuid4(), b"late id, early commit")
    assert await relay.turn() == 1
    await transaction.commit()
    await slow.close()
    assert await relay.turn() == 1
    assert bus.sent == [b"late id, early commit", b"early id, late commit"]


async def test_a_held_type_is_released_when_another_relay_has_sent_all_that_can_be_sent_of_it(
    database: Database, metrics: Metrics, db: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("consumer.health.FIRST_BACKOFF_S", 0.0)
    bus, other_bus, health, campaign_id = Bus(), Bus(), Health(), uuid4()
    relay, other = Relay(database, bus, metrics, health), Relay(database, other_bus, metrics, Health())
    bus.closed, other_bus.refuse = {PAUSED}, {b"big"}
    await fill(database, campaign_id, b"1", b"big", type=PAUSED)
    await relay.turn()
    assert health.degraded == ["relay"]
    async with database.transaction() as transaction:
        assert await transaction.lock_shards()
        assert await relay.turn() == 0
        assert health.degraded == ["relay"]  # it is there, and somebody else has it
    assert await other.turn() == 2
    assert await db.fetchval("SELECT count(*) FROM campaign_stats.outbox") == 1  # set aside: waits for nobody
    assert await relay.turn() == 0
    assert health.degraded == []


async def test_one_sweep_at_a_time_goes_on_where_it_was(
    database: Database, metrics: Metrics, db: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("consumer.reconcile.PAGE_CAMPAIGNS", 4)
    campaigns = sorted([await add_campaign(db, {"sent": 1}) for _ in range(10)])
    sweep = Sweep(database, Limits(), metrics, Health(), interval_s=3600, grace_s=60, retention_days=90)
    async with database.transaction() as transaction:
        assert await transaction.sweep_turn() is not None
        assert not await sweep.page()  # somebody else holds the cursor
    for expected in (4, 8, 10):
        assert await sweep.page()
        rows = await db.fetch("SELECT campaign_id FROM campaign_stats.deferred ORDER BY campaign_id")
        assert [row["campaign_id"] for row in rows] == campaigns[:expected]
    assert not await sweep.page()  # the lap is over, the next is due in an hour
    assert await db.fetchval("SELECT min(not_before) > now() + interval '50 seconds' FROM campaign_stats.deferred")
    assert await db.fetchval("SELECT lap_finished IS NOT NULL FROM campaign_stats.sweep")


async def test_the_sweep_leaves_out_a_campaign_whose_rows_cannot_be_read_and_compares_all_others(
    database: Database, metrics: Metrics, db: asyncpg.Connection
) -> None:
    campaigns = sorted([await add_campaign(db, REFERENCE, stats={"total": 1}) for _ in range(5)])
    damaged = campaigns.pop(2)
    await db.execute(
        f"""ALTER FUNCTION campaign_stats.count_prospects(uuid) RENAME TO count_readable;
            CREATE FUNCTION campaign_stats.count_prospects(campaign uuid)
            RETURNS TABLE (counts jsonb, stats jsonb, total bigint) LANGUAGE plpgsql STABLE AS $$
            BEGIN
                IF campaign = '{damaged}' THEN
                    RAISE EXCEPTION 'invalid page in block 7' USING ERRCODE = 'XX001';
                END IF;
                RETURN QUERY SELECT * FROM campaign_stats.count_readable(campaign);
            END $$"""
    )
    sweep = Sweep(database, Limits(), metrics, Health(), interval_s=3600, grace_s=0, retention_days=90)
    pages = 0
    with capture_logs() as logs:
        while await sweep.page():
            pages += 1
            assert pages < 50
    rows = await db.fetch("SELECT campaign_id FROM campaign_stats.deferred ORDER BY campaign_id")
    assert [row["campaign_id"] for row in rows] == campaigns
    assert await db.fetchval("SELECT after_id IS NULL AND lap_finished IS NOT NULL FROM campaign_stats.sweep")
    assert [(line["campaign"], line["sqlstate"]) for line in logs if line["log_level"] == "error"] == [
        (str(damaged), "XX001")
    ]


async def test_drift_is_counted_only_when_nobody_recounted_meanwhile(
    database: Database, worker: DeferredWorker, metrics: Metrics, db: asyncpg.Connection
) -> None:
    drifted = await add_campaign(db, REFERENCE, stats={"total": 1})
    recounted = await add_campaign(db, REFERENCE, stats={"total": 1})
    sweep = Sweep(database, Limits(), metrics, Health(), interval_s=3600, grace_s=0, retention_days=90)
    assert await sweep.page()
    async with database.transaction() as transaction:
        await recount_campaigns(transaction, [Work(recounted, Trigger.STATUS_CHANGED)], "chunk", Rules(Limits()))
    await db.execute("UPDATE campaigns SET stats = '{}' WHERE id = $1", recounted)  # wrong again, but freshly
    assert await worker.turn()
    assert await worker.turn()
    assert metrics.registry.get_sample_value("campaign_stats_drift_found_total") == 1
    rows = await db.fetch(
        "SELECT campaign_id, convert_from(event, 'UTF8')::jsonb -> 'data' AS data FROM campaign_stats.outbox"
    )
    told = {row["campaign_id"]: row["data"].get("drift") for row in rows if row["data"]["trigger"] == "reconciliation"}
    assert told == {drifted: {"total": 119, "sent": 34, "replied": 4, "bounced": 1}}
    assert await stats_of(db, recounted) == expected_stats(REFERENCE)


async def test_retention_forgets_old_audit_and_the_state_of_deleted_campaigns_only(
    database: Database, db: asyncpg.Connection
) -> None:
    kept, gone = await add_campaign(db), uuid4()
    await db.executemany(
        "INSERT INTO campaign_stats.campaign_state (campaign_id, touched_at) VALUES ($1, now() - interval '91 days')",
        [(kept,), (gone,)],
    )
    assert await database.forget(92) == 0
    assert await database.forget(90) == 1
    assert await db.fetchval("SELECT campaign_id FROM campaign_stats.campaign_state") == kept
