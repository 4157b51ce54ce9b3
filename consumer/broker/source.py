"""Our membership in the consumer group: poll, pause, commit, and pass over bytes that nobody can hand out."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

import structlog
from aiokafka import AIOKafkaConsumer, ConsumerRebalanceListener, TopicPartition
from aiokafka.coordinator.assignors.roundrobin import RoundRobinPartitionAssignor
from aiokafka.errors import (
    CommitFailedError,
    IllegalStateError,
    KafkaError,
    RebalanceInProgressError,
    TopicAuthorizationFailedError,
)

from consumer.broker.fetched import POLL_BYTES, Fetched
from consumer.broker.incoming import receive_directly
from consumer.broker.inflate import bound
from consumer.broker.link import (
    CALL_DEADLINE_S,
    POLL_MS,
    POLL_RECORDS,
    START_DEADLINE_S,
    STOP_DEADLINE_S,
    Connection,
    be_impatient,
    close,
    reading_refused,
)
from consumer.broker.rights import unreadable
from consumer.envelope import Content
from consumer.errors import MAY_NOT, OwnershipLost, Unavailable
from consumer.generation import Partition, Passed

LEAVE_DEADLINE_S: Final = 5.0  # a join under way must end first, else the group waits for us until the session ends
REJOIN_S: Final = 4.0  # from the end of its revocation until a member has joined again
LOOK_UP_DEADLINE_S: Final = 3.0  # of gauges: how soon a silent broker is noticed
TOLD_S: Final = 2.0  # what a partition that delivers nothing had waiting then no longer counts as a backlog
FETCH_BYTES: Final = 8 * 2**20  # of all partitions of one broker: with 1 MB of each, memory grows with their number
POSITION_DEADLINE_S: Final = 0.1  # known at once, unless a broker is asked where the partition begins

log = structlog.get_logger(__name__)

Revoked = Callable[[], Awaitable[None]]
Assigned = Callable[[Sequence[Partition]], None]


@dataclass(frozen=True, slots=True)
class Batch:
    """What one poll brought from one partition: records in offset order and the offset to read next."""

    partition: Partition
    records: Sequence[Content]
    next_offset: int


class Source:
    """Our membership in the consumer group: poll, pause, commit. Offsets move by explicit commits only."""

    def __init__(
        self,
        connection: Connection,
        topics: Sequence[str],
        group_id: str,
        *,
        fetch_max_wait_ms: int,
        revocation_s: float,
    ) -> None:
        """`revocation_s`: how long `revoked`, handed to `start`, may take at most."""
        self._connection = connection
        self._rebalance_ms = int((revocation_s + REJOIN_S) * 1000)
        self._topics = list(topics)
        self._group_id = group_id
        self._fetch_max_wait_ms = fetch_max_wait_ms
        self._consumer: Any = None
        self._next: dict[Any, int] = {}  # per partition: one after the last offset handed out
        self._waiting: dict[Any, tuple[int, float]] = {}  # per partition: records behind that one, and when it was told
        self._batches: list[Batch] = []  # read, but not handed out yet
        self._fetched: Any = None  # what the client has fetched: consumer.broker.fetched
        self._epoch = 0  # rises whenever partitions are taken or given

    async def start(self, revoked: Revoked, assigned: Assigned) -> None:
        """Join the group. Raises Unavailable when the brokers cannot be reached in time; may then be called again.

        `revoked` is awaited before partitions are taken (always all of them); `assigned` is called with the new ones.
        """
        bound()
        receive_directly()
        consumer = AIOKafkaConsumer(
            **self._connection.arguments(),
            group_id=self._group_id,
            enable_auto_commit=False,
            auto_offset_reset="earliest",
            isolation_level="read_committed",
            session_timeout_ms=15_000,
            heartbeat_interval_ms=1_000,  # a graceful leave idles its partitions until the others' next heartbeat
            rebalance_timeout_ms=self._rebalance_ms,
            request_timeout_ms=self._rebalance_ms + 6_000,  # must exceed it by more than 5 s
            fetch_max_wait_ms=self._fetch_max_wait_ms,
            max_poll_records=POLL_RECORDS,
            fetch_max_bytes=FETCH_BYTES,
            partition_assignment_strategy=[RoundRobinPartitionAssignor],  # exactly one: k assignors send k JoinGroups
        )
        be_impatient(consumer._client)
        consumer.subscribe(topics=self._topics, listener=_Listener(self, revoked, assigned))
        try:
            async with asyncio.timeout(START_DEADLINE_S):
                await consumer.start()
        except (KafkaError, OSError, TimeoutError) as error:
            await close(consumer, STOP_DEADLINE_S)
            raise Unavailable("kafka", f"{reading_refused(error)} while joining the group") from error
        except asyncio.CancelledError:
            await close(consumer, LEAVE_DEADLINE_S)
            raise
        self._fetched = Fetched(consumer._fetcher)
        self._consumer = consumer

    async def poll(self) -> tuple[list[Batch], list[Passed]]:
        """Wait up to half a second for records; also what had to be passed over because it cannot be handed out.

        Raises Unavailable. Awaited without a time limit: cancelling it would switch off the client's own checks.
        """
        found = await self._getmany()
        for partition, records in found.items():
            self._hand_out(partition, records, records[-1].offset + 1)
            end = self._consumer.last_stable_offset(partition) or 0
            self._waiting[partition] = max(0, end - self._next[partition]), time.monotonic()
        for stub in self._fetched.passed:
            log.warning("unreadable bytes passed", first=stub.first, last=stub.last, error=stub.error)
            partition = TopicPartition(*stub.partition)
            if stub.last >= self._next.get(partition, 0):  # else records behind it came in the same poll
                self._hand_out(partition, (), stub.last + 1)
        passed, self._fetched.passed = self._fetched.passed, []
        if not found:
            await self._notice_moves()
        batches, self._batches = self._batches, []
        return batches, passed

    @property
    def behind(self) -> int:
        """Records that wait at the brokers beyond what was polled, in partitions of which some were just polled."""
        still = time.monotonic() - TOLD_S
        return sum(records for records, at in self._waiting.values() if at >= still)

    def forget(self) -> None:
        """Partitions are being taken away: nothing of them may survive into the next assignment."""
        self._epoch += 1
        self._next.clear()
        self._waiting.clear()
        self._batches.clear()
        if self._fetched is not None:
            self._fetched.passed.clear()

    def pause(self) -> None:
        """Fetch nothing more from the partitions assigned now."""
        self._consumer.pause(*self._consumer.assignment())

    def resume(self) -> None:
        """Fetch again."""
        self._consumer.resume(*self._consumer.assignment())

    async def commit(self, offsets: Mapping[Partition, int]) -> None:
        """Commit the next offsets to read. Raises OwnershipLost when they are no longer ours, Unavailable else."""
        assigned = self._consumer.assignment()
        wanted = {TopicPartition(*partition): offset for partition, offset in offsets.items()}
        if not wanted.keys() <= assigned:
            raise OwnershipLost("a partition was taken away before its offsets were committed")
        if self._consumer._coordinator.generation < 0:  # a broker takes a commit without one while nobody is a member
            raise OwnershipLost("the group has forgotten us")
        try:
            async with asyncio.timeout(CALL_DEADLINE_S):
                await self._consumer.commit(wanted)
        except (IllegalStateError, CommitFailedError, RebalanceInProgressError) as error:
            raise OwnershipLost(f"commit refused: {type(error).__name__}") from error
        except (KafkaError, TimeoutError) as error:
            raise Unavailable("kafka", f"{await self._why(error)} while committing") from error

    async def ends(self, partitions: Sequence[Partition]) -> dict[Partition, int]:
        """The offset after the last record of each partition. Raises Unavailable."""
        return await self._look_up(self._consumer.end_offsets, partitions)

    async def committed(self, partitions: Sequence[Partition]) -> dict[Partition, int]:
        """The group's committed offset of each partition that has one. Raises Unavailable."""
        wanted = [TopicPartition(*partition) for partition in partitions]
        try:
            async with asyncio.timeout(LOOK_UP_DEADLINE_S):  # `committed` would send a request for each
                known = await self._consumer._coordinator.fetch_committed_offsets(wanted)
        except (KafkaError, TimeoutError) as error:
            raise Unavailable("kafka", f"{await self._why(error)} while reading offsets") from error
        return {(at.topic, at.partition): kept.offset for at, kept in known.items() if kept.offset >= 0}

    async def knock(self) -> None:
        """Ask any broker for the list of topics. Raises Unavailable."""
        try:
            async with asyncio.timeout(LOOK_UP_DEADLINE_S):
                await self._consumer._client.fetch_all_metadata()
        except (KafkaError, TimeoutError) as error:
            raise Unavailable("kafka", f"{type(error).__name__} while asking for topics") from error

    async def check_topics(self) -> None:
        """Raises Unavailable when a topic was deleted or closed to us: its partitions are then nobody's, in silence.

        The client asks by itself only once a minute, also whether it may read again; here it does so at every call.
        """
        client = self._consumer._client
        closed = [topic for topic in self._topics if not client.cluster.partitions_for_topic(topic)]
        if not closed:
            return
        try:
            async with asyncio.timeout(LOOK_UP_DEADLINE_S):
                await client.force_metadata_update()
        except (KafkaError, TimeoutError) as error:
            raise Unavailable("kafka", f"{type(error).__name__} while asking for topics") from error
        if forbidden := await self._closed(closed):
            raise Unavailable("kafka", f"{MAY_NOT} Read topic {', '.join(forbidden)}")
        if missing := [topic for topic in closed if not client.cluster.partitions_for_topic(topic)]:
            raise Unavailable("kafka", f"topic {', '.join(missing)} is missing")

    async def starts(self, partitions: Sequence[Partition]) -> dict[Partition, int]:
        """The first offset still kept of each partition. Raises Unavailable."""
        return await self._look_up(self._consumer.beginning_offsets, partitions)

    async def stop(self, deadline_s: float) -> None:
        """Leave the group; never hangs and never raises."""
        consumer, self._consumer = self._consumer, None
        if consumer is not None:
            await close(consumer, deadline_s)

    async def _look_up(
        self, call: Callable[[list[Any]], Awaitable[dict[Any, int]]], partitions: Sequence[Partition]
    ) -> dict[Partition, int]:
        if not partitions:
            return {}
        try:
            async with asyncio.timeout(LOOK_UP_DEADLINE_S):
                found = await call([TopicPartition(*partition) for partition in partitions])
        except (KafkaError, TimeoutError) as error:
            raise Unavailable("kafka", f"{await self._why(error)} while reading offsets") from error
        return {(partition.topic, partition.partition): offset for partition, offset in found.items()}

    async def _getmany(self) -> dict[Any, list[Any]]:
        self._fetched.bytes_left = POLL_BYTES
        try:
            found: dict[Any, list[Any]] = await self._consumer.getmany(timeout_ms=POLL_MS, max_records=POLL_RECORDS)
        except KafkaError as error:
            self._revive()
            raise Unavailable("kafka", f"{await self._why(error)} while reading") from error
        return found

    async def _why(self, error: BaseException) -> str:
        """With the topic, which the client leaves out where a right is lost between joining and the first fetch."""
        why = reading_refused(error)
        is_unnamed = MAY_NOT not in why and TopicAuthorizationFailedError.__name__ in f"{why} {error}"
        if is_unnamed and (closed := await self._closed(self._topics)):
            return f"{MAY_NOT} Read topic {', '.join(closed)}"
        return why

    async def _closed(self, topics: Sequence[str]) -> list[str]:
        """Those that we may not read; none when nobody says."""
        with suppress(KafkaError, TimeoutError):
            async with asyncio.timeout(LOOK_UP_DEADLINE_S):
                return await unreadable(self._consumer._client, topics)
        return []

    def _revive(self) -> None:
        """Join again where a task of the client died, as of a right to the group that was lost for a moment.

        It never starts such a task anew by itself, and without heartbeats nothing else would make it join.
        """
        coordinator = self._consumer._coordinator
        tasks = (coordinator._heartbeat_task, coordinator._commit_refresh_task)
        if any(task is not None and task.done() and not task.cancelled() and task.exception() for task in tasks):
            coordinator.request_rejoin()

    def _hand_out(self, partition: Any, records: Sequence[Any], next_offset: int) -> None:
        self._next[partition] = next_offset
        self._batches.append(Batch((partition.topic, partition.partition), records, next_offset))

    async def _notice_moves(self) -> None:
        """Positions also move without records: past transaction markers, or to the start of what retention left.

        And back, when a log was cut off behind them (an unclean election): what is written there next must be ours too.
        """
        epoch = self._epoch
        for partition in list(self._consumer.assignment()):
            try:
                async with asyncio.timeout(POSITION_DEADLINE_S):
                    position = await self._consumer.position(partition)
            except (KafkaError, TimeoutError):
                continue
            if epoch != self._epoch:
                return
            if position == self._next.get(partition):
                continue
            self._hand_out(partition, (), position)


class _Listener(ConsumerRebalanceListener):  # type: ignore[misc]  # aiokafka has no types
    def __init__(self, source: Source, revoked: Revoked, assigned: Assigned) -> None:
        self._source = source
        self._revoked = revoked
        self._assigned = assigned

    async def on_partitions_revoked(self, revoked: Any) -> None:
        self._source.forget()
        await self._revoked()

    async def on_partitions_assigned(self, assigned: Any) -> None:
        self._source.forget()  # polling went on between the two calls
        self._assigned([(partition.topic, partition.partition) for partition in assigned])
