"""What waits or is set aside, replay and reconcile: each command as a process against real servers."""

import asyncio
import json
import os
from datetime import UTC, datetime
from uuid import UUID, uuid4

import asyncpg
import pytest

from tests.conftest import Bus, StartService, command, eventually
from tests.world import REFERENCE, add_campaign, expected_stats, hint, stats_of


async def defer(db: asyncpg.Connection, campaign_id: UUID, reason: str, *, in_s: float = 3600) -> int:
    number: int = await db.fetchval(
        "INSERT INTO campaign_stats.deferred (campaign_id, reason, not_before, trigger, requests)"
        " VALUES ($1, $2, clock_timestamp() + make_interval(secs => $3), 'status_changed', '[{}]') RETURNING id",
        campaign_id, reason, in_s,
    )  # fmt: skip
    return number


async def test_deferred_list_says_what_waits_and_why(environment: dict[str, str], db: asyncpg.Connection) -> None:
    one, two = await add_campaign(db), await add_campaign(db)
    await defer(db, one, "sweep", in_s=1)
    later, sooner = await defer(db, one, "failing"), await defer(db, two, "locked", in_s=60)
    await db.execute(
        "INSERT INTO campaign_stats.campaign_state (campaign_id, failures, retry_at) VALUES ($1, 3, '2030-01-01')", one
    )
    code, out, _ = await command(environment, "deferred", "list", "--json")
    rows = json.loads(out)
    assert code == 0
    assert [row["reason"] for row in rows] == ["locked", "failing", "sweep"]
    assert [row["id"] for row in rows[:2]] == [sooner, later]
    assert rows[1]["due_at"].endswith("Z")
    assert rows[1] == {
        "id": later, "campaign_id": str(one), "reason": "failing", "due_at": rows[1]["due_at"], "tries": 0,
        "first_written": rows[1]["first_written"], "trigger": "status_changed", "requests": 1, "failures": 3,
        "retry_at": "2030-01-01T00:00:00Z",
    }  # fmt: skip
    code, out, _ = await command(environment, "deferred", "list", "--json", "--campaign", str(one), "--reason", "sweep")
    assert [row["reason"] for row in json.loads(out)] == ["sweep"]
    code, out, err = await command(environment, "deferred", "list", "--limit", "1")
    assert code == 0
    assert "2 more are not shown" in err
    assert (await command(environment, "deferred", "list", "--campaign", str(uuid4())))[1] == "no deferred recounts\n"


async def test_deferred_retry_makes_exactly_the_chosen_ones_due(
    environment: dict[str, str], db: asyncpg.Connection
) -> None:
    failing, huge, locked = [await add_campaign(db) for _ in range(3)]
    for campaign_id, reason in ((failing, "failing"), (failing, "locked"), (huge, "huge"), (locked, "locked")):
        await defer(db, campaign_id, reason)
    await db.execute(
        "INSERT INTO campaign_stats.campaign_state (campaign_id, failures, retry_at, next_recount_at) VALUES"
        " ($1, 3, now() + interval '1 h', NULL), ($2, 0, NULL, now() + interval '1 h')", failing, huge,
    )  # fmt: skip

    async def due() -> set[tuple[UUID, str]]:
        rows = await db.fetch("SELECT campaign_id, reason FROM campaign_stats.deferred WHERE not_before <= now()")
        return {(row["campaign_id"], row["reason"]) for row in rows}

    assert (await command(environment, "deferred", "retry"))[0] == 2
    assert (await command(environment, "deferred", "retry", "--all", str(huge)))[0] == 2
    code, out, err = await command(environment, "deferred", "retry", str(huge), str(uuid4()))
    assert (code, out) == (1, "1\n")
    assert "not deferred" in err
    assert await due() == {(huge, "huge")}
    code, out, _ = await command(environment, "deferred", "retry", "--reason", "failing", "--json")
    assert (code, json.loads(out)) == (0, {"campaigns": 1})
    assert await due() == {(huge, "huge"), (failing, "failing")}
    states = await db.fetch(
        "SELECT coalesce(retry_at, next_recount_at) <= now() AS due, failures FROM campaign_stats.campaign_state"
    )
    assert all(row["due"] for row in states)
    assert {row["failures"] for row in states} == {0, 3}
    code, out, _ = await command(environment, "deferred", "retry", "--all")
    assert (code, out) == (0, "3\n")
    assert len(await due()) == 4


