"""Whatever stands in the product's tables or happens to them: counted, healed, or deferred beside good neighbours."""

import asyncio
import hashlib
import json
from typing import Any
from uuid import UUID, uuid4

import aiohttp
import asyncpg
import pytest

from tests.conftest import Bus, RunningService, StartService, command, eventually
from tests.world import (
    REFERENCE,
    add_campaign,
    add_prospects,
    expected_stats,
    hint,
    stats_of,
    sync_request,
    truth,
)

GARBAGE = (
    '"text"', '""', "null", "true", "7", "[]", "[1, 2]", '[{"total": 120}]', '{"total": null}', '{"total": "120"}',
    '{"total": 120.5, "sent": 34.000001}', '{"total": true, "sent": [34], "replied": {"a": 4}}',
    '{"total": 1e400, "sent": -1e400}', '{"total": 1e20000}', '{"sent": 9223372036854775808}', '{"sent": -34}',
    '{"Total": 120, "sent ": 34, "": 1}', '{"total": 120, "sent": 1e-300}',
    '{"nested": ' + "[" * 3000 + "]" * 3000 + "}",
)  # fmt: skip
RIGHT = (
    '{"total": 120, "sent": 34, "replied": 4, "bounced": 1, "opened": 7, "pending": 81}',
    '{"total": 120.0, "sent": 34.00, "replied": 4e0, "bounced": 1, "completed": 0, "connected": 0}',
    '{"total": 120, "sent": 34, "replied": 4, "bounced": 1, "timed_out": "never"}',
)


async def news_of(bus: Bus, campaign_id: UUID) -> list[dict[str, Any]]:
    """The data of every stats_updated of this campaign."""
    found = await bus.events(bus.topics.prefix + "campaign.stats-updated")
    return [event["data"] for event in found if event["subject"] == str(campaign_id)]


async def told(bus: Bus, running: RunningService, *campaigns: UUID) -> None:
    """Wait until each of them was published."""

    async def are_told() -> bool:
        found = await bus.events(bus.topics.prefix + "campaign.stats-updated")
        return {event["subject"] for event in found} >= {str(one) for one in campaigns}

    await eventually(are_told, "all are told", running, timeout_s=30)


async def test_garbage_in_stats_is_drift_that_heals_and_unknown_keys_alone_are_none(
    service: StartService, environment: dict[str, str], bus: Bus, db: asyncpg.Connection
) -> None:
    wrong = [await add_campaign(db, REFERENCE) for _ in GARBAGE]
    right = [await add_campaign(db, REFERENCE) for _ in RIGHT]
    for campaign_id, stats in zip(wrong + right, GARBAGE + RIGHT, strict=True):
        await db.execute("UPDATE campaigns SET stats = $2::text::jsonb WHERE id = $1", campaign_id, stats)
    code, out, error = await command(environment, "drift", "--json")
    assert (code, error) == (1, "")
    assert out.count('"stored":') == len(wrong)
    assert f'"stored":{{"sent":-1{"0" * 400},"total":1{"0" * 400}}}' in out  # as it stands
    running = await service(sweep_interval_s=0.2)
    await told(bus, running, *wrong, *right)
    for campaign_id in wrong + right:
        assert await stats_of(db, campaign_id) == expected_stats(REFERENCE)
    for campaign_id, stats in zip(wrong, GARBAGE, strict=True):
        assert (await news_of(bus, campaign_id))[0]["drift"]["replied"] == 4, stats
    for campaign_id, stats in zip(right, RIGHT, strict=True):
        assert "drift" not in (await news_of(bus, campaign_id))[0], stats
    assert (await running.metrics())["campaign_stats_drift_found_total"] == len(wrong)
    assert (await command(environment, "drift"))[0] == 0


async def test_statuses_nobody_knows_count_in_total_and_by_status_and_are_logged_once(
    service: StartService, bus: Bus, db: asyncpg.Connection
) -> None:
    await db.execute("ALTER TABLE campaign_prospects ALTER COLUMN status DROP NOT NULL")
    strange = ["", " sent", "SENT", "x" * 10_000, "two\nlines\t\x01", "\U0001f600", 'a"b\\', "total", "{}", "opened"]
    campaign_id, second = await add_campaign(db, {"sent": 2, "replied": 1}), await add_campaign(db)
    for one in (campaign_id, second):
        for status in strange:
            await add_prospects(db, one, status, 2)
        await add_prospects(db, one, None, 3)  # type: ignore[arg-type]
    topic = bus.topics.prefix + "prospect.status-changed"
    running = await service()
    for number in range(3):
        await bus.publish(topic, hint(campaign_id), key="k")

        async def recounted(wanted: int = number + 1) -> bool:
            return (await running.metrics())['campaign_stats_recounts_total{caller="chunk"}'] == wanted

        await eventually(recounted, "counted again", running)
    await bus.publish(topic, hint(second), key="k")
    await told(bus, running, campaign_id, second)
    assert await stats_of(db, campaign_id) == {"total": 26, "sent": 2, "replied": 1, "bounced": 0}
    assert await stats_of(db, second) == {"total": 23, "sent": 0, "replied": 0, "bounced": 0}
    [data] = await news_of(bus, campaign_id)
    assert data["prospects_by_status"] == {"sent": 2, "replied": 1, "(null)": 3, **dict.fromkeys(strange, 2)}
    logged = [line["status"] for line in running.messages("unknown prospect status counted in total only")]
    assert sorted(logged) == sorted(["(null)", *(status[:64] for status in strange)])
    assert await db.fetchval("SELECT count(*) FROM campaign_stats.deferred") == 0


