"""Rights that are taken away and given back while the service runs."""

import asyncio
import time

import pytest

from consumer.broker import Source
from consumer.errors import Unavailable
from tests.conftest import Bus
from tests.faults.edits import Edit, broken
from tests.faults.stage import SLACK
from tests.faults.strict import Strict
from tests.servers import ApacheKafka
from tests.world import hint

pytestmark = pytest.mark.apache_kafka

CAMPAIGN = "8c2b2d4e-e29b-41d4-a716-446655440000"
FOLLOWS_S = 15 * SLACK  # after the right is back: a backoff of the reader, then a join


@pytest.fixture(scope="module")
def kafka(strict: Strict) -> ApacheKafka:
    """Whoever uses its plain listener may do everything."""
    return strict.kafka


async def for_ever(source: Source) -> None:
    while True:
        await source.poll()


async def regained(strict: Strict, bus: Bus) -> int:
    """The right to read as a group is lost for a moment; how many of two records were heard.

    AssertionError when reading does not go on by itself.
    """
    topics, user = bus.topics, ("--allow-principal", "User:service")
    prefixed = ("--resource-pattern-type", "prefixed")
    await strict.acl(
        "--add", *user, "--operation", "Read", "--operation", "Describe", "--topic", topics.prefix, *prefixed
    )
    may_join = (*user, "--operation", "Read", "--group", topics.prefix, *prefixed)
    await strict.acl("--add", *may_join)
    source = Source(strict.as_user(), topics.read, f"{topics.prefix}group", fetch_max_wait_ms=50, revocation_s=8)
    topic = topics.of("prospect.status_changed.v1")
    heard = set[tuple[int, int]]()  # nothing is committed here, so who joins again reads from the beginning

    async def nothing() -> None:
        """No work is under way."""

    async def hear(records: int, within_s: float) -> None:
        deadline = time.monotonic() + within_s
        while len(heard) < records:
            assert time.monotonic() < deadline, f"heard {len(heard)} of {records} within {within_s} s"
            try:
                batches, _ = await source.poll()
                heard.update((batch.partition[1], record.offset) for batch in batches for record in batch.records)
            except Unavailable:
                await asyncio.sleep(0.2)

    await source.start(nothing, lambda _: None)
    try:
        await bus.publish(topic, hint(CAMPAIGN))
        await hear(1, 20)
        await strict.acl("--remove", *may_join)
        with pytest.raises(Unavailable):
            await asyncio.wait_for(for_ever(source), 30)
        await strict.acl("--add", *may_join)
        await bus.publish(topic, hint(CAMPAIGN))
        await hear(2, FOLLOWS_S)
        return len(heard)
    finally:
        await source.stop(5)


@pytest.mark.faults
async def test_the_right_to_the_group_lost_for_a_moment_stops_nobody_for_ever(strict: Strict, bus: Bus) -> None:
    """The right to read as a group lost for a moment: reading goes on by itself when it is back"""
    assert await regained(strict, bus) == 2


@pytest.mark.faults
async def test_the_same_loss_finds_a_source_that_is_broken(strict: Strict, bus: Bus) -> None:
    """Breakage found by a lost right [a dead heartbeat is left dead]"""
    edit = Edit("consumer.broker.source:Source._revive", "coordinator.request_rejoin()", "pass")
    with broken([edit]), pytest.raises(AssertionError, match="heard 1 of 2"):
        await regained(strict, bus)
