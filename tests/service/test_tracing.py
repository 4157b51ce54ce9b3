"""A trace goes through the service: hint, recount, outbox, published event."""

import asyncio
import json
from collections import Counter
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import asyncpg
import pytest

from schemas import events
from tests.conftest import Bus, RunningService, StartService, eventually
from tests.world import REFERENCE, add_campaign, hint

TRACE = "0af7651916cd43dd8448eb211c80319c"
SENDER = "b7ad6b7169203331"


@pytest.fixture
def spans_file(environment: dict[str, str], tmp_path: Path) -> Path:
    """Where the service writes its spans when it ends."""
    environment["SPANS"] = str(tmp_path / "spans.json")
    return tmp_path / "spans.json"


async def spans_of(service: RunningService, file: Path) -> list[dict[str, Any]]:
    service.terminate()
    await service.wait()
    found: list[dict[str, Any]] = json.loads(file.read_text())
    return found


async def test_one_trace_leads_from_the_hint_to_the_published_event(
    service: StartService, bus: Bus, db: asyncpg.Connection, spans_file: Path
) -> None:
    campaign = await add_campaign(db, REFERENCE)
    one = await service(module="tests.service.with_tracing")
    cause = hint(campaign, traceparent=f"00-{TRACE}-{SENDER}-01")
    await bus.publish(bus.topics.of(events.STATUS_CHANGED), cause, key=str(campaign))
    [event] = await eventually(lambda: bus.events(bus.topics.of(events.STATS_UPDATED)), service=one)

    def scraped() -> str:
        asked = Request(one.url + "/metrics", headers={"Accept": "application/openmetrics-text; version=1.0.0"})
        with urlopen(asked, timeout=5) as answer:
            text: str = answer.read().decode()
            return text

    async def leads_to_the_trace() -> bool:
        measured = [
            line for line in (await asyncio.to_thread(scraped)).splitlines() if "event_delay_seconds_bucket" in line
        ]
        return any(f'trace_id="{TRACE}"' in line for line in measured)

    await eventually(leads_to_the_trace, "from the number to the trace, once its row is off the outbox", one)
    spans = await spans_of(one, spans_file)
    assert [span["name"] for span in spans] == ["recount", "publish"]
    recount, publish = spans
    assert (recount["kind"], publish["kind"]) == ("CONSUMER", "PRODUCER")
    assert {span["trace"] for span in spans} == {TRACE}
    assert recount["parent"] == SENDER
    assert publish["parent"] == recount["span"], "through the outbox"
    assert event["traceparent"] == f"00-{TRACE}-{recount['span']}-01", "and on to who reads the event"
    assert recount["attributes"] == {
        "messaging.system": "kafka", "messaging.operation.name": "recount", "messaging.batch.message_count": 1
    }  # fmt: skip


async def test_a_batch_is_one_span_linked_to_the_sampled_traces_only(
    service: StartService, bus: Bus, db: asyncpg.Connection, spans_file: Path
) -> None:
    campaigns = [await add_campaign(db, {"sent": number + 1}) for number in range(20)]
    causes = [
        hint(campaign, traceparent=f"00-{number + 1:032x}-{SENDER}-0{number % 2}")
        for number, campaign in enumerate(campaigns)
    ]
    for campaign, cause in zip(campaigns, causes, strict=True):  # before it runs: they come in one batch
        await bus.publish(bus.topics.of(events.STATUS_CHANGED), cause, key=str(campaign), partition=0)
    one = await service(module="tests.service.with_tracing")

    async def told() -> list[dict[str, Any]]:
        found = await bus.events(bus.topics.of(events.STATS_UPDATED))
        return found if len(found) == len(campaigns) else []

    published = await eventually(told, service=one)
    spans = await spans_of(one, spans_file)
    recounts = [span for span in spans if span["name"] == "recount"]
    assert sum(span["attributes"]["messaging.batch.message_count"] for span in recounts) == len(campaigns)
    assert len(recounts) < len(campaigns), "a batch, not an event each"
    sampled = {cause["traceparent"][3:35] for cause in causes if cause["traceparent"].endswith("1")}
    for name in ("recount", "publish"):
        linked = Counter(link for span in spans if span["name"] == name for link in span["links"])
        assert set(linked) == sampled
        assert max(linked.values()) == 1
    by_id = {cause["id"]: cause["traceparent"] for cause in causes}
    alone = {span["trace"] for span in recounts if len(span["links"]) == 1}
    for event in published:
        before = by_id[event["causationid"]]
        assert event["traceparent"][3:35] == before[3:35], "each stays in the trace it came in"
        assert event["traceparent"] == before or before[3:35] in alone


async def test_a_span_of_work_that_failed_says_the_kind_of_error_and_quotes_no_row(
    service: StartService, bus: Bus, db: asyncpg.Connection, spans_file: Path
) -> None:
    campaign = await add_campaign(db, {"sent": 1})
    await db.execute(
        """CREATE FUNCTION quote_row() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
               RAISE EXCEPTION USING ERRCODE = 'check_violation', MESSAGE = 'row of planted@example.org',
                   DETAIL = 'planted@example.org'; END $$;
           CREATE TRIGGER quote BEFORE UPDATE ON campaigns FOR EACH ROW EXECUTE FUNCTION quote_row()"""
    )
    one = await service(module="tests.service.with_tracing")
    await bus.publish(bus.topics.of(events.STATUS_CHANGED), hint(campaign, traceparent=f"00-{TRACE}-{SENDER}-01"))
    await eventually(lambda: one.messages("chunk failed, its campaigns are deferred one by one"), service=one)
    spans = await spans_of(one, spans_file)
    assert "ERROR CheckViolationError" in [span["status"] for span in spans]
    assert "planted@example.org" not in spans_file.read_text()
