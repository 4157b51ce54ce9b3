"""The relay under any pattern of publish failures: in order, none lost, none deleted that was not acknowledged."""

import asyncio
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry
from structlog.testing import capture_logs

from consumer import health as health_module
from consumer.errors import Unavailable
from consumer.health import Health
from consumer.metrics import Metrics
from consumer.relay import ALONE_ROWS, TURN_BYTES, TURN_ROWS, Relay
from schemas.events import PAUSED, STATS_UPDATED
from tests.unit.builders import campaign_id


@pytest.fixture(autouse=True, scope="module")
def no_waiting() -> Iterator[None]:
    """Backing off is none of this file's business."""
    with pytest.MonkeyPatch.context() as patch, capture_logs():
        patch.setattr(health_module, "FIRST_BACKOFF_S", 0.0)
        yield


@dataclass(frozen=True, slots=True)
class Row:
    id: int
    campaign_id: UUID
    type: str = STATS_UPDATED
    event: bytes = b"{}"


@dataclass(frozen=True, slots=True)
class Sent:
    error: str | None = None
    refused: bool = False


@dataclass
class Outbox:
    """The fake table: transactions that raise change nothing. `fail_commits`: how the next ones end."""

    rows: dict[int, Row]
    shards: list[int] = field(default_factory=lambda: [0])
    fail_commits: list[bool] = field(default_factory=list)
    asked: list[tuple[int, int]] = field(default_factory=list)
    deleted: list[int] = field(default_factory=list)
    set_aside: dict[int, str] = field(default_factory=dict)

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator["Turn"]:
        turn = Turn(self)
        yield turn
        if self.fail_commits and self.fail_commits.pop(0):
            raise Unavailable("database", "lost at the commit")
        for row_id in (*turn.published, *turn.refused):
            del self.rows[row_id]
        self.deleted.extend(turn.published)
        self.set_aside.update(turn.refused)


@dataclass
class Turn:
    outbox: Outbox
    published: list[int] = field(default_factory=list)
    refused: dict[int, str] = field(default_factory=dict)

    async def lock_shards(self) -> list[int]:
        return self.outbox.shards

    async def read_outbox(self, shards: Sequence[int], rows: int, size: int) -> list[Row]:
        assert shards == self.outbox.shards
        self.outbox.asked.append((rows, size))
        return [self.outbox.rows[row_id] for row_id in sorted(self.outbox.rows)][:rows]

    async def finish_outbox(self, published: Sequence[int], refused: Mapping[int, str]) -> None:
        self.published.extend(published)
        self.refused.update(refused)


@dataclass
class Broker:
    """The fake broker, as broker.Publisher promises it: alone stops at the first failure, only alone may refuse.

    `plan` says what becomes of the next rows; when it is used up everything is acknowledged.
    """

    ids: Mapping[tuple[UUID, bytes], int]
    plan: list[str] = field(default_factory=list)
    poison: frozenset[int] = frozenset()
    log: list[int] = field(default_factory=list)  # ids as they arrived, whether or not we heard of it
    acknowledged: set[int] = field(default_factory=set)
    calls: list[bool] = field(default_factory=list)

    async def __call__(self, rows: Sequence[tuple[str, UUID, bytes]], *, alone: bool) -> list[Sent]:
        self.calls.append(alone)
        results: list[Sent] = []
        for place, (_, campaign, event) in enumerate(rows):
            row_id = self.ids[campaign, event]
            what = self.plan.pop(0) if self.plan else "ack"
            if what == "away" and place == 0:
                raise Unavailable("kafka", "no broker")
            if row_id in self.poison:
                results.append(Sent("too large", refused=alone))
            elif what in ("ack", "away"):
                self.log.append(row_id)
                self.acknowledged.add(row_id)
                results.append(Sent())
            else:
                if what == "unheard":
                    self.log.append(row_id)
                results.append(Sent("NotLeaderForPartitionError"))
            if alone and results[-1].error is not None and not results[-1].refused:
                results += [Sent("not tried")] * (len(rows) - len(results))
                break
        return results