async def test_deferred_retry_waits_for_nobody(
    environment: dict[str, str], db: asyncpg.Connection, database_url: str
) -> None:
    held, free = await add_campaign(db), await add_campaign(db)
    for campaign_id in (held, free):
        await defer(db, campaign_id, "huge")
    worker = await asyncpg.connect(database_url)
    async with worker.transaction():  # as a worker that recounts it
        await worker.execute("DELETE FROM campaign_stats.deferred WHERE campaign_id = $1", held)
        code, out, _ = await command(environment, "deferred", "retry", "--all")
        assert (code, out) == (0, "2\n")
        assert await db.fetchval("SELECT count(*) FROM campaign_stats.deferred WHERE not_before <= now()") == 1
    await worker.close()


async def test_a_healed_campaign_is_recounted_when_retry_is_asked_for(
    service: StartService, environment: dict[str, str], bus: Bus, db: asyncpg.Connection
) -> None:
    campaign_id = await add_campaign(db, REFERENCE)
    await db.execute(
        "INSERT INTO campaign_stats.campaign_state (campaign_id, failures, retry_at) VALUES ($1, 12, '2040-01-01')",
        campaign_id,
    )
    number = await db.fetchval(
        "INSERT INTO campaign_stats.deferred (campaign_id, reason, not_before, trigger)"
        " VALUES ($1, 'failing', '2040-01-01', 'status_changed') RETURNING id", campaign_id,
    )  # fmt: skip
    await service()
    assert await db.fetchval("SELECT id FROM campaign_stats.deferred") == number
    assert (await command(environment, "deferred", "retry", str(campaign_id)))[:2] == (0, "1\n")

    async def is_counted() -> bool:
        return bool(await stats_of(db, campaign_id) == expected_stats(REFERENCE))

    await eventually(is_counted)
    assert await db.fetchval("SELECT count(*) FROM campaign_stats.deferred") == 0


async def put_out(db: asyncpg.Connection, campaign_id: UUID, *, aside: bool) -> int:
    number: int = await db.fetchval(
        "INSERT INTO campaign_stats.outbox (shard, campaign_id, type, event, set_aside_at, error)"
        " VALUES (1, $1, 'campaign.paused.v1', 'a secret', CASE WHEN $2 THEN '2026-01-01'::timestamptz END,"
        " CASE WHEN $2 THEN 'larger than the topic takes' END) RETURNING id", campaign_id, aside,
    )  # fmt: skip
    return number


async def test_outbox_list_and_requeue(environment: dict[str, str], bus: Bus, db: asyncpg.Connection) -> None:
    campaign_id = await add_campaign(db)
    waiting, *aside = [await put_out(db, campaign_id, aside=number > 0) for number in range(4)]
    code, out, _ = await command(environment, "outbox", "list", "--set-aside", "--json")
    assert code == 0
    assert "secret" not in out
    rows = json.loads(out)
    assert [row["id"] for row in rows] == aside
    assert rows[0] == {
        "id": aside[0], "campaign_id": str(campaign_id), "type": "campaign.paused.v1", "bytes": 8,
        "written_at": rows[0]["written_at"], "set_aside_at": "2026-01-01T00:00:00Z",
        "error": "larger than the topic takes",
    }  # fmt: skip
    code, out, err = await command(environment, "outbox", "list", "--limit", "3", "--json")
    assert [row["id"] for row in json.loads(out)] == [waiting, *aside[:2]]
    assert "1 more are not shown" in err

    assert (await command(environment, "outbox", "requeue"))[0] == 2
    code, out, err = await command(environment, "outbox", "requeue", str(aside[0]), str(waiting), "999999")
    assert (code, out) == (1, "1\n")
    assert f"not set aside: {waiting}, 999999" in err
    both = await asyncio.gather(*(command(environment, "outbox", "requeue", "--all", "--json") for _ in range(2)))
    assert [code for code, _, _ in both] == [0, 0]
    assert sum(json.loads(out)["requeued"] for _, out, _ in both) == 2
    assert await db.fetchval("SELECT count(*) FROM campaign_stats.outbox WHERE set_aside_at IS NULL") == 4
    assert (await command(environment, "outbox", "list", "--set-aside"))[1] == "no events set aside\n"


async def test_a_requeued_event_is_published(
    service: StartService, environment: dict[str, str], bus: Bus, db: asyncpg.Connection
) -> None:
    await service()
    number = await put_out(db, await add_campaign(db), aside=True)
    assert (await command(environment, "outbox", "requeue", str(number)))[:2] == (0, "1\n")
    [record] = await eventually(lambda: bus.read(bus.topics.prefix + "campaign.paused"))
    assert record.value == b"a secret"