async def odd_campaigns(db: asyncpg.Connection) -> dict[str, UUID]:
    """What is odd -> a campaign that is so, each with two prospects sent."""
    await db.execute(
        """ALTER TABLE campaigns DROP CONSTRAINT campaigns_type_check, DROP CONSTRAINT campaigns_status_check,
               ALTER stop_on_reply DROP NOT NULL, ALTER open_tracking DROP NOT NULL,
               ALTER created_at DROP NOT NULL, ALTER updated_at DROP NOT NULL"""
    )
    changes = {
        "unicode": "name = E'\\U0001F600 \\u202E \\u0001 \\uFFFF \\n \" \\\\ <script>' || repeat('\u00e4', 100000)",
        "empty": "name = '', signature = '', pause_reason = ''",
        "nulls": """daily_limit = NULL, stop_on_reply = NULL, open_tracking = NULL, signature = NULL,
                    skip_other_campaigns = NULL, operating_hours = NULL, last_synced_at = NULL, pause_reason = NULL,
                    created_at = NULL, updated_at = NULL""",
        "negative": "daily_limit = -2147483648",
        "unknown": "type = 'carrier pigeon', status = E'on\\nhold', pause_reason = 'who knows'",
        "large integer": f"skip_other_campaigns = '[{2**70 + 1}]', operating_hours = '{{\"a b\": [{2**70 + 1}, 2]}}'",
        "large": """skip_other_campaigns = '{"a": 1e400, "b": -1.5e5000}', operating_hours = '1e400'""",
        "deep": f"skip_other_campaigns = '{'[' * 2000 + ']' * 2000}', operating_hours = '{'[' * 500 + ']' * 500}'",
        "infinity": "created_at = 'infinity', updated_at = '-infinity'",
        "bc": "created_at = '4713-01-01 00:00:00+00 BC', updated_at = '0044-03-15 12:00:00+00 BC'",
        "far": "created_at = '10000-01-01Z', updated_at = '294276-12-31Z', last_synced_at = '2020-01-01Z'",
        "synced bc": "last_synced_at = '0044-03-15 12:00:00+00 BC'",
        "synced far": "last_synced_at = '20000-01-01Z'",
    }
    odd = {}
    for what, change in changes.items():
        odd[what] = await add_campaign(db, {"sent": 2})
        await db.execute(f"UPDATE campaigns SET {change} WHERE id = '{odd[what]}'")
    return odd