def outbox_of(campaigns: Sequence[int]) -> tuple[Outbox, dict[tuple[UUID, bytes], int]]:
    """One row per number, of the campaign of that number, in this order."""
    rows = {
        place: Row(place, campaign_id(number), event=str(place).encode()) for place, number in enumerate(campaigns, 1)
    }
    return Outbox(rows), {(row.campaign_id, row.event): row.id for row in rows.values()}


def relay_of(outbox: Outbox, broker: Broker) -> tuple[Relay, Metrics, Health]:
    metrics, health = Metrics(CollectorRegistry()), Health()
    return Relay(outbox, broker, metrics, health), metrics, health


def value(metrics: Metrics, name: str, **labels: str) -> float:
    return metrics.registry.get_sample_value(f"campaign_stats_{name}", labels) or 0.0


async def drained(relay: Relay, outbox: Outbox) -> None:
    """Turn after turn until the outbox is empty; each failure of a plan costs one turn at most."""
    for _ in range(200):
        try:
            if not await relay.turn() and not outbox.rows:
                return
        except Unavailable:
            continue
    pytest.fail("the outbox was not drained")


plans = st.lists(st.sampled_from(("ack", "ack", "fail", "unheard", "away")), max_size=30)


@given(
    campaigns=st.lists(st.integers(0, 3), max_size=12),
    plan=plans,
    poison=st.sets(st.integers(1, 12), max_size=3),
    fail_commits=st.lists(st.booleans(), max_size=6),
)
def test_rows_of_a_campaign_go_out_in_order_and_none_is_lost(
    campaigns: list[int], plan: list[str], poison: set[int], fail_commits: list[bool]
) -> None:
    outbox, ids = outbox_of(campaigns)
    rows = dict(outbox.rows)
    outbox.fail_commits = fail_commits
    broker = Broker(ids, plan, frozenset(poison))
    asyncio.run(drained(relay_of(outbox, broker)[0], outbox))

    assert set(outbox.set_aside) == poison & rows.keys()
    assert sorted([*outbox.deleted, *outbox.set_aside]) == sorted(rows)
    assert set(outbox.deleted) <= broker.acknowledged
    for campaign in {row.campaign_id for row in rows.values()}:
        mine = [row_id for row_id in broker.log if rows[row_id].campaign_id == campaign]
        last = {row_id: place for place, row_id in enumerate(mine)}
        # Who reads the topic to its end meets the last copy of each event in the order of the outbox.
        assert sorted(last, key=last.__getitem__) == sorted(last)
        finished = [row_id for row_id in outbox.deleted if rows[row_id].campaign_id == campaign]
        assert finished == sorted(finished)


@given(campaigns=st.lists(st.integers(0, 3), min_size=1, max_size=12), plan=plans)
def test_nothing_is_deleted_before_it_and_its_elders_were_acknowledged(campaigns: list[int], plan: list[str]) -> None:
    outbox, ids = outbox_of(campaigns)
    rows = dict(outbox.rows)
    broker = Broker(ids, plan)
    relay = relay_of(outbox, broker)[0]

    async def watched() -> None:
        for _ in range(100):
            with suppress(Unavailable):
                await relay.turn()
            for row_id in outbox.deleted:
                elders = {i for i, row in rows.items() if row.campaign_id == rows[row_id].campaign_id and i <= row_id}
                assert elders <= broker.acknowledged
            if not outbox.rows:
                return
        pytest.fail("the outbox was not drained")

    asyncio.run(watched())


async def test_a_row_whose_elder_failed_is_repeated_and_other_campaigns_go_on() -> None:
    outbox, ids = outbox_of([0, 0, 1, 1])
    relay, metrics, _ = relay_of(outbox, Broker(ids, ["fail", "ack", "ack", "ack"]))
    with pytest.raises(Unavailable):
        await relay.turn()
    assert outbox.deleted == [3, 4]
    assert list(outbox.rows) == [1, 2]
    assert value(metrics, "published_total", type=STATS_UPDATED) == 2
    assert value(metrics, "publish_failures_total") == 1


