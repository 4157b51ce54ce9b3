"""Operators' repairs, each command as a process against real servers."""

import asyncio
import base64
import json
import os
import pty
import sys
from collections.abc import Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest

from tests.conftest import Bus, StartService, command, eventually
from tests.servers import REPOSITORY
from tests.world import REFERENCE, add_campaign, expected_stats, hint, stats_of

Headers = Sequence[tuple[str, bytes]]


def letter_headers(
    topic: str, partition: int, offset: int | str, *, reason: str = "unknown_type", time: str = "2026-01-01T00:00:00Z"
) -> list[tuple[str, bytes]]:
    """What the service adds to a dead letter, by the words of the interface."""
    said = {"topic": topic, "partition": partition, "offset": offset, "reason": reason, "error": "$.type", "time": time}
    return [(f"dead-letter-{name}", str(value).encode()) for name, value in said.items()]


async def bury(
    bus: Bus, offset: int | str, value: bytes = b"{}", *, own: Headers = (), key: str | None = "k", topic: str = "",
    partition: int = 0, reason: str = "unknown_type", time: str = "2026-01-01T00:00:00Z",
) -> str:  # fmt: skip
    """Write a dead letter as the service does; its place."""
    topic = topic or bus.topics.prefix + "prospect.status-changed"
    headers = [*own, *letter_headers(topic, partition, offset, reason=reason, time=time)]
    at = await bus.publish(bus.topics.dead_letters, value, key=key, headers=headers)
    return f"{at.partition}:{at.offset}"


async def redrive(environment: dict[str, str], *arguments: str) -> tuple[int, dict[str, Any], str]:
    code, out, err = await command(environment, "dead-letters", "redrive", *arguments, "--json", timeout_s=60)
    return code, json.loads(out), err


async def marks(db: asyncpg.Connection) -> list[tuple[str, int, int]]:
    rows = await db.fetch('SELECT topic, partition, "offset" FROM campaign_stats.redriven ORDER BY 3')
    return [tuple(row) for row in rows]


@asynccontextmanager
async def lock_of(database_url: str, name: str) -> Any:
    """The lock of a command, held by somebody else."""
    other = await asyncpg.connect(database_url)
    try:
        async with other.transaction():
            taken = await other.fetchval(
                "SELECT pg_try_advisory_xact_lock(hashtextextended('campaign_stats ' || $1, 0))", name
            )
            assert taken
            yield
    finally:
        await other.close()


async def test_dead_letters_of_the_running_service_are_listed_shown_and_sent_back_once(
    service: StartService, environment: dict[str, str], bus: Bus, db: asyncpg.Connection
) -> None:
    campaign_id = await add_campaign(db, REFERENCE)
    await service()
    topic = bus.topics.prefix + "prospect.status-changed"
    event = hint(campaign_id, type="prospect.status_changed.v0")
    at = await bus.publish(topic, event, key="the key", headers=[("trace", b"\xff\x00")])
    await eventually(lambda: bus.read(bus.topics.dead_letters))

    code, out, err = await command(environment, "dead-letters", "list", "--json")
    assert (code, err) == (0, "")
    [listed] = json.loads(out)
    assert listed.pop("place").count(":") == 1
    assert datetime.fromisoformat(listed.pop("time")) > datetime.now(UTC) - timedelta(minutes=5)
    assert listed.pop("error").startswith("$.type: expected")
    assert listed == {
        "reason": "unknown_type", "topic": topic, "partition": at.partition, "offset": at.offset,
        "last_offset": at.offset, "redriven_at": None,
    }  # fmt: skip

    code, counts, err = await redrive(environment, "--all")
    assert (code, err) == (0, "")
    assert counts == {"sent": 1, "skipped": 0, "impossible": 0, "failed": 0, "missing": [], "dry_run": False}
    first, second = [record for record in await bus.read(topic) if record.key == b"the key"]
    assert (second.value, second.headers[:-1]) == (first.value, first.headers)
    assert await marks(db) == [(topic, at.partition, at.offset)]
    await eventually(lambda: _length(bus, bus.topics.dead_letters, 2))  # buried again

    assert (await redrive(environment, "--topic", topic, "--limit", "1"))[1]["skipped"] == 2  # the new one too
    assert (await redrive(environment, "--topic", topic, "--limit", "1", "--again"))[1]["sent"] == 1
    code, counts, _ = await redrive(environment, "--until", "2020-01-01", "--again")
    assert (code, counts["sent"]) == (0, 0)


