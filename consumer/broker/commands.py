"""What commands need of Kafka besides: topics, reading outside any group, the offsets of a group."""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

import structlog
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from aiokafka.errors import (
    CommitFailedError,
    KafkaError,
    TopicAlreadyExistsError,
    for_code,
)

from consumer.broker.link import (
    BROKEN_BYTES,
    CALL_DEADLINE_S,
    POLL_MS,
    POLL_RECORDS,
    START_DEADLINE_S,
    STOP_DEADLINE_S,
    Connection,
    be_impatient,
    close,
    reading_refused,
    refused_is_an_error,
    said,
)
from consumer.broker.rights import hidden_problems
from consumer.envelope import Record
from consumer.errors import ConfigError, OwnershipLost, ServiceError, Unavailable
from consumer.generation import Partition

COORDINATOR_RETRY_S: Final = 0.2  # a broker's first question about groups creates the topic they are kept in
CREATE_TOPICS: Final = "run `campaign-stats topics --create` or create it"

log = structlog.get_logger(__name__)


async def create_topics(
    connection: Connection, topics: Mapping[str, Mapping[str, str]], *, partitions: int, replication: int
) -> list[str]:
    """Create those of `topics` (name -> topic settings) that are missing; returns their names.

    Raises ConfigError when the brokers refuse us or a topic, Unavailable when they cannot be reached.
    """
    admin = AIOKafkaAdminClient(**connection.arguments())
    async with refused_is_an_error(connection):
        try:
            async with asyncio.timeout(START_DEADLINE_S):
                await admin.start()
                existing = set(await admin.list_topics())
                missing = [topic for topic in topics if topic not in existing]
                response = await admin.create_topics(
                    [NewTopic(topic, partitions, replication, topic_configs=dict(topics[topic])) for topic in missing]
                )
        except (KafkaError, OSError, TimeoutError) as error:
            raise Unavailable("kafka", f"{type(error).__name__} while creating topics") from error
        finally:
            await close(admin, STOP_DEADLINE_S)
    problems = [
        f"topic {topic}: {message or f'error {code}'}"
        for topic, code, message in getattr(response, "topic_errors", [])
        if code not in (0, TopicAlreadyExistsError.errno)
    ]
    if problems:
        raise ConfigError(problems)
    return missing


async def delete_topics(connection: Connection, topics: Sequence[str]) -> None:
    """Delete topics. Raises Unavailable."""
    admin = AIOKafkaAdminClient(**connection.arguments())
    try:
        async with asyncio.timeout(START_DEADLINE_S):
            await admin.start()
            await admin.delete_topics(list(topics))
    except (KafkaError, OSError, TimeoutError) as error:
        raise Unavailable("kafka", f"{type(error).__name__} while deleting topics") from error
    finally:
        await close(admin, STOP_DEADLINE_S)


@dataclass(frozen=True, slots=True)
class TopicShape:
    """How a topic is laid out: partition -> brokers that hold it; `cleanup_policy` is None when it may not be read."""

    replicas: Mapping[int, tuple[int, ...]]
    cleanup_policy: str | None

    @property
    def partitions(self) -> int:
        """How many."""
        return len(self.replicas)

    @property
    def replication(self) -> int:
        """Replicas of the partition that has the fewest."""
        return min(map(len, self.replicas.values()), default=0)


@dataclass(frozen=True, slots=True)
class Cluster:
    """The brokers' ids, and those of the topics asked for that exist and may be seen."""

    brokers: tuple[int, ...]
    topics: Mapping[str, TopicShape]


