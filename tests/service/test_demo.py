"""The demo as a process, what is left of it after a signal, and that its proof finds what is false."""

import asyncio
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest
from aiokafka.admin import AIOKafkaAdminClient

from consumer.demo import proof
from consumer.demo.evidence import Asked, Audit, Campaign, Check, DeadLetter, Event, Evidence, Prospect
from consumer.demo.servers import Postgres
from tests.conftest import Kafka

REFERENCE = '{"total":120,"sent":34,"replied":4,"bounced":1}'
PATIENCE_S = 120.0


@pytest.fixture
def folder() -> Iterator[Path]:
    """The folder below which the demo makes its own; everything it starts knows it by its environment."""
    parent = Path(tempfile.mkdtemp(prefix="csd"))
    parent.chmod(0o755)  # PostgreSQL may run as another account
    yield parent
    shutil.rmtree(parent)


async def start_demo(folder: Path, *arguments: str) -> asyncio.subprocess.Process:
    environment = {
        **os.environ,
        "TMPDIR": str(folder),
        # The demo and its service must look at none of these.
        "DATABASE_URL": "postgresql://nobody@127.0.0.1:1/nothing",
        "KAFKA_BOOTSTRAP_SERVERS": "127.0.0.1:1",
        "CAMPAIGN_STATS_GUARD_MODE": "off",
        "CAMPAIGN_STATS_LOG_LEVEL": "shouting",
    }
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", "consumer", "demo", *arguments, env=environment, stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip


async def read_until(process: asyncio.subprocess.Process, beginning: str | None) -> list[str]:
    """Its lines up to the first that begins so; None: all of them."""
    assert process.stdout is not None
    lines = []
    async with asyncio.timeout(PATIENCE_S):
        while line := (await process.stdout.readline()).decode():
            lines.append(line.rstrip())
            if beginning is not None and line.lstrip().startswith(beginning):
                return lines
    assert beginning is None, "\n".join(lines)
    return lines


def processes_of(folder: Path) -> list[str]:
    """Processes that stand in the folder, name it in their command or got it in their environment."""
    found = []
    needle = str(folder).encode()
    for process in Path("/proc").iterdir():
        with suppress(OSError):
            if process.name.isdigit() and (
                needle in (process / "cmdline").read_bytes()
                or needle in (process / "environ").read_bytes()
                or str(folder) in str((process / "cwd").readlink())
            ):
                found.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode())
    return found


async def test_the_demo_proves_itself_and_leaves_nothing(folder: Path) -> None:
    process = await start_demo(folder, "--seconds", "6")
    lines = await read_until(process, None)
    text = "\n".join(lines)
    assert await process.wait() == 0, text
    assert any(line.endswith(REFERENCE) for line in lines), text
    rows = [line for line in lines if line.startswith("│")]
    assert len(rows) == 12, text
    assert all(line.split("│")[3].strip() == "true" for line in rows), text
    assert any(line.strip().startswith("PAUSED") for line in lines), text
    assert "README" in text
    assert processes_of(folder) == []
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    ("beginning", "number"),
    [
        ("starting PostgreSQL", signal.SIGINT),
        ("starting the embedded", signal.SIGINT),
        ("loading", signal.SIGTERM),
        ("starting the service", signal.SIGINT),
        ("2 s", signal.SIGINT),
    ],
)
async def test_a_signal_at_any_moment_leaves_no_process_and_no_file(
    folder: Path, beginning: str, number: signal.Signals
) -> None:
    process = await start_demo(folder, "--seconds", "20")
    lines = await read_until(process, beginning)
    assert list(folder.iterdir()) != []
    process.send_signal(number)
    lines += await read_until(process, None)
    assert await process.wait() == 130, "\n".join(lines)
    assert not any("Traceback" in line for line in lines), "\n".join(lines)
    assert processes_of(folder) == []
    assert list(folder.iterdir()) == []


@pytest.mark.apache_kafka
async def test_on_given_servers_it_makes_its_own_and_leaves_none(
    folder: Path, postgres: Postgres, kafka: Kafka
) -> None:
    async def inventory() -> tuple[set[str], set[str]]:
        connection = await asyncpg.connect(postgres.url())
        databases = {row[0] for row in await connection.fetch("SELECT datname FROM pg_database")}
        await connection.close()
        admin = AIOKafkaAdminClient(bootstrap_servers=kafka.bootstrap)
        await admin.start()
        topics = {topic for topic in await admin.list_topics() if not topic.startswith("__")}
        await admin.close()
        return databases, topics

    before = await inventory()
    arguments = ("--kafka", kafka.bootstrap, "--database", postgres.url())
    process = await start_demo(folder, *arguments, "--seconds", "20")
    lines = await read_until(process, "2 s")
    during = await inventory()
    process.send_signal(signal.SIGINT)
    lines += await read_until(process, None)
    assert await process.wait() == 130, "\n".join(lines)
    assert (len(during[0] - before[0]), len(during[1] - before[1])) == (1, 6)
    assert await inventory() == before

    process = await start_demo(folder, *arguments, "--seconds", "6")
    lines = await read_until(process, None)
    assert await process.wait() == 0, "\n".join(lines)
    assert await inventory() == before
    assert processes_of(folder) == []
    assert list(folder.iterdir()) == []


