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


async def test_a_missing_topic_holds_up_no_other(publisher: Publisher, bus: Bus) -> None:
    topic = bus.topics.prefix + "campaign.stats-updated"
    rows = [
        Outgoing(topic, b"a", b"1"),
        Outgoing(bus.topics.prefix + MISSING, b"a", b"2"),
        Outgoing(topic, b"b", b"3"),
        Outgoing(topic, b"a", b"4"),
    ]
    sent = await publisher.publish(rows)
    assert [one.error is None for one in sent] == [True, False, True, True]
    assert [one.closed for one in sent] == [False, True, False, False]
    assert not any(one.refused for one in sent)
    assert MISSING in (sent[1].error or "")
    assert sorted(record.value for record in await bus.read(topic)) == [b"1", b"3", b"4"]


@pytest.mark.apache_kafka
@pytest.mark.parametrize("idempotence", [False, True])
async def test_only_rows_that_are_too_large_by_themselves_are_refused_and_the_others_keep_their_order(
    bus: Bus, idempotence: bool
) -> None:
    topic = bus.topics.prefix + "small"
    await create_topics(
        Connection(bus.bootstrap, {}), {topic: {"max.message.bytes": "2000"}}, partitions=2, replication=1
    )
    sizes = [500] * 40 + [5_000] + [10] * 300 + [6_000, 4_000] + [500] * 40
    rows = [Outgoing(topic, b"%d" % (n % 7), json.dumps([n, "x" * size]).encode()) for n, size in enumerate(sizes)]
    publisher = Publisher(Connection(bus.bootstrap, {}), idempotence=idempotence)
    left, refused = list(range(len(rows))), set[int]()
    try:
        for _ in range(5):  # a slow machine needs more than one call, each of which has a deadline
            if not left:
                break
            sent = await publisher.publish([rows[place] for place in left])
            refused |= {place for place, one in zip(left, sent, strict=True) if one.refused}
            left = [place for place, one in zip(left, sent, strict=True) if one.error is not None and not one.refused]
    finally:
        await publisher.close(2)
    assert left == []
    assert refused == {place for place, size in enumerate(sizes) if size > 2_000}
    records = await bus.read(topic)
    for key in {row.key for row in rows}:  # nothing follows a refused batch into its partition
        kept = [row.value for place, row in enumerate(rows) if row.key == key and place not in refused]
        assert list(dict.fromkeys(record.value for record in records if record.key == key)) == kept