async def describe_topics(connection: Connection, topics: Sequence[str]) -> Cluster:
    """How `topics` are laid out; makes none, whatever the brokers' settings. Raises Unavailable."""
    admin = AIOKafkaAdminClient(**connection.arguments())
    try:
        async with asyncio.timeout(CALL_DEADLINE_S):
            await admin.start()
            brokers = tuple(sorted(broker["node_id"] for broker in (await admin.describe_cluster())["brokers"]))
            # All there are: asking for a missing topic by name may create it.
            found = {topic["topic"]: topic for topic in await admin.describe_topics() if topic["topic"] in topics}
            policies = await _cleanup_policies(admin, list(found))
    except (KafkaError, OSError, TimeoutError) as error:
        raise Unavailable("kafka", f"{type(error).__name__} while reading metadata") from error
    finally:
        await close(admin, STOP_DEADLINE_S)
    return Cluster(
        brokers,
        {
            name: TopicShape(
                {part["partition"]: tuple(part["replicas"]) for part in topic["partitions"]}, policies.get(name)
            )
            for name, topic in found.items()
        },
    )


async def _cleanup_policies(admin: Any, topics: Sequence[str]) -> dict[str, str]:
    """`cleanup.policy` of those topics where the brokers tell it: it takes the right DescribeConfigs."""
    wanted = [ConfigResource(ConfigResourceType.TOPIC, topic, {"cleanup.policy": None}) for topic in topics]
    try:
        responses = await admin.describe_configs(wanted) if wanted else []
    except KafkaError:
        return {}
    return {
        name: entry[1]
        for response in responses
        for code, _, _, name, entries in response.resources
        if code == 0
        for entry in entries
        if entry[0] == "cleanup.policy"
    }


class Reader:
    """Reads topics outside any group, from now on; for commands (`tail`, `sync --wait`)."""

    def __init__(self, connection: Connection, topics: Sequence[str], *, fetch_max_wait_ms: int) -> None:
        self._connection = connection
        self._topics = list(topics)
        self._consumer: Any = AIOKafkaConsumer(
            **connection.arguments(),
            enable_auto_commit=False,
            auto_offset_reset="latest",
            isolation_level="read_committed",
            fetch_max_wait_ms=fetch_max_wait_ms,
        )

    async def __aenter__(self) -> "Reader":
        """Stand at the end of every partition.

        Raises ConfigError when a topic is missing or the brokers refuse us, Unavailable when they cannot be reached.
        """
        async with refused_is_an_error(self._connection):
            await self._start()
        return self

    async def _start(self) -> None:
        try:
            async with asyncio.timeout(START_DEADLINE_S):
                await self._consumer.start()
                partitions = await _partitions_of(self._consumer, self._topics)
                self._consumer.assign(partitions)
                await self._consumer.seek_to_end()
                for partition in partitions:
                    await self._consumer.position(partition)
        except ConfigError:
            await close(self._consumer, STOP_DEADLINE_S)
            raise
        except (KafkaError, OSError, TimeoutError) as error:
            await close(self._consumer, STOP_DEADLINE_S)
            raise Unavailable("kafka", f"{reading_refused(error)} while starting to read") from error

    async def __aexit__(self, *_: object) -> None:
        """Stop reading; never hangs."""
        await close(self._consumer, STOP_DEADLINE_S)

    async def read(self, timeout_s: float) -> list[Record]:
        """Records of any partition, in offset order within each; empty after the timeout. Raises Unavailable."""
        try:
            found = await self._consumer.getmany(timeout_ms=int(timeout_s * 1000))
        except KafkaError as error:
            raise Unavailable("kafka", f"{reading_refused(error)} while reading") from error
        return [record for records in found.values() for record in records]


