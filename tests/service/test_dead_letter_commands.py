"""Dead letters listed, shown and sent back, each command as a process against real servers."""

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

import asyncpg
import pytest

from tests.conftest import Bus, StartService, command, eventually
from tests.servers import REPOSITORY
from tests.world import REFERENCE, add_campaign, hint

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