NOW = datetime(2024, 5, 1, 12, tzinfo=UTC)
STEADY, TRIPPED, OBSERVED = (UUID(int=number, version=4) for number in (1, 2, 3))


def prospects(**numbers: int) -> list[Prospect]:
    """Contacted one second after the other, bounced half a second later."""
    rows: list[Prospect] = []
    for status, number in numbers.items():
        for _ in range(number):
            at = None if status == "pending" else NOW + timedelta(seconds=len(rows))
            rows.append(Prospect(uuid4(), status, at, at and at + timedelta(milliseconds=500)))
    return rows


def campaign(id_: UUID, rows: list[Prospect], status: str = "active", **more: Any) -> Campaign:
    stats, _ = proof.recount(rows)
    pause_reason = "bounce_rate" if status == "paused" else None
    return Campaign(id_, UUID(int=9), "email", f"campaign {id_.int % 10}", status, pause_reason, stats, rows, **more)


def news(of: Campaign, version: int, cause: str | None = None, trigger: str = "status_changed") -> Event:
    stats, by_status = proof.recount(of.prospects)
    row = {"id": str(of.id), "user_id": str(of.user_id), "type": of.type, "name": of.name, "status": of.status,
           "stats": stats, "pause_reason": of.pause_reason}  # fmt: skip
    data = {"campaign": row, "prospects_by_status": by_status, "version": version, "trigger": trigger}
    return Event(str(uuid4()), "campaign.stats_updated.v1", of.id, cause, data)


def true_evidence() -> Evidence:
    """A small world in which everything is true."""
    reference = campaign(proof.REFERENCE, prospects(pending=81, sent=34, replied=4, bounced=1))
    steady = campaign(STEADY, prospects(pending=5, sent=196, bounced=4))
    tripped = campaign(TRIPPED, prospects(pending=3, bounced=6, sent=114), "paused")
    observed = campaign(OBSERVED, prospects(sent=90, bounced=10), mode="observe")
    paused_at = (NOW + timedelta(hours=1)).isoformat()
    pause = {"version": 7, "sent": 120, "bounced": 6, "rate_bp": 500, "threshold_bp": 500, "min_sent": 100,
             "window": 500, "paused_at": paused_at}  # fmt: skip
    unknown = uuid4()
    rejection = {"campaign_id": str(unknown), "reason": "not_found"}
    return Evidence(
        campaigns={row.id: row for row in (reference, steady, tripped, observed)},
        audits=[
            Audit(TRIPPED, True, "enforce", "trip", 7, 120, 6),
            Audit(OBSERVED, False, "observe", "trip", None, 100, 10),
        ],
        events=[
            *(news(row, 7) for row in (reference, steady, tripped, observed)),
            Event("p", "campaign.paused.v1", TRIPPED, None, pause),
            Event("p", "campaign.paused.v1", TRIPPED, None, pause),  # at least once
            news(steady, 8, "asked", "sync_requested"),
            Event("r", "campaign.sync_rejected.v1", unknown, "in vain", rejection),
        ],
        dead_letters=[DeadLetter(("t", "0", "1"), b"garbage", "not_json")],
        asked={
            "asked": Asked(STEADY, "campaign.stats_updated.v1"),
            "in vain": Asked(unknown, "campaign.sync_rejected.v1"),
        },
        garbage=[b"garbage"],
        resumed={},
        paused_before=frozenset(),
        wrong_before=frozenset({STEADY}),
    )


def false_claims(evidence: Evidence) -> set[str]:
    return {check.claim.split(" (")[0] for check in proof.prove(evidence) if not check.holds}


def test_the_proof_holds_on_a_true_world() -> None:
    assert [check.problems for check in proof.prove(true_evidence())] == [[]] * 11
    assert false_claims(true_evidence()) == set()


def test_nothing_checked_proves_nothing() -> None:
    assert not Check("anything").holds
    assert "every pause is justified by its rows, counted at its moment" in false_claims(
        replace(true_evidence(), events=[], audits=[])
    )


def changed(evidence: Evidence, id_: UUID, **changes: Any) -> Evidence:
    return replace(evidence, campaigns={**evidence.campaigns, id_: replace(evidence.campaigns[id_], **changes)})


def pause_changed(evidence: Evidence, **changes: Any) -> Evidence:
    events = [replace(event, data=event.data | changes) if event.id == "p" else event for event in evidence.events]
    return replace(evidence, events=events)


