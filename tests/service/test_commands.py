"""The commands as people and scripts meet them: help with an example, clear refusals, completion; change records."""

import asyncio
import json
import re
import sys
from pathlib import Path
from uuid import uuid4

import asyncpg
import pytest

from consumer import broker
from tests.conftest import Bus, StartService, command, eventually
from tests.servers import REPOSITORY
from tests.world import REFERENCE, add_campaign, expected_stats, hint, stats_of, sync_request

COMMANDS = ["run", "migrate", "topics", "sync", "why", "drift", "reconcile", "tail", "check-event", "doctor", "demo",
            "dead-letters list", "dead-letters show", "dead-letters redrive", "deferred list", "deferred retry",
            "outbox list", "outbox requeue", "replay"]  # fmt: skip
BARE = {"PATH": "/usr/bin:/bin", "TERM": "dumb", "COLUMNS": "200"}


async def test_every_command_has_help_with_an_example_and_needs_no_settings_for_it() -> None:
    async def one(name: str) -> None:
        code, out, error = await command(BARE, *name.split(), "--help")
        assert (code, error) == (0, ""), name
        assert re.search(rf"Example: +campaign-stats {name}", out), name

    for begin in range(0, len(COMMANDS), 4):
        await asyncio.gather(*(one(name) for name in COMMANDS[begin : begin + 4]))
    code, out, _ = await command(BARE, "--help")
    assert code == 0
    assert [name for name in COMMANDS if name.split()[0] not in out] == []


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
async def test_the_shell_completes_commands(shell: str) -> None:
    code, out, _ = await command({**BARE, "_CAMPAIGN_STATS_COMPLETE": f"source_{shell}"})
    assert code == 0
    assert "campaign-stats" in out
    asked = {**BARE, "_CAMPAIGN_STATS_COMPLETE": f"complete_{shell}", "_TYPER_COMPLETE_ARGS": "campaign-stats rec"}
    code, out, _ = await command(
        {**asked, "COMP_WORDS": "campaign-stats rec", "COMP_CWORD": "1", "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    )
    assert "reconcile" in out


async def check(event: object, *arguments: str) -> tuple[int, str]:
    """Exit code and output of check-event, the event on stdin."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "consumer", "check-event", "-", *arguments, env=BARE, cwd=REPOSITORY,
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    out, error = await process.communicate(event if isinstance(event, bytes) else json.dumps(event).encode())
    assert b"Traceback" not in error
    return process.returncode or 0, (out + error).decode()


async def test_check_event_says_what_an_event_is_or_why_it_is_refused(tmp_path: Path) -> None:
    campaign_id = uuid4()
    assert await check(hint(campaign_id)) == (0, f"accepted: a hint for campaign {campaign_id}\n")
    code, out = await check(sync_request(campaign_id), "--json")
    assert (code, json.loads(out)) == (
        0,
        {"accepted": True, "kind": "sync_request", "campaign_id": str(campaign_id)},
    )
    code, out = await check({**hint(campaign_id), "type": "prospect.status_changed.v2"})
    assert (code, "newer version" in out) == (0, True)
    code, out = await check(hint(campaign_id, data={"to_status": ""}))
    assert code == 1
    assert out.startswith("refused (invalid_data): $.data.to_status: expected ")
    code, out = await check(b"{", "--json")
    assert (code, json.loads(out)["reason"]) == (1, "not_json")
    headers = ["ce_specversion=1.0", "ce_id=1", "ce_source=engine", "ce_type=prospect.status_changed.v1"]
    binary = [part for header in headers for part in ("--header", header)]
    assert (await check(hint(campaign_id)["data"], *binary))[0] == 0
    assert (await check(hint(campaign_id)["data"], *binary[:-2]))[0] == 1
    assert (await check(hint(campaign_id), "--header", "nonsense"))[0] == 2
    file = tmp_path / "event.json"
    file.write_text(json.dumps(hint(campaign_id)))
    assert (await command(BARE, "check-event", str(file)))[0] == 0
    code, _, error = await command(BARE, "check-event", str(tmp_path / "none.json"))
    assert (code, "none.json" in error) == (2, True)


async def test_change_records_are_hints_and_bad_ones_dead_letters(
    service: StartService, bus: Bus, db: asyncpg.Connection, environment: dict[str, str]
) -> None:
    before, after = await add_campaign(db, REFERENCE), await add_campaign(db, {"sent": 2})
    topic = f"cdc-{uuid4().hex[:8]}.public.campaign_prospects"  # no prefix of ours
    code, _, error = await command({**environment, "CAMPAIGN_STATS_CDC_TOPIC": topic}, "run")
    assert (code, f"topic {topic} is missing" in error) == (2, True)
    await broker.create_topics(broker.Connection(bus.bootstrap, {}), {topic: {}}, partitions=2, replication=1)
    running = await service(cdc_topic=topic)
    change = {
        "op": "u",
        "before": {"campaign_id": str(before)},
        "after": {"campaign_id": str(after)},
        "source": {"table": "campaign_prospects"},
    }
    bad = await bus.publish(topic, {"op": "d", "before": {"id": "x"}, "after": None}, partition=0)
    await bus.publish(topic, {"schema": {}, "payload": change}, partition=0)
    await bus.publish(topic, None, key="x", partition=0)
    await bus.publish(topic, {**change, "source": {"table": "campaigns"}}, partition=0)

    async def told() -> bool:
        return len(await bus.events(bus.topics.prefix + "campaign.stats-updated")) == 2

    await eventually(told, "both campaigns are recounted", running)
    assert await stats_of(db, before) == expected_stats(REFERENCE)
    assert await stats_of(db, after) == expected_stats({"sent": 2})
    events = await bus.events(bus.topics.prefix + "campaign.stats-updated")
    assert {event["data"]["trigger"] for event in events} == {"status_changed"}
    assert not any("causationid" in event for event in events)
    [letter] = await bus.read(bus.topics.prefix + "campaign-stats.dead-letters")
    headers = dict(letter.headers)
    assert (headers["dead-letter-topic"], headers["dead-letter-reason"]) == (topic.encode(), b"invalid_data")
    assert int(headers["dead-letter-offset"]) == bad.offset

    async def counted() -> bool:
        metrics = await running.metrics()
        return [metrics[f'campaign_stats_records_total{{kind="{kind}"}}'] for kind in ("change", "tombstone")] == [1, 2]

    await eventually(counted, "each is counted", running)


async def test_topics_lists_what_is_there_and_makes_what_is_not(environment: dict[str, str]) -> None:
    own = {**environment, "CAMPAIGN_STATS_TOPIC_PREFIX": f"n{uuid4().hex[:8]}."}
    code, out, _ = await command(own, "topics", "--json")
    assert code == 1
    assert [(line["present"], line["created"]) for line in json.loads(out)] == [(False, False)] * 6
    code, out, _ = await command(own, "topics", "--create", "--partitions", "2", "--replication", "1")
    assert (code, out.count("created "), out.count("present ")) == (0, 6, 6)
    code, out, _ = await command(own, "topics", "--create", "--replication", "1", "--json")
    assert (code, {(line["present"], line["created"]) for line in json.loads(out)}) == (0, {(True, False)})
