"""The bounce guard through the real SQL: every vector of design section 3, windows, modes, limits, failures."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import orjson
import pytest
from prometheus_client import CollectorRegistry

from consumer import questions
from consumer.database import Database, statement
from consumer.deferred import DeferredWorker
from consumer.generation import Work
from consumer.guard import Limits, Mode
from consumer.health import Health
from consumer.metrics import Metrics
from consumer.outcome import Outcome
from consumer.reconcile import Sweep
from consumer.recount import Rules, recount_campaigns
from schemas.events import Trigger
from tests.world import add_campaign, add_prospects, expected_stats, stats_of, truth


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    pool = Database(database_url)
    await pool.open()
    yield pool
    await pool.close(5)


async def recount(database: Database, *campaign_ids: UUID, limits: Limits | None = None) -> Outcome:
    async with database.transaction() as transaction:
        works = [Work(campaign_id, Trigger.STATUS_CHANGED) for campaign_id in campaign_ids]
        return await recount_campaigns(transaction, works, "chunk", Rules(limits or Limits()))


async def status_of(db: asyncpg.Connection, campaign_id: UUID) -> tuple[str, str | None]:
    row = await db.fetchrow("SELECT status, pause_reason FROM campaigns WHERE id = $1", campaign_id)
    assert row is not None
    return row["status"], row["pause_reason"]


async def outbox(db: asyncpg.Connection, campaign_id: UUID) -> list[dict[str, Any]]:
    rows = await db.fetch("SELECT event FROM campaign_stats.outbox WHERE campaign_id = $1 ORDER BY id", campaign_id)
    return [orjson.loads(row["event"]) for row in rows]


PAUSED, ACTIVE = ("paused", "bounce_rate"), ("active", None)
WINDOW_0 = Limits(window=0)


@pytest.mark.parametrize(
    ("contacted", "bounced", "limits", "expected"),
    [
        (99, 99, Limits(), ACTIVE),
        (100, 5, Limits(), PAUSED),
        (100, 4, Limits(), ACTIVE),
        (101, 5, Limits(), ACTIVE),
        (120, 6, Limits(), PAUSED),
        (121, 6, Limits(), ACTIVE),
        (500, 25, Limits(), PAUSED),
        (500, 24, Limits(), ACTIVE),
        (1000, 49, WINDOW_0, ACTIVE),
        (1000, 50, WINDOW_0, PAUSED),
    ],
)
async def test_vectors(
    database: Database,
    db: asyncpg.Connection,
    contacted: int,
    bounced: int,
    limits: Limits,
    expected: tuple[str, str | None],
) -> None:
    campaign_id = await add_campaign(db, {"pending": 10, "sent": contacted - bounced, "bounced": bounced})
    await recount(database, campaign_id, limits=limits)
    assert await status_of(db, campaign_id) == expected


@pytest.mark.parametrize(
    ("type_", "limits", "expected"),
    [
        ("email", Limits(), ACTIVE),
        ("email", WINDOW_0, PAUSED),
        ("linkedin", Limits(), ACTIVE),
        ("linkedin", WINDOW_0, ACTIVE),
    ],
)
async def test_bounces_among_the_oldest_count_only_in_the_endless_window(
    database: Database, db: asyncpg.Connection, type_: str, limits: Limits, expected: tuple[str, str | None]
) -> None:
    campaign_id = await add_campaign(db, {"sent": 440, "bounced": 60}, type=type_)
    await add_prospects(db, campaign_id, "sent", 500)
    await recount(database, campaign_id, limits=limits)
    assert await status_of(db, campaign_id) == expected


async def test_everybody_who_was_mailed_counts_whatever_became_of_them(
    database: Database, db: asyncpg.Connection
) -> None:
    blind = await add_campaign(db, {"sent": 40, "completed": 900, "bounced": 60})  # 6 %, not 60 / 40
    counts = {"sent": 20, "replied": 20, "completed": 20, "timed_out": 20, "bounced": 5}
    mixed = await add_campaign(db, {**counts, "cancelled": 300})  # cancelled alone was never mailed: S = 85
    mailed = await add_campaign(db, counts)
    ids = await add_prospects(db, mailed, "sent", 15)
    for prospect in ids:
        await db.execute("SELECT update_prospect_with_stat($1, 'cancelled')", prospect)  # mailed first: S = 100
    await recount(database, blind, mixed, mailed, limits=WINDOW_0)
    assert await status_of(db, blind) == PAUSED
    assert await status_of(db, mixed) == ACTIVE
    assert await status_of(db, mailed) == PAUSED


async def test_a_resumed_campaign_is_judged_again_at_its_100th_new_contact(
    database: Database, db: asyncpg.Connection
) -> None:
    campaign_id = await add_campaign(db, {"sent": 90, "bounced": 10})
    await recount(database, campaign_id)
    assert await status_of(db, campaign_id) == PAUSED
    await db.execute("UPDATE campaigns SET status = 'active', pause_reason = NULL WHERE id = $1", campaign_id)
    await recount(database, campaign_id)
    assert await status_of(db, campaign_id) == ACTIVE  # not paused again at once
    old = await db.fetchval("SELECT id FROM campaign_prospects WHERE status = 'sent' LIMIT 1")
    await db.execute("SELECT update_prospect_with_stat($1, 'bounced')", old)  # a late bounce of the old window
    await add_prospects(db, campaign_id, "sent", 94)
    await add_prospects(db, campaign_id, "bounced", 5)
    await recount(database, campaign_id)
    assert await status_of(db, campaign_id) == ACTIVE  # 99 new contacts
    assert (await stats_of(db, campaign_id))["bounced"] == 16
    await add_prospects(db, campaign_id, "sent", 1)
    await recount(database, campaign_id)
    assert await status_of(db, campaign_id) == PAUSED  # 5 of 100 new ones
    audit = await db.fetch(
        "SELECT sent, bounced, opened_at, oldest_contact, version FROM campaign_stats.guard_decisions"
    )
    assert [(row["sent"], row["bounced"]) for row in audit] == [(100, 10), (100, 5)]
    assert audit[0]["opened_at"] is None
    assert audit[1]["oldest_contact"] > audit[1]["opened_at"]
    pauses = [event for event in await outbox(db, campaign_id) if event["type"] == "campaign.paused.v1"]
    assert [event["data"]["version"] for event in pauses] == [row["version"] for row in audit]
    assert len({event["id"] for event in pauses}) == 2


@pytest.mark.parametrize("status", ["draft", "launching", "paused", "completed"])
async def test_only_active_campaigns_are_touched(database: Database, db: asyncpg.Connection, status: str) -> None:
    campaign_id = await add_campaign(db, {"sent": 50, "bounced": 50}, status=status)
    await db.execute("UPDATE campaigns SET pause_reason = 'mine' WHERE id = $1", campaign_id)
    await recount(database, campaign_id)
    assert await status_of(db, campaign_id) == (status, "mine")
    assert await stats_of(db, campaign_id) == expected_stats({"sent": 50, "bounced": 50})


async def test_pause_and_counts_and_events_share_one_version(database: Database, db: asyncpg.Connection) -> None:
    campaign_id = await add_campaign(db, {"pending": 7, "sent": 94, "bounced": 6})
    await recount(database, campaign_id)
    await recount(database, campaign_id)
    paused, news = await outbox(db, campaign_id)
    assert (paused["type"], news["type"]) == ("campaign.paused.v1", "campaign.stats_updated.v1")
    assert paused["data"]["version"] == news["data"]["version"]
    assert news["data"]["campaign"]["status"] == "paused"
    assert news["data"]["campaign"]["pause_reason"] == "bounce_rate"
    assert paused["data"] == {
        "campaign_id": str(campaign_id), "user_id": news["data"]["campaign"]["user_id"], "reason": "bounce_rate",
        "version": news["data"]["version"], "sent": 100, "bounced": 6, "rate_bp": 600, "threshold_bp": 500,
        "min_sent": 100, "window": 500, "previous_status": "active",
        "prospects_by_status": {"pending": 7, "sent": 94, "bounced": 6}, "pending": 7,
        "paused_at": paused["data"]["paused_at"],
    }  # fmt: skip
    assert datetime.fromisoformat(paused["data"]["paused_at"]) == await db.fetchval(
        "SELECT guard_paused_at FROM campaign_stats.campaign_state WHERE campaign_id = $1", campaign_id
    )


async def test_observe_notes_a_change_of_its_verdict_and_pauses_nobody(
    database: Database, db: asyncpg.Connection
) -> None:
    observe = Limits(mode=Mode.OBSERVE)
    campaign_id = await add_campaign(db, {"sent": 95, "bounced": 5})
    for _ in range(3):
        await recount(database, campaign_id, limits=observe)
    await add_prospects(db, campaign_id, "sent", 1)
    await recount(database, campaign_id, limits=observe)
    await recount(database, campaign_id, limits=observe)
    audit = await db.fetch("SELECT verdict, paused, version FROM campaign_stats.guard_decisions ORDER BY id")
    assert [tuple(row) for row in audit] == [("trip", False, None), ("below_rate", False, None)]
    assert await status_of(db, campaign_id) == ACTIVE


async def test_off_reads_no_window_and_writes_nothing(database: Database, db: asyncpg.Connection) -> None:
    campaign_id = await add_campaign(db, {"bounced": 500})
    outcome = await recount(database, campaign_id, limits=Limits(mode=Mode.OFF))
    assert not outcome.verdicts
    assert await status_of(db, campaign_id) == ACTIVE
    assert await db.fetchval("SELECT count(*) FROM campaign_stats.guard_decisions") == 0


async def test_limits_come_from_campaign_then_user_then_default_and_a_wrong_row_is_ignored(
    database: Database, db: asyncpg.Connection
) -> None:
    strict, lenient, wrong, switched_off = uuid4(), uuid4(), uuid4(), uuid4()
    counts = {"sent": 97, "bounced": 3}
    by_user = await add_campaign(db, counts, user_id=strict)
    by_campaign = await add_campaign(db, counts, user_id=strict)
    ignored = await add_campaign(db, {"sent": 95, "bounced": 5}, user_id=wrong)
    off = await add_campaign(db, {"sent": 5, "bounced": 95}, user_id=switched_off)
    tolerant = await add_campaign(db, {"sent": 95, "bounced": 5}, user_id=lenient)
    await db.executemany(
        "INSERT INTO campaign_stats.guard_limits (scope, id, mode, threshold_bp, min_sent, window_size)"
        " VALUES ($1, $2, $3, $4, $5, $6)",
        [
            ("user", strict, None, 300, None, None),
            ("campaign", by_campaign, None, 400, None, None),
            ("user", wrong, None, 10_001, None, None),
            ("campaign", ignored, None, None, 600, 500),  # a window smaller than min_sent
            ("user", switched_off, "off", None, None, None),
            ("user", lenient, None, 600, None, None),
        ],
    )
    await recount(database, by_user, by_campaign, ignored, off, tolerant)
    assert await status_of(db, by_user) == PAUSED
    assert await status_of(db, by_campaign) == ACTIVE
    assert await status_of(db, ignored) == PAUSED
    assert await status_of(db, off) == ACTIVE
    assert await status_of(db, tolerant) == ACTIVE
    origin = await db.fetchval("SELECT limits_from FROM campaign_stats.guard_decisions WHERE campaign_id = $1", by_user)
    assert origin == {"mode": "default", "threshold_bp": "user", "min_sent": "default", "window": "default"}


@asynccontextmanager
async def broken_guard(db: asyncpg.Connection) -> AsyncIterator[None]:
    """Pausing raises as long as this is open: a trigger of the product that says no."""
    await db.execute(
        """CREATE FUNCTION no_pause() RETURNS trigger LANGUAGE plpgsql AS
           $$ BEGIN IF NEW.status = 'paused' THEN RAISE EXCEPTION 'no'; END IF; RETURN NEW; END $$;
           CREATE TRIGGER no_pause BEFORE UPDATE ON campaigns FOR EACH ROW EXECUTE FUNCTION no_pause()"""
    )
    yield
    await db.execute("DROP TRIGGER no_pause ON campaigns; DROP FUNCTION no_pause()")


async def test_a_failing_guard_spoils_no_count_and_is_made_good_one_by_one(
    database: Database, db: asyncpg.Connection
) -> None:
    bouncing, fine = await add_campaign(db, {"sent": 95, "bounced": 5}), await add_campaign(db, {"sent": 3})
    worker = DeferredWorker(database, Rules(Limits()), Metrics(CollectorRegistry()), Health(), wake_relay=lambda: None)
    async with broken_guard(db):
        await recount(database, bouncing, fine)
        for campaign_id in (bouncing, fine):
            assert await stats_of(db, campaign_id) == expected_stats(await truth(db, campaign_id))
        assert await status_of(db, bouncing) == ACTIVE
        [row] = await db.fetch("SELECT campaign_id, reason, tries FROM campaign_stats.deferred")
        assert tuple(row) == (bouncing, "guard", 0)
        for tries in (1, 2):
            await db.execute("UPDATE campaign_stats.deferred SET not_before = now()")
            assert await worker.turn()
            [row] = await db.fetch("SELECT reason, tries, not_before - now() AS wait FROM campaign_stats.deferred")
            assert (row["reason"], row["tries"]) == ("guard", tries)
            assert timedelta(seconds=2**tries - 1) < row["wait"] <= timedelta(seconds=2**tries)
    await db.execute("UPDATE campaign_stats.deferred SET not_before = now()")
    assert await worker.turn()
    assert await status_of(db, bouncing) == PAUSED
    assert await db.fetchval("SELECT count(*) FROM campaign_stats.deferred") == 0


async def test_the_sweep_defers_what_the_guard_would_pause_after_a_limit_was_lowered(
    database: Database, db: asyncpg.Connection
) -> None:
    campaign_id = await add_campaign(db, {"sent": 97, "bounced": 3})
    await recount(database, campaign_id)
    sweep = Sweep(
        database, Limits(), Metrics(CollectorRegistry()), Health(), interval_s=0, grace_s=0, retention_days=90
    )
    assert await sweep.page()
    assert await db.fetchval("SELECT count(*) FROM campaign_stats.deferred") == 0  # nothing differs
    await db.execute(
        "INSERT INTO campaign_stats.guard_limits (scope, id, threshold_bp) VALUES ('campaign', $1, 300)", campaign_id
    )
    assert await sweep.page()
    [row] = await db.fetch("SELECT campaign_id, reason FROM campaign_stats.deferred")
    assert tuple(row) == (campaign_id, "sweep")


async def test_why_says_every_verdict_in_words_and_numbers(database: Database, db: asyncpg.Connection) -> None:
    few = await add_campaign(db, {"sent": 10, "bounced": 1})
    cases = {
        few: ("too_few_sent", "Too few to judge: 11 of the 100"),
        await add_campaign(db, {"sent": 196, "bounced": 4}): ("below_rate", "It can bear 5 more bounces"),
        await add_campaign(db, {"sent": 95, "bounced": 5}): ("trip", "the next recount pauses it"),
        await add_campaign(db, {"sent": 1}, type="linkedin"): ("not_email", "no email campaign"),
        await add_campaign(db, {"sent": 1}, status="draft"): ("not_active", "is draft, not active"),
    }
    for campaign_id, (verdict, words) in cases.items():
        explanation = await questions.why(db, campaign_id, Limits())
        assert explanation is not None
        assert explanation.document()["verdict"] == verdict
        assert words in explanation.words()
    explanation = await questions.why(db, few, Limits(mode=Mode.OFF))
    assert explanation is not None
    assert explanation.document()["verdict"] == "off"
    assert (explanation.document()["sent"], explanation.document()["bounced"]) == (11, 1)
    tripped = next(campaign_id for campaign_id, (verdict, _) in cases.items() if verdict == "trip")
    await recount(database, tripped)
    explanation = await questions.why(db, tripped, Limits())
    assert explanation is not None
    document = explanation.document()
    assert document["verdict"] == "not_active"
    last_pause = document["last_pause"]
    assert isinstance(last_pause, dict)
    assert (last_pause["sent"], last_pause["bounced"]) == (100, 5)
    assert "when 5 of 100 had bounced" in explanation.words()


async def test_the_latest_pauses_are_found_among_many_decisions_that_are_none(
    db: asyncpg.Connection, database_url: str
) -> None:
    await db.execute(
        """INSERT INTO campaign_stats.guard_decisions
                  (campaign_id, decided_at, mode, verdict, paused, sent, bounced, rate_bp, threshold_bp, min_sent,
                   window_size, limits_from)
           SELECT gen_random_uuid(), now() - make_interval(secs => n), 'observe', 'trip', n IN (19000, 19500), 200,
                  n % 200, 0, 500, 100, 500, '{}' FROM generate_series(1, 20000) AS n"""
    )
    await db.execute("ANALYZE campaign_stats.guard_decisions")
    await db.execute("SET plan_cache_mode = force_generic_plan")
    database = Database(database_url)
    await database.open()
    try:
        assert [pause.bounced for pause in await database.last_pauses(10)] == [0, 100], "the newest first"
    finally:
        await database.close(1.0)
    plan = "\n".join(row[0] for row in await db.fetch("EXPLAIN " + statement("last_pauses").replace("$1", "10")))
    assert "guard_decisions_paused" in plan, plan