async def _length(bus: Bus, topic: str, count: int) -> bool:
    return len(await bus.read(topic)) >= count


async def test_what_is_sent_back_has_its_key_its_bytes_and_its_own_headers(
    environment: dict[str, str], bus: Bus
) -> None:
    own = [("ce_specversion", b"1.0"), ("ce_type", b"prospect.status_changed.v1"), ("empty", b""), ("same", b"1"),
           ("same", b"2"), ("raw", b"\xfe\xff")]  # fmt: skip
    places = [
        await bury(bus, 1, b'{"a": 1}\n\xff', own=own, key="Ann\u00e9"),
        await bury(bus, 2, b"", own=own, key=None),
        await bury(bus, 3, b"x" * 900_000, key="big"),
        await bury(bus, 4, b"small", key=None),
    ]
    code, counts, err = await redrive(environment, *places)
    assert (code, counts["sent"], err) == (0, 4, "")
    back = {len(record.value): record for record in await bus.read(bus.topics.prefix + "prospect.status-changed")}
    assert back[10].value == b'{"a": 1}\n\xff'
    assert back[10].key == "Ann\u00e9".encode()
    assert {record.headers[-1][0] for record in back.values()} == {"dead-letter-redriven"}
    assert [*back[10].headers[:-1]] == own
    assert (back[0].key, [*back[0].headers[:-1]]) == (None, own)
    assert (back[5].key, back[5].headers[:-1]) == (None, ())
    assert back[900_000].key == b"big"


async def test_show_prints_everything_as_text_or_base64_and_nothing_that_steers_a_terminal(
    environment: dict[str, str], bus: Bus
) -> None:
    where = await bury(bus, 7, b"\xff\x01", own=[("ce_id", b"e-1"), ("raw", b"\xfe")], key="\x1b[31mkey")
    code, out, _ = await command(environment, "dead-letters", "show", where, "--json")
    assert code == 0
    assert json.loads(out) == {
        "place": where, "time": "2026-01-01T00:00:00Z", "reason": "unknown_type",
        "topic": bus.topics.prefix + "prospect.status-changed", "partition": 0, "offset": 7, "last_offset": 7,
        "error": "$.type", "redriven_at": None,
        "key": {"encoding": "utf-8", "content": "\x1b[31mkey"},
        "value": {"encoding": "base64", "content": base64.b64encode(b"\xff\x01").decode()},
        "headers": [{"name": "ce_id", "encoding": "utf-8", "content": "e-1"},
                    {"name": "raw", "encoding": "base64", "content": "/g=="}],
    }  # fmt: skip
    code, out, _ = await command(environment, "dead-letters", "show", where)
    assert code == 0
    assert "\x1b" not in out
    assert "key: \\x1b[31mkey" in out
    assert "header ce_id: e-1" in out
    for wrong in (where.split(":")[0] + ":99", "5000:0"):
        code, out, err = await command(environment, "dead-letters", "show", wrong)
        assert (code, out) == (1, "")
        assert f"there is no dead letter at {wrong}" in err
    code, _, err = await command(environment, "dead-letters", "show", "12")
    assert code == 2
    assert "PARTITION:OFFSET" in err