@pytest.mark.apache_kafka  # the embedded broker keeps members that left, and finds no offsets by time
async def test_replay_refuses_while_a_service_runs_and_has_it_recount_afterwards(
    service: StartService, environment: dict[str, str], bus: Bus, db: asyncpg.Connection
) -> None:
    topic = bus.topics.prefix + "prospect.status-changed"
    before, after = await add_campaign(db, {"sent": 3}), await add_campaign(db, {"sent": 5})
    await bus.publish(topic, hint(before), key=str(before), partition=0)
    await asyncio.sleep(0.01)  # record times are milliseconds
    begin = datetime.now(UTC)
    await asyncio.sleep(0.01)
    await bus.publish(topic, hint(after), key=str(after), partition=0)
    running = await service()

    async def are_counted() -> bool:
        return [await stats_of(db, one) for one in (before, after)] == [
            expected_stats({"sent": 3}), expected_stats({"sent": 5})
        ]  # fmt: skip

    await eventually(are_counted)
    code, out, err = await command(environment, "replay", "--since", begin.isoformat())
    assert (code, out) == (1, "")
    assert "has 1 member: stop every replica of the service first" in err
    running.terminate()
    assert await running.wait() == 0
    await db.execute("UPDATE campaigns SET stats = '{}'")

    caught_up = await service("--until-caught-up", ready=False)
    assert await caught_up.wait() == 0
    assert await stats_of(db, after) == {}  # the control: nothing is read again by itself

    planned = json.loads((await command(environment, "replay", "--since", begin.isoformat(), "--dry-run", "--json"))[1])
    code, out, err = await command(environment, "replay", "--since", begin.isoformat(), "--json")
    assert (code, err) == (0, "")
    assert json.loads(out) == planned
    assert {row["topic"] for row in planned} == {topic, bus.topics.prefix + "campaign.sync-requested"}
    assert len(planned) == 6
    assert [row for row in planned if row["records"]] == [
        {"topic": topic, "partition": 0, "from": 2, "to": 1, "records": 1}
    ]
    caught_up = await service("--until-caught-up", ready=False)
    assert await caught_up.wait() == 0
    assert await stats_of(db, after) == expected_stats({"sent": 5})
    assert await stats_of(db, before) == {}  # its hint is older

    for since in (begin.isoformat(), "2100-01-01"):  # read again already: once more is one step, never a step forward
        assert (await command(environment, "replay", "--since", since))[0] == 0
    code, out, _ = await command(environment, "replay", "--since", "1970-01-01", "--json")
    [row] = [row for row in json.loads(out) if row["partition"] == 0 and row["topic"] == topic]
    assert (code, row["from"], row["to"]) == (0, 1, 0)
    code, out, _ = await command(environment, "replay", "--since", begin.isoformat(), "--json")
    [row] = [row for row in json.loads(out) if row["partition"] == 0 and row["topic"] == topic]
    assert (code, row["from"], row["to"]) == (0, 0, 0)


@pytest.mark.apache_kafka
async def test_replay_leaves_a_group_alone_that_committed_nothing(environment: dict[str, str], bus: Bus) -> None:
    await bus.publish(bus.topics.prefix + "prospect.status-changed", hint(uuid4()), partition=1)
    code, out, _ = await command(environment, "replay", "--since", "1h", "--json")
    assert code == 0
    assert {(row["from"], row["to"], row["records"]) for row in json.loads(out)} == {(None, None, 0)}
    code, out, _ = await command(environment, "replay", "--since", "1h")
    assert "prospect.status-changed" in out


@pytest.mark.apache_kafka
async def test_a_group_that_gets_members_meanwhile_is_not_moved(
    service: StartService, environment: dict[str, str], bus: Bus
) -> None:
    from consumer.broker import Connection, Group
    from consumer.errors import OwnershipLost

    topic = bus.topics.prefix + "prospect.status-changed"
    await bus.publish(topic, hint(uuid4()), partition=0)
    async with Group(Connection(bus.bootstrap, {}), f"{bus.topics.prefix}campaign-stats", [topic]) as group:
        assert await group.members() == 0
        await service()

        async def is_committed() -> bool:
            return (await group.committed()).get((topic, 0)) == 1

        await eventually(is_committed)
        with pytest.raises(OwnershipLost):
            await group.commit({(topic, 0): 0})
        assert (await group.committed())[(topic, 0)] == 1


