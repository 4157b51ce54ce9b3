"""An invented v2 beside v1, through the real service: both are published for every fact, or neither."""

import asyncpg
import pytest

from consumer import broker
from schemas import events
from schemas.events import CampaignPausedV1, Envelope
from tests.conftest import Bus, StartService, eventually
from tests.world import add_campaign, hint

V2 = "campaign.paused.v2"
SERVICE = "tests.service.with_paused_v2"


@pytest.fixture
async def second_topic(bus: Bus) -> str:
    """That of v2."""
    name = bus.topics.prefix + V2
    await broker.create_topics(broker.Connection(bus.bootstrap, {}), {name: {}}, partitions=3, replication=1)
    return name


async def test_both_versions_are_published_for_every_fact_or_neither(
    service: StartService, bus: Bus, db: asyncpg.Connection, second_topic: str
) -> None:
    campaigns = [await add_campaign(db, {"pending": 3, "sent": 114, "bounced": 6}) for _ in range(3)]
    await db.execute(
        f"""CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'not yet'; END $$;
            CREATE TRIGGER refuse BEFORE INSERT ON campaign_stats.outbox FOR EACH ROW
            WHEN (NEW.type = '{V2}') EXECUTE FUNCTION refuse()"""
    )
    running = await service(module=SERVICE)
    for campaign in campaigns:
        await bus.publish(bus.topics.of(events.STATUS_CHANGED), hint(campaign), key=str(campaign))

    async def all_failed() -> bool:
        return bool(await db.fetchval("SELECT count(*) = 3 FROM campaign_stats.campaign_state WHERE failures > 0"))

    await eventually(all_failed, "the second row is refused for each", running)
    assert await bus.read(bus.topics.of(events.PAUSED)) == []
    assert await bus.read(second_topic) == []
    assert await db.fetchval("SELECT count(*) FROM campaigns WHERE status = 'active'") == 3

    await db.execute("DROP TRIGGER refuse ON campaign_stats.outbox")

    async def told() -> bool:
        topics = (bus.topics.of(events.PAUSED), second_topic)
        return [len({event["subject"] for event in await bus.events(topic)}) for topic in topics] == [3, 3]

    await eventually(told, "both versions are published", running, timeout_s=30)
    firsts = {
        event.subject: event
        for event in [
            Envelope[CampaignPausedV1].model_validate_json(record.value)
            for record in await bus.read(bus.topics.of(events.PAUSED))
        ]
    }
    for event in await bus.events(second_topic):
        [first] = [one for subject, one in firsts.items() if str(subject) == event["subject"]]
        assert event["type"] == V2
        assert (event["data"]["version"], event["data"]["limit_bp"]) == (first.data.version, first.data.threshold_bp)
        assert event["id"] != first.id
    ids = [event["id"] for event in await bus.events(second_topic)]
    assert len(set(ids)) == len(campaigns)