async def test_the_list_filters_shows_the_newest_first_and_never_what_was_in_them(
    environment: dict[str, str], bus: Bus
) -> None:
    foreign = bus.topics.prefix + "campaign.sync-requested"
    for number in range(6):
        await bury(
            bus, number, b"secret payload", key="secret key", own=[("secret-header", b"secret")],
            topic=foreign if number % 2 else "", reason="not_json" if number < 2 else "unknown_type",
            time=f"2026-01-0{number + 1}T00:00:00Z",
        )  # fmt: skip
    await bus.publish(bus.topics.dead_letters, b"who wrote this?", headers=[("dead-letter-topic", b"a b\x00")])

    async def offsets(*arguments: str) -> list[Any]:
        code, out, _ = await command(environment, "dead-letters", "list", "--json", *arguments)
        assert code == 0
        assert "secret" not in out
        return [row["offset"] for row in json.loads(out)]

    assert await offsets() == [None, 5, 4, 3, 2, 1, 0]
    assert await offsets("--reason", "not_json") == [1, 0]
    assert await offsets("--topic", foreign) == [5, 3, 1]
    assert await offsets("--until", "2026-01-03") == [1, 0]
    assert await offsets("--topic", foreign, "--reason", "not_json") == [1]
    assert await offsets("--since", "1h") == [None]  # they were written long ago, as their headers say
    assert await offsets("--since", "1h", "--until", "1h") == []
    code, out, err = await command(environment, "dead-letters", "list", "--limit", "2")
    assert code == 0
    assert "5 more are not shown" in err
    assert "2026-01-06" in out
    assert "2026-01-05" not in out
    assert "secret" not in out
    code, out, _ = await command(environment, "dead-letters", "list", "--reason", "not_utf8")
    assert (code, out) == (0, "no dead letters\n")
    code, _, err = await command(environment, "dead-letters", "list", "--reason", "tired")
    assert code == 2
    assert "not_json" in err


async def test_since_begins_where_that_time_begins(environment: dict[str, str], bus: Bus) -> None:
    now = datetime.now(UTC)
    await bury(bus, 1, time=(now - timedelta(hours=1)).isoformat())
    await bury(bus, 2, time=now.isoformat())
    code, out, _ = await command(environment, "dead-letters", "list", "--json", "--since", now.isoformat())
    assert code == 0
    assert [row["offset"] for row in json.loads(out)] == [2]


async def test_an_original_is_sent_back_once_unless_asked_again(
    environment: dict[str, str], bus: Bus, db: asyncpg.Connection
) -> None:
    topic = bus.topics.prefix + "prospect.status-changed"
    twice = [await bury(bus, 1), await bury(bus, 1)]  # as a crash leaves them
    other = await bury(bus, 2, key="other")
    code, counts, _ = await redrive(environment, "--all", "--dry-run")
    assert (code, counts["sent"], counts["dry_run"]) == (0, 2, True)
    assert (await bus.read(topic), await marks(db)) == ([], [])

    code, counts, _ = await redrive(environment, twice[1])
    assert (code, counts["sent"], counts["skipped"]) == (0, 1, 0)
    code, counts, _ = await redrive(environment, twice[0], other)
    assert (code, counts["sent"], counts["skipped"]) == (0, 1, 1)
    assert await marks(db) == [(topic, 0, 1), (topic, 0, 2)]
    code, counts, _ = await redrive(environment, "--all")
    assert (code, counts["sent"], counts["skipped"]) == (0, 0, 2)
    assert len(await bus.read(topic)) == 2
    code, counts, _ = await redrive(environment, "--reason", "unknown_type", "--again")
    assert (code, counts["sent"], counts["skipped"]) == (0, 2, 0)
    assert len(await bus.read(topic)) == 4
    code, out, _ = await command(environment, "dead-letters", "list", "--json")
    assert all(row["redriven_at"] is not None for row in json.loads(out))