class Scan:
    """One topic as it is now, from its beginning or a time on to the end it has; outside any group, for commands."""

    def __init__(self, connection: Connection, topic: str, *, fetch_max_wait_ms: int) -> None:
        self._topic = topic
        self._consumer: Any = AIOKafkaConsumer(
            **connection.arguments(),
            enable_auto_commit=False,
            auto_offset_reset="earliest",  # retention may overtake us
            isolation_level="read_committed",
            fetch_max_wait_ms=fetch_max_wait_ms,
            max_poll_records=POLL_RECORDS,
        )
        self._ends: dict[Any, int] = {}
        self.total = 0
        """Offsets to read, known once `records` has begun; about as many records."""
        self.done = 0

    async def __aenter__(self) -> "Scan":
        """Note where every partition ends. Raises ConfigError for a missing topic, Unavailable."""
        try:
            with said("starting to read"):
                async with asyncio.timeout(START_DEADLINE_S):
                    await self._consumer.start()
                    partitions = await _partitions_of(self._consumer, [self._topic])
                    self._ends = await self._consumer.end_offsets(partitions)
        except (ServiceError, asyncio.CancelledError):
            await close(self._consumer, STOP_DEADLINE_S)
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        """Stop reading; never hangs."""
        await close(self._consumer, STOP_DEADLINE_S)

    async def records(self, since: datetime | None = None) -> AsyncIterator[list[Record]]:
        """Lists of records, in offset order within each partition; once.

        Begins with the first record at or after `since` in each partition. Raises Unavailable when nothing comes for
        ten seconds, ServiceError for bytes the client cannot read.
        """
        with said("looking up where to begin"):
            async with asyncio.timeout(CALL_DEADLINE_S):
                at = await self._consumer.beginning_offsets(list(self._ends))
                if since is not None:
                    first = await _first_since(self._consumer, list(self._ends), since)
                    at = {partition: first.get(partition, end) for partition, end in self._ends.items()}
        left = {partition: self._ends[partition] for partition in at if at[partition] < self._ends[partition]}
        self.total = sum(end - at[partition] for partition, end in left.items())
        self._consumer.assign(list(left))
        for partition in left:
            self._consumer.seek(partition, at[partition])
        while left:
            found, positions = await self._next({partition: at[partition] for partition in left}, POLL_RECORDS)
            for partition, position in positions.items():
                self.done += min(position, left[partition]) - at[partition]
                at[partition] = position
                if position >= left[partition]:
                    del left[partition]
                    self._consumer.pause(partition)
            yield [
                record for partition, some in found.items() for record in some if record.offset < self._ends[partition]
            ]

    async def at(self, partition: int, offset: int) -> Record | None:
        """The record at one place; None when there is none. Raises Unavailable and ServiceError as `records` does."""
        wanted = TopicPartition(self._topic, partition)
        if offset >= self._ends.get(wanted, 0):
            return None
        with said("looking up where to begin"):
            async with asyncio.timeout(CALL_DEADLINE_S):
                if offset < (await self._consumer.beginning_offsets([wanted]))[wanted]:
                    return None
        self._consumer.assign([wanted])
        self._consumer.seek(wanted, offset)
        found, _ = await self._next({wanted: offset}, 1)
        record: Record
        for record in found.get(wanted, ()):
            if record.offset == offset:
                return record
        return None

    async def _next(self, before: Mapping[Any, int], limit: int) -> tuple[dict[Any, list[Any]], dict[Any, int]]:
        """Records, and the new position of each partition that moved from where it was; at least one did."""
        try:
            with said(f"reading {self._topic}"):
                async with asyncio.timeout(CALL_DEADLINE_S):
                    while True:
                        found = await self._consumer.getmany(*before, timeout_ms=POLL_MS, max_records=limit)
                        after = {partition: await self._consumer.position(partition) for partition in before}
                        moved = {partition: at for partition, at in after.items() if at != before[partition]}
                        if moved:
                            return found, moved
        except BROKEN_BYTES as error:
            raise ServiceError(
                f"{self._topic} holds bytes that the client cannot read ({type(error).__name__}), near"
                f" {', '.join(f'{partition.partition}:{at}' for partition, at in sorted(before.items()))}:"
                " begin behind them with --since"
            ) from error


