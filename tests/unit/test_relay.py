"""The relay under any pattern of publish failures: in order, none lost, none deleted that was not acknowledged."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry
from structlog.testing import capture_logs

from consumer import health as health_module
from consumer import relay as relay_module
from consumer.errors import Unavailable
from consumer.health import Health
from consumer.metrics import Metrics
from consumer.relay import PROBE_ROWS, TURN_BYTES, TURN_ROWS, Relay
from schemas.events import PAUSED, STATS_UPDATED, SYNC_REJECTED
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
    since: datetime | None = None
    fact: str | None = None


@dataclass(frozen=True, slots=True)
class Sent:
    error: str | None = None
    refused: bool = False
    closed: bool = False


@dataclass
class Outbox:
    """The fake table: transactions that raise change nothing. `fail_commits`: how the next ones end."""

    rows: dict[int, Row]
    shards: list[int] = field(default_factory=lambda: [0])
    fail_commits: list[bool] = field(default_factory=list)
    asked: list[tuple[int, int, Sequence[str] | None]] = field(default_factory=list)
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
        return self.outbox.shards if self.outbox.rows else []  # only those with something to publish

    async def read_outbox(self, shards: Sequence[int], rows: int, size: int, types: Sequence[str] | None) -> list[Row]:
        assert shards == self.outbox.shards
        self.outbox.asked.append((rows, size, types))
        found = [row for _, row in sorted(self.outbox.rows.items()) if types is None or row.type in types]
        return found[:rows]

    async def finish_outbox(self, published: Sequence[int], refused: Mapping[int, str]) -> None:
        self.published.extend(published)
        self.refused.update(refused)

    async def has_outbox(self, event_type: str) -> bool:
        return any(row.type == event_type for row in self.outbox.rows.values())


@dataclass
class Broker:
    """The fake broker, as broker.Publisher promises it: a closed topic takes no row, the others are not concerned.

    `plan` says what becomes of the next rows; when it is used up everything is acknowledged. `closed` are types.
    """

    ids: Mapping[tuple[UUID, bytes], int]
    plan: list[str] = field(default_factory=list)
    poison: frozenset[int] = frozenset()
    closed: set[str] = field(default_factory=set)
    log: list[int] = field(default_factory=list)  # ids as they arrived, whether or not we heard of it
    acknowledged: set[int] = field(default_factory=set)
    calls: list[int] = field(default_factory=list)

    async def __call__(self, rows: Sequence[tuple[str, UUID, bytes]]) -> list[Sent]:
        self.calls.append(len(rows))
        results: list[Sent] = []
        for place, (type_, campaign, event) in enumerate(rows):
            row_id = self.ids[campaign, event]
            if type_ in self.closed:
                results.append(Sent("closed", closed=True))
                continue
            what = self.plan.pop(0) if self.plan else "ack"
            if what == "away" and place == 0:
                raise Unavailable("kafka", "no broker")
            if row_id in self.poison:
                results.append(Sent("too large", refused=True))
            elif what in ("ack", "away"):
                self.log.append(row_id)
                self.acknowledged.add(row_id)
                results.append(Sent())
            else:
                if what == "unheard":
                    self.log.append(row_id)
                results.append(Sent("NotLeaderForPartitionError"))
        return results


def outbox_of(
    campaigns: Sequence[int], types: Sequence[str] = (STATS_UPDATED,)
) -> tuple[Outbox, dict[tuple[UUID, bytes], int]]:
    """One row per number, of the campaign of that number, in this order; types take turns."""
    rows = {
        place: Row(place, campaign_id(number), types[place % len(types)], event=str(place).encode())
        for place, number in enumerate(campaigns, 1)
    }
    return Outbox(rows), {(row.campaign_id, row.event): row.id for row in rows.values()}


def relay_of(outbox: Outbox, broker: Broker) -> tuple[Relay, Metrics, Health]:
    metrics, health = Metrics(CollectorRegistry()), Health()
    return Relay(outbox, broker, metrics, health), metrics, health


def value(metrics: Metrics, name: str, **labels: str) -> float:
    return metrics.registry.get_sample_value(f"campaign_stats_{name}", labels) or 0.0


async def drained(relay: Relay, outbox: Outbox, broker: Broker, opens: Sequence[set[str]] = ()) -> None:
    """Turn after turn until the outbox is empty; each failure of a plan costs one turn at most.

    After each turn the next of `opens` are the types that are closed; in the end none is.
    """
    changes = list(opens)
    for _ in range(200):
        try:
            done = await relay.turn()
            broker.closed = changes.pop(0) if changes else set()
            if not done and not outbox.rows and not changes:
                return
        except Unavailable:
            continue
    pytest.fail("the outbox was not drained")


TYPES = (STATS_UPDATED, PAUSED)
plans = st.lists(st.sampled_from(("ack", "ack", "fail", "unheard", "away")), max_size=30)


@given(
    campaigns=st.lists(st.integers(0, 3), max_size=12),
    plan=plans,
    poison=st.sets(st.integers(1, 12), max_size=3),
    fail_commits=st.lists(st.booleans(), max_size=6),
    closed=st.lists(st.sets(st.sampled_from(TYPES)), max_size=6),
)
def test_rows_of_a_campaign_and_topic_go_out_in_order_and_none_is_lost(
    campaigns: list[int], plan: list[str], poison: set[int], fail_commits: list[bool], closed: list[set[str]]
) -> None:
    outbox, ids = outbox_of(campaigns, TYPES)
    rows = dict(outbox.rows)
    outbox.fail_commits = fail_commits
    broker = Broker(ids, plan, frozenset(poison), closed.pop() if closed else set())
    relay, _, health = relay_of(outbox, broker)
    asyncio.run(drained(relay, outbox, broker, closed))
    assert health.degraded == []

    assert set(outbox.set_aside) == poison & rows.keys()
    assert sorted([*outbox.deleted, *outbox.set_aside]) == sorted(rows)
    assert set(outbox.deleted) <= broker.acknowledged
    for queue in {(row.campaign_id, row.type) for row in rows.values()}:
        mine = [row_id for row_id in broker.log if (rows[row_id].campaign_id, rows[row_id].type) == queue]
        last = {row_id: place for place, row_id in enumerate(mine)}
        # Who reads the topic to its end meets the last copy of each event in the order of the outbox.
        assert sorted(last, key=last.__getitem__) == sorted(last)
        finished = [row_id for row_id in outbox.deleted if (rows[row_id].campaign_id, rows[row_id].type) == queue]
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


async def test_a_refused_row_is_set_aside_and_its_neighbours_go_out() -> None:
    outbox, ids = outbox_of([0, 0, 1])
    broker = Broker(ids, poison=frozenset({1}))
    relay, metrics, _ = relay_of(outbox, broker)
    assert await relay.turn() == 3
    assert (outbox.set_aside, outbox.deleted, broker.calls) == ({1: "too large"}, [2, 3], [3])
    assert value(metrics, "set_aside_total") == 1
    assert value(metrics, "published_total", type=STATS_UPDATED) == 2
    assert value(metrics, "publish_failures_total") == 0


async def test_a_type_whose_topic_is_closed_is_held_back_and_tried_again_by_one_row() -> None:
    outbox, ids = outbox_of([0] * 6, TYPES)
    paused = [row_id for row_id, row in outbox.rows.items() if row.type == PAUSED]
    broker = Broker(ids, closed={PAUSED})
    relay, metrics, health = relay_of(outbox, broker)
    assert await relay.turn() == 3 + 1  # also that one is held back is something done: what stands behind it is next
    assert list(outbox.rows) == paused
    assert health.degraded == ["relay"]
    assert value(metrics, "publish_failures_total") == 1
    assert await relay.turn() == 0
    others = (TURN_ROWS, TURN_BYTES, [STATS_UPDATED, SYNC_REJECTED])
    assert outbox.asked == [(TURN_ROWS, TURN_BYTES, None), (PROBE_ROWS, TURN_BYTES, [PAUSED]), others]
    assert (list(outbox.rows), health.degraded) == (paused, ["relay"])
    broker.closed = set()
    assert await relay.turn() == 3
    assert (outbox.deleted[-3:], health.degraded) == (paused, [])


async def test_a_held_type_is_tried_again_with_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health_module, "FIRST_BACKOFF_S", 0.1)
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    outbox, ids = outbox_of([0], [PAUSED])
    relay, _, health = relay_of(outbox, broker := Broker(ids, closed={PAUSED}))
    tried: list[float] = []
    for _ in range(6_000):
        before = len(broker.calls)
        await relay.turn()
        tried += [clock[0]] * (len(broker.calls) - before)
        assert health.degraded == ["relay"]
        clock[0] += 0.01
    waits = [after - before for before, after in pairwise(tried)]
    assert waits[0] < 0.2
    assert max(waits) < health_module.LONGEST_BACKOFF_S + 0.1  # so that what is put right is noticed in time
    assert len(waits) < 40


async def test_a_held_type_stays_held_while_its_rows_are_there_and_another_relay_has_the_shards() -> None:
    outbox, ids = outbox_of([0, 0], TYPES)
    relay, _, health = relay_of(outbox, broker := Broker(ids, closed={PAUSED}))
    await relay.turn()
    outbox.shards, broker.closed = [], set()
    for _ in range(3):
        assert await relay.turn() == 0
        assert health.degraded == ["relay"]
    outbox.shards = [0]  # the other one is gone
    assert await relay.turn() == 1
    assert (outbox.rows, health.degraded) == ({}, [])


@pytest.mark.parametrize("others", [[], [STATS_UPDATED]])
async def test_a_held_type_is_released_when_another_relay_has_sent_all_its_rows(others: list[str]) -> None:
    outbox, ids = outbox_of([0], [PAUSED])
    relay, _, health = relay_of(outbox, broker := Broker(ids, closed={PAUSED}))
    await relay.turn()
    assert health.degraded == ["relay"]
    # No shard can be locked now: there is nothing in the outbox, or the other one has all that is there.
    outbox.rows = {number: Row(number, campaign_id(0), type_) for number, type_ in enumerate(others, 2)}
    outbox.shards = [] if others else [0]
    await relay.turn()
    assert (health.degraded, broker.calls) == ([], [1])
    outbox.asked.clear()
    outbox.rows, outbox.shards = {9: Row(9, campaign_id(0), PAUSED)}, [0]
    broker.ids, broker.closed = {(campaign_id(0), b"{}"): 9}, set()
    assert await relay.turn() == 1
    assert outbox.asked == [(TURN_ROWS, TURN_BYTES, None)]  # no type is left out any more


async def test_a_failure_of_another_kind_while_a_held_type_is_tried_does_not_stop_the_others() -> None:
    outbox, ids = outbox_of([0, 0], TYPES)
    broker = Broker(ids, closed=set(TYPES))
    relay, _, health = relay_of(outbox, broker)
    await relay.turn()
    broker.closed, broker.plan = {STATS_UPDATED}, ["fail"]
    assert await relay.turn() == 0
    assert await relay.turn() == 1
    assert (outbox.deleted, health.degraded) == ([1], ["relay"])


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

    async def publish(rows: Sequence[tuple[str, UUID, bytes]]) -> list[Sent]:
        published.append(list(rows))
        return [Sent()]

    metrics = Metrics(CollectorRegistry())
    assert await Relay(outbox, publish, metrics, Health()).turn() == 1
    assert published == [[(PAUSED, campaign_id(0), b'{"a":1}')]]
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


async def test_what_came_while_its_shard_was_in_our_hands_goes_out_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another replica committed it, was told that the shard is taken, and sleeps."""
    monkeypatch.setattr(relay_module, "POLL_S", 60.0)
    outbox, ids = outbox_of([0, 1])
    late = outbox.rows.pop(2)
    relay, _, health = relay_of(outbox, Broker(ids))
    running = asyncio.create_task(relay.run())
    async with asyncio.timeout(5):
        while outbox.rows:
            await asyncio.sleep(0)
        outbox.rows[2] = late
        while outbox.rows:
            await asyncio.sleep(0.001)
    assert outbox.deleted == [1, 2]
    health.stopping = True
    relay.wake()
    await running