async def test_after_a_failed_send_one_turn_goes_row_by_row_and_the_next_in_batches_again() -> None:
    outbox, ids = outbox_of([0, 1, 2])
    broker = Broker(ids, ["ack", "fail", "fail"])
    relay, _, _ = relay_of(outbox, broker)
    with pytest.raises(Unavailable):
        await relay.turn()
    await relay.turn()
    assert broker.calls == [False, True]
    assert outbox.asked == [(TURN_ROWS, TURN_BYTES), (ALONE_ROWS, TURN_BYTES)]
    assert outbox.deleted == [1, 2, 3]
    for place in (4, 5):
        outbox.rows[place] = Row(place, campaign_id(9), event=str(place).encode())
        broker.ids = {**broker.ids, (campaign_id(9), str(place).encode()): place}
        await relay.turn()
    assert broker.calls == [False, True, False, False]


async def test_a_refused_row_is_set_aside_only_when_it_was_sent_alone() -> None:
    outbox, ids = outbox_of([0, 0, 1])
    broker = Broker(ids, poison=frozenset({1}))
    relay, metrics, _ = relay_of(outbox, broker)
    with pytest.raises(Unavailable):
        await relay.turn()
    assert (outbox.set_aside, list(outbox.rows), broker.calls) == ({}, [1, 2], [False])
    await relay.turn()
    assert (outbox.set_aside, outbox.deleted, broker.calls) == ({1: "too large"}, [3, 2], [False, True])
    assert value(metrics, "set_aside_total") == 1
    assert value(metrics, "published_total", type=STATS_UPDATED) == 2


async def test_an_unreachable_broker_is_an_outage_of_the_relay_and_keeps_everything() -> None:
    outbox, ids = outbox_of([0])
    relay, metrics, _ = relay_of(outbox, Broker(ids, ["away"]))
    with pytest.raises(Unavailable) as raised:
        await relay.turn()
    assert raised.value.dependency == "relay"
    assert list(outbox.rows) == [1]
    assert value(metrics, "published_total", type=STATS_UPDATED) == 0


async def test_nothing_counts_as_published_while_its_deletion_is_not_durable() -> None:
    outbox, ids = outbox_of([0])
    outbox.fail_commits = [True]
    broker = Broker(ids)
    relay, metrics, _ = relay_of(outbox, broker)
    with pytest.raises(Unavailable):
        await relay.turn()
    assert (broker.log, list(outbox.rows)) == ([1], [1])
    assert value(metrics, "published_total", type=STATS_UPDATED) == 0
    assert await relay.turn() == 1
    assert broker.log == [1, 1]
    assert value(metrics, "published_total", type=STATS_UPDATED) == 1


async def test_every_event_is_published_under_its_own_type_key_and_bytes() -> None:
    outbox = Outbox({7: Row(7, campaign_id(0), PAUSED, b'{"a":1}')})
    published: list[object] = []

    async def publish(rows: Sequence[tuple[str, UUID, bytes]], *, alone: bool) -> list[Sent]:
        published.append((list(rows), alone))
        return [Sent()]

    metrics = Metrics(CollectorRegistry())
    assert await Relay(outbox, publish, metrics, Health()).turn() == 1
    assert published == [([(PAUSED, campaign_id(0), b'{"a":1}')], False)]
    assert value(metrics, "published_total", type=PAUSED) == 1


@pytest.mark.parametrize(("shards", "rows"), [([], [0]), ([0], [])])
async def test_a_turn_without_a_shard_or_a_row_publishes_nothing(shards: list[int], rows: list[int]) -> None:
    outbox, ids = outbox_of(rows)
    outbox.shards = shards
    broker = Broker(ids)
    assert await relay_of(outbox, broker)[0].turn() == 0
    assert broker.calls == []


async def test_it_runs_until_the_outbox_is_empty_through_outages_and_ends_when_the_process_stops() -> None:
    outbox, ids = outbox_of([0, 1, 0, 1])
    broker = Broker(ids, ["away", "fail", "ack", "unheard"])
    relay, _, health = relay_of(outbox, broker)
    running = asyncio.create_task(relay.run())
    for _ in range(1_000):
        if not outbox.rows:
            break
        await asyncio.sleep(0)
    assert outbox.rows == {}
    assert sorted(outbox.deleted) == [1, 2, 3, 4]
    health.stopping = True
    relay.wake()
    await running
    assert health.degraded == []