@pytest.mark.parametrize("asked_by", ["hints", "sweep", "door"])
async def test_odd_rows_of_the_product_are_served_like_any_other(
    service: StartService, bus: Bus, db: asyncpg.Connection, asked_by: str
) -> None:
    odd = await odd_campaigns(db)
    neighbour = await add_campaign(db, REFERENCE)
    everybody = [*odd.values(), neighbour]
    tokens = json.dumps({hashlib.sha256(b"token").hexdigest(): "*"})
    running = await service(
        sweep_interval_s=0.2 if asked_by == "sweep" else 0, api_port=0, api_tokens=tokens, api_rate_per_minute=0
    )
    answers = {}
    if asked_by == "hints":
        for campaign_id in everybody:
            await bus.publish(bus.topics.prefix + "prospect.status-changed", hint(campaign_id), partition=0)
    elif asked_by == "door":
        async with aiohttp.ClientSession(headers={"Authorization": "Bearer token"}) as session:
            for what, campaign_id in [*odd.items(), ("neighbour", neighbour)]:
                url = f"http://127.0.0.1:{running.api_port}/api/campaigns/{campaign_id}/sync-stats"
                async with session.post(url) as response:
                    answers[what] = await response.text()
                    assert response.status == 200, (what, answers[what])

    async def all_counted() -> bool:
        return all([(await stats_of(db, one)).get("total") for one in everybody])

    await eventually(all_counted, "all are counted", running)
    assert await stats_of(db, neighbour) == expected_stats(REFERENCE)

    async def texts() -> dict[str, str]:
        records = await bus.read(bus.topics.prefix + "campaign.stats-updated")
        return {record.key.decode(): record.value.decode() for record in records}

    async def all_told() -> bool:
        return (await texts()).keys() == {str(one) for one in everybody}

    await eventually(all_told, "all are told", running)
    found = await texts()
    shown = {
        what: json.loads(found[str(one)])["data"]["campaign"]
        for what, one in odd.items()
        if what not in ("deep", "large")
    }
    assert shown["unicode"]["name"] == await db.fetchval("SELECT name FROM campaigns WHERE id = $1", odd["unicode"])
    assert [name for name, value in shown["nulls"].items() if value is None] == [
        "daily_limit", "stop_on_reply", "open_tracking", "skip_other_campaigns", "pause_reason", "created_at",
        *([] if shown["nulls"]["updated_at"] else ["updated_at"]),
    ]  # fmt: skip
    assert (shown["unknown"]["type"], shown["unknown"]["status"]) == ("carrier pigeon", "on\nhold")
    assert shown["large integer"]["skip_other_campaigns"] == [2**70 + 1]
    assert f'"skip_other_campaigns":{{"a":1{"0" * 400},"b":-15{"0" * 4999}}}' in found[str(odd["large"])]
    assert f'"skip_other_campaigns":{"[" * 2000}{"]" * 2000},' in found[str(odd["deep"])]
    assert shown["infinity"]["created_at"] == shown["far"]["created_at"] == "9999-12-31T23:59:59.999999Z"
    assert shown["bc"]["created_at"] == "0001-01-01T00:00:00Z"
    assert shown["synced bc"]["last_synced_at"].startswith("20")
    if answers:
        assert f'"operating_hours":{{"a b":[{2**70 + 1},2]}}' in answers["large integer"]
        assert f'"operating_hours":1{"0" * 400},' in answers["large"]
        assert f'"operating_hours":{"[" * 500}{"]" * 500},' in answers["deep"]
    assert await db.fetchval("SELECT count(*) FROM campaign_stats.deferred") == 0
    assert [line for line in running.logs if line["level"] in ("error", "critical")] == []


@pytest.mark.parametrize("moment", ["4713-01-01 00:00:00+00 BC", "-infinity", "10000-01-01Z", "infinity"])
async def test_contacts_at_impossible_times_do_not_switch_the_guard_off(
    service: StartService, bus: Bus, db: asyncpg.Connection, moment: str
) -> None:
    campaign_id = await add_campaign(db, {"sent": 95, "bounced": 5})
    await db.execute(f"UPDATE campaign_prospects SET contacted_at = '{moment}' WHERE campaign_id = $1", campaign_id)
    running = await service(sweep_interval_s=0.2)  # its first page has a candidate
    [pause] = await eventually(lambda: bus.events(bus.topics.prefix + "campaign.paused"), "it pauses", running)
    assert (pause["data"]["sent"], pause["data"]["bounced"]) == (100, 5)
    assert await db.fetchval("SELECT status FROM campaigns WHERE id = $1", campaign_id) == "paused"
    assert await db.fetchval("SELECT count(*) FROM campaign_stats.deferred WHERE reason = 'guard'") == 0


async def test_prospects_moved_between_campaigns_are_counted_where_they_are(
    service: StartService, bus: Bus, db: asyncpg.Connection
) -> None:
    hinted, silent = await add_campaign(db, {"sent": 10, "replied": 5}), await add_campaign(db, {"sent": 1})
    running = await service(sweep_interval_s=0.2)
    await told(bus, running, hinted, silent)
    await db.execute("UPDATE campaign_prospects SET campaign_id = $2 WHERE campaign_id = $1 AND status = 'replied'",
                     hinted, silent)  # fmt: skip
    await bus.publish(bus.topics.prefix + "prospect.status-changed", hint(hinted), key=str(hinted))
    for campaign_id in (hinted, silent):

        async def is_true(one: UUID = campaign_id) -> bool:
            return bool(await stats_of(db, one) == expected_stats(await truth(db, one)))

        await eventually(is_true, "both are right", running)
    assert (await stats_of(db, silent))["replied"] == 5