async def test_only_what_was_acknowledged_and_asked_for_tells_how_long_it_took() -> None:
    long_ago = datetime.now(UTC) - timedelta(seconds=20)
    rows = {
        1: Row(1, campaign_id(1), event=b"1", since=long_ago, fact="news"),
        2: Row(2, campaign_id(2), event=b"2", since=long_ago, fact="pause"),
        3: Row(3, campaign_id(3), event=b"3", fact="news"),  # found by the sweep
        4: Row(4, campaign_id(4), event=b"4", since=long_ago, fact="of a later version"),
        5: Row(5, campaign_id(5), event=b"5", since=datetime.now(UTC) + timedelta(hours=1), fact="answer"),
    }
    ids = {(row.campaign_id, row.event): row.id for row in rows.values()}
    relay, metrics, _ = relay_of(Outbox(rows), Broker(ids, poison=frozenset([2])))
    await relay.turn()
    read = metrics.registry.get_sample_value
    delay = "campaign_stats_event_delay_seconds"
    counts = {fact: read(f"{delay}_count", {"fact": fact}) for fact in ("news", "pause", "answer")}
    assert counts == {"news": 1, "pause": 0, "answer": 1}
    assert read(f"{delay}_bucket", {"fact": "news", "le": "10.0"}) == 0
    assert read(f"{delay}_bucket", {"fact": "news", "le": "30.0"}) == 1
    assert read(f"{delay}_sum", {"fact": "answer"}) == 0  # a producer's clock an hour ahead