@pytest.mark.parametrize(
    ("falsify", "claim"),
    [
        pytest.param(
            lambda e: changed(e, STEADY, stats=e.campaigns[STEADY].stats | {"sent": 195}),
            "numbers that were wrong at the start are right",
            id="stored stats are wrong",
        ),
        pytest.param(
            lambda e: changed(e, proof.REFERENCE, stats={"total": 120, "sent": 34, "replied": 4}),
            "the reference case is exactly as documented",
            id="the reference case is wrong",
        ),
        pytest.param(
            lambda e: replace(e, events=[event for event in e.events if event.campaign != OBSERVED]),
            "a follower's last stats_updated equals the row",
            id="news never published",
        ),
        pytest.param(
            lambda e: changed(e, STEADY, status="completed"),
            "a follower's last stats_updated equals the row",
            id="followers believe an old status",
        ),
        pytest.param(
            lambda e: pause_changed(e, bounced=5),
            "every pause is justified by its rows, counted at its moment",
            id="a pause names too few bounces",
        ),
        pytest.param(
            lambda e: changed(e, TRIPPED, prospects=prospects(bounced=5, sent=115)),
            "every pause is justified by its rows, counted at its moment",
            id="the rows do not justify the pause",
        ),
        pytest.param(
            lambda e: changed(e, TRIPPED, threshold_bp=600),
            "every pause is justified by its rows, counted at its moment",
            id="its own limit is higher",
        ),
        pytest.param(
            lambda e: pause_changed(e, paused_at=(NOW + timedelta(seconds=50)).isoformat()),
            "every pause is justified by its rows, counted at its moment",
            id="paused before it was due",
        ),
        pytest.param(
            lambda e: replace(e, events=[*e.events, replace(e.events[4], id="another")]),
            "one pause: one id, one audit row, one stats_updated of its version",
            id="one pause has two ids",
        ),
        pytest.param(
            lambda e: replace(e, audits=[*e.audits, replace(e.audits[0], version=9)]),
            "one pause: one id, one audit row, one stats_updated of its version",
            id="a pause in the audit was never told",
        ),
        pytest.param(
            lambda e: changed(e, TRIPPED, status="active", pause_reason=None),
            "who is paused was paused by the guard or by its user, and stays so",
            id="a pause that is not in the row",
        ),
        pytest.param(
            lambda e: changed(e, STEADY, status="paused", pause_reason="bounce_rate"),
            "who is paused was paused by the guard or by its user, and stays so",
            id="paused without a word",
        ),
        pytest.param(
            lambda e: changed(e, STEADY, prospects=prospects(sent=190, bounced=10)),
            "no campaign that still sends is over its limit",
            id="over the limit and not paused",
        ),
        pytest.param(
            lambda e: replace(e, audits=e.audits[:1]),
            "a campaign that is only observed is noted, not paused",
            id="an observed verdict is not noted",
        ),
        pytest.param(
            lambda e: replace(e, asked={**e.asked, "forgotten": Asked(STEADY, "campaign.stats_updated.v1")}),
            "every sync request got its one answer",
            id="a request without an answer",
        ),
        pytest.param(
            lambda e: replace(e, asked={**e.asked, "asked": Asked(STEADY, "campaign.sync_rejected.v1")}),
            "every sync request got its one answer",
            id="an answer of the wrong kind",
        ),
        pytest.param(
            lambda e: replace(e, events=[*e.events, news(e.campaigns[STEADY], 9, "asked", "sync_requested")]),
            "every sync request got its one answer",
            id="two answers",
        ),
        pytest.param(
            lambda e: replace(e, dead_letters=[]),
            "what cannot be read is in the dead letters, nothing else is",
            id="garbage was lost",
        ),
        pytest.param(
            lambda e: replace(e, dead_letters=[*e.dead_letters, DeadLetter(("t", "0", "2"), b"{}", "unknown_type")]),
            "what cannot be read is in the dead letters, nothing else is",
            id="something good among the dead letters",
        ),
    ],
)
def test_the_proof_finds_what_is_false(falsify: Callable[[Evidence], Evidence], claim: str) -> None:
    assert claim in false_claims(falsify(true_evidence()))


def test_a_change_whose_transaction_was_open_at_the_pause_may_be_missing() -> None:
    """The guard saw 100 contacts; the 101st was stamped, not yet committed, a moment before the pause."""
    evidence = true_evidence()
    rows = prospects(bounced=5, sent=96)
    paused_at = (NOW + timedelta(seconds=100, milliseconds=10)).isoformat()
    evidence = pause_changed(changed(evidence, TRIPPED, prospects=rows), sent=100, bounced=5, paused_at=paused_at)
    assert "every pause is justified by its rows, counted at its moment" not in false_claims(evidence)
    evidence = pause_changed(evidence, sent=99)
    assert "every pause is justified by its rows, counted at its moment" in false_claims(evidence)