async def test_a_campaign_deleted_under_our_hands_is_counted_and_its_request_answered_not_found(
    service: StartService, bus: Bus, db: asyncpg.Connection, database_url: str
) -> None:
    going, staying = await add_campaign(db, REFERENCE), await add_campaign(db, {"sent": 1})
    running = await service()
    product = await asyncpg.connect(database_url)
    transaction = product.transaction()
    await transaction.start()
    await product.execute("DELETE FROM campaigns WHERE id = $1", going)
    request = sync_request(going)
    await bus.publish(bus.topics.prefix + "campaign.sync-requested", request, key=str(going))
    await bus.publish(bus.topics.prefix + "prospect.status-changed", hint(staying), key=str(staying))
    await told(bus, running, staying)
    waiting = "SELECT count(*) = 1 FROM campaign_stats.deferred WHERE reason = 'locked'"
    await eventually(lambda: db.fetchval(waiting), "the request waits for the lock", running)
    await transaction.commit()
    await product.close()
    [rejected] = await eventually(lambda: bus.events(bus.topics.prefix + "campaign.sync-rejected"), "answered", running)
    assert (rejected["causationid"], rejected["data"]["reason"]) == (request["id"], "not_found")
    assert (await running.metrics())["campaign_stats_campaigns_missing_total"] == 1
    assert await db.fetchval("SELECT count(*) FROM campaign_stats.deferred") == 0


@pytest.mark.parametrize(
    "body",
    [
        "RAISE EXCEPTION 'no'",
        "RAISE EXCEPTION USING ERRCODE = 'XX000'",
        "PERFORM 1 / 0",
        "PERFORM repeat('x', 2147483647)",
        "NEW.daily_limit := 'many'",
        "RETURN NULL",
    ],
)
async def test_a_trigger_that_forbids_a_recount_costs_only_its_campaign(
    service: StartService, bus: Bus, db: asyncpg.Connection, body: str
) -> None:
    forbidden, others = await add_campaign(db, REFERENCE), [await add_campaign(db, {"sent": 1}) for _ in range(20)]
    await db.execute(
        f"""CREATE FUNCTION forbid() RETURNS trigger LANGUAGE plpgsql AS $$
            BEGIN IF NEW.id = '{forbidden}' THEN {body}; END IF; RETURN NEW; END $$;
            CREATE TRIGGER forbid BEFORE UPDATE ON campaigns FOR EACH ROW EXECUTE FUNCTION forbid()"""
    )
    request = sync_request(forbidden)
    await bus.publish(bus.topics.prefix + "campaign.sync-requested", request, key=str(forbidden))
    for campaign_id in (forbidden, *others):
        await bus.publish(bus.topics.prefix + "prospect.status-changed", hint(campaign_id), partition=0)
    running = await service()
    await told(bus, running, *others)
    failures = "SELECT failures FROM campaign_stats.campaign_state WHERE campaign_id = $1"
    await eventually(lambda: db.fetchval(failures, forbidden), "it fails alone", running)
    await db.execute("UPDATE campaign_stats.campaign_state SET failures = 4, retry_at = now() WHERE failures > 0")
    await db.execute("UPDATE campaign_stats.deferred SET not_before = now()")
    [rejected] = await eventually(lambda: bus.events(bus.topics.prefix + "campaign.sync-rejected"), "answered", running)
    assert (rejected["causationid"], rejected["data"]["reason"]) == (request["id"], "failed")
    await db.execute("DROP TRIGGER forbid ON campaigns")
    await bus.publish(bus.topics.prefix + "prospect.status-changed", hint(forbidden), partition=0)
    await db.execute("UPDATE campaign_stats.campaign_state SET retry_at = now() WHERE failures > 0")
    await db.execute("UPDATE campaign_stats.deferred SET not_before = now()")
    await told(bus, running, forbidden)
    assert await stats_of(db, forbidden) == expected_stats(REFERENCE)
    assert await db.fetchval(failures, forbidden) == 0
    metrics = await running.metrics()
    assert metrics["campaign_stats_campaigns_missing_total"] == 0
    assert metrics['campaign_stats_degraded{dependency="database"}'] == 0


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("UPDATE campaign_stats.migrations SET checksum = 'x' WHERE number = 2", "was changed after it was applied"),
        ("INSERT INTO campaign_stats.migrations VALUES (999, '0999_future', 'x')", "is newer than this code"),
    ],
)
async def test_a_changed_migration_and_a_newer_database_end_every_command_with_2_and_name_the_file(
    environment: dict[str, str], db: asyncpg.Connection, change: str, sentence: str
) -> None:
    await db.execute(change)
    name = await db.fetchval("SELECT name FROM campaign_stats.migrations WHERE checksum = 'x'")
    commands = (["migrate"], ["migrate", "--reference-schema"], ["run"], ["drift"], ["why", str(uuid4())])
    for code, out, error in await asyncio.gather(*(command(environment, *arguments) for arguments in commands)):
        assert code == 2
        assert sentence in out + error
        assert name in out + error
        assert "Traceback" not in out + error