class Group:
    """The committed offsets of a consumer group, seen and moved from outside of it; for `replay`."""

    def __init__(self, connection: Connection, group_id: str, topics: Sequence[str]) -> None:
        self._group_id = group_id
        self._topics = list(topics)
        self._partitions: list[Any] = []
        self._admin: Any = AIOKafkaAdminClient(**connection.arguments())
        self._consumer: Any = AIOKafkaConsumer(
            **connection.arguments(), group_id=group_id, enable_auto_commit=False, isolation_level="read_committed"
        )
        be_impatient(self._consumer._client)

    async def __aenter__(self) -> "Group":
        """Connect; joins nothing. Raises ConfigError for missing topics, Unavailable."""
        try:
            with said("connecting"):
                async with asyncio.timeout(START_DEADLINE_S):
                    await self._admin.start()
                    await self._consumer.start()
                    self._partitions = await _partitions_of(self._consumer, self._topics)
                    self._consumer.assign(self._partitions)  # by hand: no membership, but the right to commit them
        except (ServiceError, asyncio.CancelledError):
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        """Disconnect; never hangs."""
        await asyncio.gather(close(self._consumer, STOP_DEADLINE_S), close(self._admin, STOP_DEADLINE_S))

    @property
    def partitions(self) -> list[Partition]:
        """Every partition of the topics, in order."""
        return [(partition.topic, partition.partition) for partition in self._partitions]

    async def members(self) -> int:
        """How many members the group has now; 0 for a group nobody ever joined. Raises Unavailable."""
        with said("asking for the group's members"):
            async with asyncio.timeout(CALL_DEADLINE_S):
                while True:
                    try:
                        [answer] = await self._admin.describe_consumer_groups([self._group_id])
                        [[code, _, _, _, _, members, *_]] = answer.groups
                        if code == 0:
                            return len(members)
                        raise for_code(code)
                    except KafkaError as error:
                        if not error.retriable:
                            raise
                        await asyncio.sleep(COORDINATOR_RETRY_S)

    async def committed(self) -> dict[Partition, int]:
        """The committed offset of each partition that has one. Raises Unavailable."""
        found = {}
        with said("reading offsets"):
            async with asyncio.timeout(CALL_DEADLINE_S):
                for partition in self._partitions:
                    offset = await self._consumer.committed(partition)
                    if offset is not None:
                        found[(partition.topic, partition.partition)] = offset
        return found

    async def first_since(self, moment: datetime) -> dict[Partition, int]:
        """The offset of the first record at or after `moment`, of each partition that has one. Raises Unavailable."""
        with said("looking up offsets"):
            async with asyncio.timeout(CALL_DEADLINE_S):
                found = await _first_since(self._consumer, self._partitions, moment)
        return {(partition.topic, partition.partition): offset for partition, offset in found.items()}

    async def commit(self, offsets: Mapping[Partition, int]) -> None:
        """Commit all of them in one request, which the broker refuses while the group has members (OwnershipLost).

        Raises Unavailable; after a timeout nobody knows whether it was done.
        """
        try:
            with said("committing"):
                async with asyncio.timeout(CALL_DEADLINE_S):
                    await self._consumer.commit({TopicPartition(*one): offset for one, offset in offsets.items()})
        except CommitFailedError as error:
            raise OwnershipLost("the group has members") from error


async def _partitions_of(consumer: Any, topics: Sequence[str]) -> list[Any]:
    """Every partition of the topics, in order. Raises ConfigError when one is missing."""
    metadata = await consumer._client.fetch_all_metadata()
    numbers = {topic: metadata.partitions_for_topic(topic) or () for topic in topics}
    if missing := [topic for topic in topics if not numbers[topic]]:
        hidden = await hidden_problems(consumer._client, missing)
        raise ConfigError([hidden.get(topic, f"topic {topic} is missing: {CREATE_TOPICS}") for topic in missing])
    return [TopicPartition(topic, number) for topic in topics for number in sorted(numbers[topic])]


async def _first_since(consumer: Any, partitions: Sequence[Any], moment: datetime) -> dict[Any, int]:
    """The first offset at or after `moment`, of each of the partitions that has such a record."""
    milliseconds = max(0, int(moment.timestamp() * 1000))  # floored: never behind the record that is meant
    found = await consumer.offsets_for_times(dict.fromkeys(partitions, milliseconds)) if partitions else {}
    return {
        partition: first.offset
        for partition, first in found.items()
        if first is not None and first.timestamp >= 0  # the embedded broker says -1 for none
    }