async def test_reconcile_defers_every_campaign_page_by_page_once_each(
    environment: dict[str, str], db: asyncpg.Connection
) -> None:
    ends = [UUID(int=0), UUID(int=2**128 - 1)]
    await db.execute(
        "INSERT INTO campaigns (id, user_id, type, name, status)"
        " SELECT id, gen_random_uuid(), 'email', 'Spring', 'active' FROM unnest($1::uuid[]) AS id"
        " UNION ALL SELECT gen_random_uuid(), gen_random_uuid(), 'email', 'Spring', 'active'"
        " FROM generate_series(1, 2500)", ends,
    )  # fmt: skip
    await db.execute(
        "INSERT INTO campaign_stats.campaign_state (campaign_id, published_counts, published_status)"
        " SELECT id, '{}', 'active' FROM campaigns"
    )
    code, out, err = await command(environment, "reconcile", "--all")
    assert (code, out, err) == (0, "2502\n", "")
    assert await db.fetchval("SELECT count(DISTINCT campaign_id) FROM campaign_stats.deferred") == 2502
    assert await db.fetchval("SELECT count(*) FROM campaign_stats.deferred") == 2502
    assert await db.fetchval("SELECT count(DISTINCT xmin::text) FROM campaign_stats.deferred") == 3  # transactions
    assert (
        await db.fetchval("SELECT count(*) FROM campaign_stats.campaign_state WHERE published_counts IS NULL") == 2502
    )
    code, out, err = await command(environment, "reconcile", *map(str, ends), str(ends[0]), str(uuid4()))
    assert (code, out) == (1, "2\n")
    assert "1 of these ids are no campaign's" in err


async def test_reconcile_holds_only_one_page_of_campaigns_at_a_time(
    environment: dict[str, str], db: asyncpg.Connection, database_url: str
) -> None:
    await db.execute(
        "INSERT INTO campaigns (user_id, type, name, status)"
        " SELECT gen_random_uuid(), 'email', 'Spring', 'active' FROM generate_series(1, 1500)"
    )
    await db.execute("INSERT INTO campaign_stats.campaign_state (campaign_id) SELECT id FROM campaigns")
    last = await db.fetchval("SELECT id FROM campaigns ORDER BY id DESC LIMIT 1")
    other = await asyncpg.connect(database_url)
    async with other.transaction():
        await other.execute("SELECT 1 FROM campaign_stats.campaign_state WHERE campaign_id = $1 FOR UPDATE", last)
        code, out, err = await command(environment, "reconcile", "--all")
        assert (code, out) == (1, "")
        assert "55P03" in err
        assert await db.fetchval("SELECT count(*) FROM campaign_stats.deferred") == 1000  # the first page stands
    await other.close()
    assert (await command(environment, "reconcile", "--all"))[:2] == (0, "1500\n")


@pytest.mark.parametrize(
    "arguments",
    [
        ["dead-letters", "list"], ["dead-letters", "show"], ["dead-letters", "redrive"], ["deferred", "list"],
        ["deferred", "retry"], ["outbox", "list"], ["outbox", "requeue"], ["replay"], ["reconcile"],
    ],
)  # fmt: skip
async def test_help_shows_an_example(arguments: list[str]) -> None:
    code, out, _ = await command({**os.environ, "COLUMNS": "200"}, *arguments, "--help")
    assert code == 0
    assert f"Example: campaign-stats {' '.join(arguments)}" in out


async def test_missing_topics_and_tables_are_said_with_exit_2(
    environment: dict[str, str], db: asyncpg.Connection
) -> None:
    elsewhere = {**environment, "CAMPAIGN_STATS_TOPIC_PREFIX": f"t{uuid4().hex}."}
    for arguments in (["dead-letters", "list"], ["dead-letters", "redrive", "--all"], ["replay", "--since", "1h"]):
        code, _, err = await command(elsewhere, *arguments)
        assert code == 2, arguments
        assert "is missing: run `campaign-stats topics --create`" in err
        assert "Traceback" not in err
    await db.execute("DROP SCHEMA campaign_stats CASCADE")
    for arguments in (["dead-letters", "list"], ["deferred", "retry", "--all"], ["reconcile", "--all"]):
        code, _, err = await command(environment, *arguments)
        assert code == 2, arguments
        assert "Traceback" not in err