async def test_a_limit_goes_on_where_the_last_run_ended(environment: dict[str, str], bus: Bus) -> None:
    for offset in range(5):
        await bury(bus, offset, str(offset).encode())
    sent = [(await redrive(environment, "--all", "--limit", "2"))[1]["sent"] for _ in range(4)]
    assert sent == [2, 2, 1, 0]
    values = [record.value for record in await bus.read(bus.topics.prefix + "prospect.status-changed")]
    assert sorted(values) == [b"0", b"1", b"2", b"3", b"4"]


async def test_stubs_are_counted_and_what_cannot_be_sent_is_said(
    environment: dict[str, str], bus: Bus, db: asyncpg.Connection
) -> None:
    for stub in ("unreadable", "too_large", "not_json"):  # the last: a dead letter that was itself too large
        await bury(bus, f"{len(stub)}-99", b"", key=None, reason=stub)
    await bus.publish(bus.topics.dead_letters, b"foreign", headers=[("dead-letter-topic", b"../etc")])
    gone = bus.topics.prefix + "gone"
    environment["CAMPAIGN_STATS_CDC_TOPIC"] = gone  # one that it reads, but that is no longer there
    await bury(bus, 1, topic=gone, key=None)
    good = await bury(bus, 2, key=None)
    code, counts, err = await redrive(environment, "--all")
    assert code == 1
    assert (counts["sent"], counts["impossible"], counts["failed"]) == (1, 4, 1)
    assert f"topic {gone} is missing" in err
    assert "topics --create" in err
    assert [offset for _, _, offset in await marks(db)] == [2]
    code, counts, err = await redrive(environment, good, "0:4711")
    assert (code, counts["skipped"], counts["missing"]) == (1, 1, ["0:4711"])
    assert "there is no dead letter at 0:4711" in err
    for arguments in ([], ["--all", "--reason", "not_json"], [good, "--all"]):
        assert (await command(environment, "dead-letters", "redrive", *arguments))[0] == 2


@pytest.mark.apache_kafka  # the embedded broker takes everything
async def test_one_that_is_refused_does_not_hold_up_the_others(
    environment: dict[str, str], bus: Bus, db: asyncpg.Connection
) -> None:
    from consumer import broker

    small = environment["CAMPAIGN_STATS_CDC_TOPIC"] = bus.topics.prefix + "small"
    await broker.create_topics(
        broker.Connection(bus.bootstrap, {}), {small: {"max.message.bytes": "2000"}}, partitions=1, replication=1
    )
    for offset, size in enumerate((10, 5_000, 20, 30)):
        await bury(bus, offset, b"x" * size, topic=small, key=None)
    code, counts, err = await redrive(environment, "--topic", small)
    assert (code, counts["sent"], counts["failed"]) == (1, 3, 1)
    assert "larger than the topic takes" in err
    assert sorted(len(record.value) for record in await bus.read(small)) == [10, 20, 30]
    assert [offset for _, _, offset in await marks(db)] == [0, 2, 3]


async def test_two_redrives_at_once_send_each_dead_letter_once(
    environment: dict[str, str], bus: Bus, db: asyncpg.Connection, database_url: str
) -> None:
    for offset in range(50):
        await bury(bus, offset, str(offset).encode(), key=f"k{offset}")

    async def waiting() -> bool:
        rows = await db.fetch(
            "SELECT count(DISTINCT pid) AS n FROM pg_stat_activity WHERE datname = current_database()"
            " AND application_name = 'campaign-stats' AND pid <> pg_backend_pid()"
        )
        return bool(rows[0]["n"] == 2)

    async with lock_of(database_url, "dead-letters redrive"):
        both = [asyncio.create_task(redrive(environment, "--all")) for _ in range(2)]
        await eventually(waiting)
        await asyncio.wait(both, timeout=1)
        assert not any(task.done() for task in both)
        assert await bus.read(bus.topics.prefix + "prospect.status-changed") == []
    results = await asyncio.gather(*both)
    assert [code for code, _, _ in results] == [0, 0]
    assert sum(counts["sent"] for _, counts, _ in results) == 50
    assert sum(counts["skipped"] for _, counts, _ in results) == 50
    values = [int(record.value) for record in await bus.read(bus.topics.prefix + "prospect.status-changed")]
    assert sorted(values) == list(range(50))


