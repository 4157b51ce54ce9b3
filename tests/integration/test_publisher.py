"""The publisher on a real broker: rows of a key keep their order whatever is wrong with one of them."""

import json
from collections.abc import AsyncIterator

import pytest

from consumer.broker import Connection, Outgoing, Publisher, create_topics
from tests.conftest import Bus

MISSING = "no-such-topic"


@pytest.fixture
async def publisher(bus: Bus) -> AsyncIterator[Publisher]:
    """One that works with either broker."""
    one = Publisher(Connection(bus.bootstrap, {}), idempotence=False)
    yield one
    await one.close(2)


@pytest.mark.parametrize("alone", [False, True])
async def test_a_younger_event_never_passes_an_elder_whose_topic_is_missing(
    publisher: Publisher, bus: Bus, alone: bool
) -> None:
    topic = bus.topics.prefix + "campaign.stats-updated"
    rows = [
        Outgoing(topic, b"a", b"1"),
        Outgoing(bus.topics.prefix + MISSING, b"a", b"2"),
        Outgoing(topic, b"b", b"3"),
        Outgoing(topic, b"a", b"4"),
        Outgoing(topic, b"b", b"5"),
    ]
    sent = await publisher.publish(rows, alone=alone)
    assert [one.error is None for one in sent] == [True, False, True, False, True]
    assert not any(one.refused for one in sent)
    assert MISSING in (sent[1].error or "")
    assert sorted(record.value for record in await bus.read(topic)) == [b"1", b"3", b"5"]


@pytest.mark.apache_kafka
async def test_a_row_that_is_too_large_is_refused_alone_and_costs_its_neighbours_nothing(
    publisher: Publisher, bus: Bus
) -> None:
    topic = bus.topics.prefix + "small"
    await create_topics(
        Connection(bus.bootstrap, {}), {topic: {"max.message.bytes": "2000"}}, partitions=1, replication=1
    )
    rows = [Outgoing(topic, b"a", json.dumps("x" * size).encode()) for size in (10, 5_000, 20, 6_000, 30)]
    sent = await publisher.publish(rows, alone=True)
    assert [one.refused for one in sent] == [False, True, False, True, False]
    assert [one.error is None for one in sent] == [True, False, True, False, True]
    assert [record.value for record in await bus.read(topic)] == [rows[place].value for place in (0, 2, 4)]