async def test_a_redrive_killed_before_its_commit_sends_again_next_time_and_locks_nothing(
    environment: dict[str, str], bus: Bus, db: asyncpg.Connection, database_url: str
) -> None:
    topic = bus.topics.prefix + "prospect.status-changed"
    await bury(bus, 1)
    blocker = await asyncpg.connect(database_url)
    async with blocker.transaction():
        await blocker.execute("LOCK TABLE campaign_stats.redriven IN SHARE MODE")  # marks may be read, not written
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "consumer", "dead-letters", "redrive", "--all", env=environment, cwd=REPOSITORY,
            stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL,
        )  # fmt: skip
        await eventually(lambda: _length(bus, topic, 1))
        process.kill()
        assert await process.wait() != 0
    await blocker.close()
    assert await marks(db) == []
    code, counts, _ = await redrive(environment, "--all")
    assert (code, counts["sent"]) == (0, 1)
    assert (await redrive(environment, "--all"))[1]["skipped"] == 1
    assert len(await bus.read(topic)) == 2


async def test_what_takes_longer_than_two_seconds_shows_a_bar_on_a_terminal_only(
    environment: dict[str, str], bus: Bus, database_url: str
) -> None:
    await bury(bus, 1)
    ours, theirs = pty.openpty()
    try:
        async with lock_of(database_url, "dead-letters redrive"):
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "consumer", "dead-letters", "redrive", "--all",
                env={**environment, "TERM": "xterm"}, cwd=REPOSITORY,
                stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=theirs,
            )  # fmt: skip
            os.close(theirs)
            shown = await asyncio.wait_for(asyncio.to_thread(os.read, ours, 4096), 20)
            while b"reading dead letters" not in shown:
                shown += await asyncio.wait_for(asyncio.to_thread(os.read, ours, 4096), 20)
        out, _ = await process.communicate()
        assert process.returncode == 0
        assert out.decode().splitlines()[0] == "sent 1"
    finally:
        os.close(ours)
    code, _, err = await command(environment, "dead-letters", "redrive", "--all")
    assert (code, err) == (0, "")


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


async def test_what_comes_back_still_unreadable_is_not_sent_again_unless_asked(
    service: StartService, environment: dict[str, str], bus: Bus
) -> None:
    topic, letters = bus.topics.prefix + "prospect.status-changed", bus.topics.dead_letters
    await service()
    await bus.publish(topic, b"never readable")

    async def letters_are(count: int) -> bool:
        return len(await bus.read(letters)) == count

    await eventually(lambda: letters_are(1), "a dead letter")
    assert (await redrive(environment, "--all"))[1]["sent"] == 1
    await eventually(lambda: letters_are(2), "it comes back")
    assert {name: count for name, count in (await redrive(environment, "--all"))[1].items() if count} == {"skipped": 2}
    _, out, _ = await command(environment, "dead-letters", "list", "--json")
    assert all(line["redriven_at"] for line in json.loads(out))
    assert (await redrive(environment, "--all", "--again"))[1]["sent"] == 2


async def test_nothing_is_sent_to_a_topic_that_the_service_does_not_read(environment: dict[str, str], bus: Bus) -> None:
    paused = bus.topics.prefix + "campaign.paused"
    await bus.publish(bus.topics.dead_letters, b"{}", headers=letter_headers(paused, 0, 1))
    code, counts, err = await redrive(environment, "--all")
    assert (code, counts["sent"], counts["failed"]) == (1, 0, 1)
    assert "none that the service reads" in err
    assert await bus.read(paused) == []
