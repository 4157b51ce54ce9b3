"""Kafka: the source we read from and the publisher we write with. aiokafka has no types; its Any stays in this file."""

import asyncio
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import structlog
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, ConsumerRebalanceListener, TopicPartition
from aiokafka.abc import AbstractTokenProvider
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from aiokafka.conn import collect_hosts, create_conn
from aiokafka.coordinator.assignors.roundrobin import RoundRobinPartitionAssignor
from aiokafka.errors import (
    CommitFailedError,
    CorruptRecordException,
    IllegalSaslStateError,
    IllegalStateError,
    KafkaConnectionError,
    KafkaError,
    MessageSizeTooLargeError,
    RebalanceInProgressError,
    RecordListTooLargeError,
    RecordTooLargeError,
    SaslAuthenticationFailed,
    TopicAlreadyExistsError,
    UnsupportedCodecError,
    UnsupportedSaslMechanismError,
    for_code,
)
from aiokafka.partitioner import murmur2

from consumer.envelope import Record
from consumer.errors import ConfigError, OwnershipLost, ServiceError, Unavailable
from consumer.generation import Partition, Passed

POLL_RECORDS: Final = 500  # 4 000 costs 1.6x the CPU per record (measured)
POLL_MS: Final = 500
CALL_DEADLINE_S: Final = 10.0  # commits and look-ups hang while brokers are away; below the session's patience
SEND_DEADLINE_S: Final = 10.0  # with PRODUCER_DEADLINE_S below idle_in_transaction_session_timeout: the relay sends
PRODUCER_DEADLINE_S: Final = 8.0  # inside a transaction
START_DEADLINE_S: Final = 30.0
STOP_DEADLINE_S: Final = 2.0
KNOCK_DEADLINE_S: Final = 10.0  # to ask a broker why it does not take us
TOPIC_DEADLINE_S: Final = 1.0  # a missing topic must not hold up the others
LOOK_UP_DEADLINE_S: Final = 3.0  # of gauges: how soon a silent broker is noticed
MAX_BATCH_BYTES: Final = 256 * 1024
MAX_REQUEST_BYTES: Final = 16 * 1024 * 1024  # above any broker's usual limit: the broker decides what is too large
BIG_ROW_BYTES: Final = 128 * 1024  # larger rows get a batch of their own, so that one of them cannot spoil many
STEP_MS: Final = 100  # one fetch behind broken bytes
COORDINATOR_RETRY_S: Final = 0.2  # a broker's first question about groups creates the topic they are kept in
BROKEN_BYTES: Final = (
    CorruptRecordException, RecordTooLargeError, UnsupportedCodecError,
    ValueError, IndexError, TypeError, AssertionError, OverflowError, MemoryError,
)  # fmt: skip
REFUSED_FOR_EVER: Final = (MessageSizeTooLargeError, RecordListTooLargeError)

CREATE_TOPICS: Final = "run `campaign-stats topics --create` or create it"

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Connection:
    """How to reach the brokers. `security` are the keyword arguments aiokafka's clients share (TLS, SASL)."""

    bootstrap_servers: str
    security: Mapping[str, object]
    client_id: str = "campaign-stats"

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments for any client."""
        return {
            "bootstrap_servers": self.bootstrap_servers.split(","),
            "client_id": self.client_id,
            "metadata_max_age_ms": 60_000,
            **self.security,
        }


@dataclass(frozen=True, slots=True)
class Outgoing:
    """One record to publish; `headers` are (name, bytes) pairs."""

    topic: str
    key: bytes | None
    value: bytes | None
    headers: Sequence[tuple[str, bytes | None]] = ()


@dataclass(frozen=True, slots=True)
class Sent:
    """What became of a row: acknowledged (`error` None), refused for ever, or failed for now."""

    error: str | None = None
    refused: bool = False


ACKNOWLEDGED: Final = Sent()
ELDER_FIRST: Final = "an elder of its key is not out yet"


@dataclass(frozen=True, slots=True)
class Batch:
    """What one poll brought from one partition: records in offset order and the offset to read next."""

    partition: Partition
    records: Sequence[Record]
    next_offset: int


Revoked = Callable[[], Awaitable[None]]
Assigned = Callable[[Sequence[Partition]], None]


def tls_context(cafile: Path | None) -> ssl.SSLContext:
    """A client context that checks certificates and host names, against the system's authorities without `cafile`.

    Raises OSError or ValueError for a file that cannot be used.
    """
    return ssl.create_default_context(cafile=cafile)


def present(context: ssl.SSLContext, certfile: Path, keyfile: Path) -> None:
    """Present this certificate to brokers that ask. Raises OSError or ValueError for files that cannot be used."""
    context.load_cert_chain(certfile, keyfile, password="")  # without one, OpenSSL asks for it on the terminal


class TokenProvider(AbstractTokenProvider):  # type: ignore[misc]  # aiokafka has no types
    """Gives aiokafka the tokens of OAUTHBEARER; failing to get one is for it a connection that failed."""

    def __init__(self, token: Callable[[], Awaitable[str]]) -> None:
        self._token = token

    async def token(self) -> str:
        """Called for every new connection."""
        try:
            return await self._token()
        except ServiceError as error:
            raise KafkaConnectionError(str(error)) from error


async def refusals(connection: Connection) -> list[str]:
    """What a person must put right, a sentence each, where brokers answer that TLS or login is wrong; none when one
    of them takes us or none answers. aiokafka itself says only that no broker could be had, so each is asked here.
    """
    addresses = [(host, port) for host, port, _ in collect_hosts(connection.bootstrap_servers, randomize=False)]
    errors = await asyncio.gather(*(_knock(connection, host, port) for host, port in addresses))
    if None in errors:
        return []
    found = [_refusal(f"{host}:{port}", error) for (host, port), error in zip(addresses, errors, strict=True)]
    return list(dict.fromkeys(problem for problems in found for problem in problems))


async def _knock(connection: Connection, host: str, port: int) -> BaseException | None:
    """Connect and log in; the error, or None when the broker took us."""
    try:
        async with asyncio.timeout(KNOCK_DEADLINE_S):
            visit = await create_conn(host, port, client_id=connection.client_id, **connection.security)
    except (KafkaError, OSError, TimeoutError) as error:
        return error
    await asyncio.wait([visit.close()], timeout=STOP_DEADLINE_S)
    return None


def _refusal(address: str, error: BaseException | None) -> Sequence[str]:
    """Sentences, if this error of connecting is an answer; none for one that may pass."""
    while error is not None:
        if isinstance(error, ConfigError):
            return error.problems
        if isinstance(error, ssl.SSLCertVerificationError):
            why = f"the certificate of {address} is not accepted ({error.verify_message.rstrip('.')})"
            return [f"Kafka: {why}; check CAMPAIGN_STATS_KAFKA_SSL_CAFILE and the names in KAFKA_BOOTSTRAP_SERVERS"]
        if isinstance(error, ssl.SSLError) and "ALERT" in (error.reason or ""):
            why = f"{address} refuses our side of TLS ({error.reason})"
            return [f"Kafka: {why}; check CAMPAIGN_STATS_KAFKA_SSL_CERTFILE and KAFKA_SSL_KEYFILE"]
        if isinstance(error, SaslAuthenticationFailed):
            return [
                f"Kafka: {address} refuses the login; check CAMPAIGN_STATS_KAFKA_SASL_USERNAME and KAFKA_SASL_PASSWORD"
            ]
        if isinstance(error, (UnsupportedSaslMechanismError, IllegalSaslStateError)):
            why = f"{address} does not offer this kind of login"
            return [f"Kafka: {why}; check CAMPAIGN_STATS_KAFKA_SASL_MECHANISM and KAFKA_SECURITY_PROTOCOL"]
        error = error.__cause__
    return ()


@asynccontextmanager
async def _refused_is_an_error(connection: Connection) -> AsyncIterator[None]:
    """At start: Unavailable becomes ConfigError when the brokers are there but refuse us."""
    try:
        yield
    except Unavailable as error:
        if problems := await refusals(connection):
            raise ConfigError(problems) from error
        raise


class Source:
    """Our membership in the consumer group: poll, pause, commit. Offsets move by explicit commits only."""

    def __init__(self, connection: Connection, topics: Sequence[str], group_id: str, *, fetch_max_wait_ms: int) -> None:
        self._connection = connection
        self._topics = list(topics)
        self._group_id = group_id
        self._fetch_max_wait_ms = fetch_max_wait_ms
        self._consumer: Any = None
        self._next: dict[Any, int] = {}  # per partition: one after the last offset handed out
        self._batches: list[Batch] = []  # read, but not handed out yet: kept when a later call of the same poll fails
        self._passed: list[Passed] = []
        self._must_isolate = False
        self._epoch = 0  # rises whenever partitions are taken or given
        self._broken: dict[Any, tuple[int, int, str]] = {}  # per partition: first offset, offset to try, error

    async def start(self, revoked: Revoked, assigned: Assigned) -> None:
        """Join the group. Raises Unavailable when the brokers cannot be reached in time; may then be called again.

        `revoked` is awaited before partitions are taken (always all of them); `assigned` is called with the new ones.
        """
        consumer = AIOKafkaConsumer(
            **self._connection.arguments(),
            group_id=self._group_id,
            enable_auto_commit=False,
            auto_offset_reset="earliest",
            isolation_level="read_committed",
            session_timeout_ms=15_000,
            heartbeat_interval_ms=1_000,  # a graceful leave idles its partitions until the others' next heartbeat
            rebalance_timeout_ms=30_000,
            request_timeout_ms=40_000,  # must exceed the rebalance timeout
            fetch_max_wait_ms=self._fetch_max_wait_ms,
            max_poll_records=POLL_RECORDS,
            partition_assignment_strategy=[RoundRobinPartitionAssignor],  # exactly one: k assignors send k JoinGroups
        )
        consumer.subscribe(topics=self._topics, listener=_Listener(self, revoked, assigned))
        try:
            async with asyncio.timeout(START_DEADLINE_S):
                await consumer.start()
        except (KafkaError, OSError, TimeoutError) as error:
            await _close(consumer, STOP_DEADLINE_S)
            raise Unavailable("kafka", f"{type(error).__name__} while joining the group") from error
        except asyncio.CancelledError:
            await _close(consumer, STOP_DEADLINE_S)
            raise
        self._consumer = consumer

    async def poll(self) -> tuple[list[Batch], list[Passed]]:
        """Wait up to half a second for records; also what had to be passed over because it cannot be handed out.

        Raises Unavailable. Awaited without a time limit: cancelling it would switch off the client's own checks.
        """
        if self._must_isolate:
            await self._isolate()
        for partition in list(self._broken):
            await self._step_past(partition)
        readable = [partition for partition in self._consumer.assignment() if partition not in self._broken]
        if readable or not self._broken:
            try:
                found = await self._getmany(readable if self._broken else (), POLL_MS)
            except _BytesError as error:
                log.warning("unreadable bytes in a fetch", error=str(error))
                self._must_isolate = True
            else:
                for partition, records in found.items():
                    self._hand_out(partition, records, records[-1].offset + 1)
                if not found:
                    await self._notice_moves(readable)
        batches, self._batches = self._batches, []
        passed, self._passed = self._passed, []
        return batches, passed

    def forget(self) -> None:
        """Partitions are being taken away: nothing of them may survive into the next assignment."""
        self._epoch += 1
        self._next.clear()
        self._broken.clear()
        self._batches.clear()
        self._passed.clear()
        self._must_isolate = False

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
        try:
            async with asyncio.timeout(CALL_DEADLINE_S):
                await self._consumer.commit(wanted)
        except (IllegalStateError, CommitFailedError, RebalanceInProgressError) as error:
            raise OwnershipLost(f"commit refused: {type(error).__name__}") from error
        except (KafkaError, TimeoutError) as error:
            raise Unavailable("kafka", f"{type(error).__name__} while committing") from error

    async def ends(self, partitions: Sequence[Partition]) -> dict[Partition, int]:
        """The offset after the last record of each partition. Raises Unavailable."""
        return await self._look_up(self._consumer.end_offsets, partitions)

    async def committed(self, partitions: Sequence[Partition]) -> dict[Partition, int]:
        """The group's committed offset of each partition that has one. Raises Unavailable."""
        found = {}
        try:
            async with asyncio.timeout(LOOK_UP_DEADLINE_S):
                for partition in partitions:
                    offset = await self._consumer.committed(TopicPartition(*partition))
                    if offset is not None:
                        found[partition] = offset
        except (KafkaError, TimeoutError) as error:
            raise Unavailable("kafka", f"{type(error).__name__} while reading offsets") from error
        return found

    async def starts(self, partitions: Sequence[Partition]) -> dict[Partition, int]:
        """The first offset still kept of each partition. Raises Unavailable."""
        return await self._look_up(self._consumer.beginning_offsets, partitions)

    async def stop(self, deadline_s: float) -> None:
        """Leave the group; never hangs and never raises."""
        consumer, self._consumer = self._consumer, None
        if consumer is not None:
            await _close(consumer, deadline_s)

    async def _look_up(
        self, call: Callable[[list[Any]], Awaitable[dict[Any, int]]], partitions: Sequence[Partition]
    ) -> dict[Partition, int]:
        if not partitions:
            return {}
        try:
            async with asyncio.timeout(LOOK_UP_DEADLINE_S):
                found = await call([TopicPartition(*partition) for partition in partitions])
        except (KafkaError, TimeoutError) as error:
            raise Unavailable("kafka", f"{type(error).__name__} while reading offsets") from error
        return {(partition.topic, partition.partition): offset for partition, offset in found.items()}

    async def _getmany(
        self, partitions: Sequence[Any], timeout_ms: int, *, records: int = POLL_RECORDS
    ) -> dict[Any, list[Any]]:
        try:
            found: dict[Any, list[Any]] = await self._consumer.getmany(
                *partitions, timeout_ms=timeout_ms, max_records=records
            )
        except (CorruptRecordException, RecordTooLargeError, UnsupportedCodecError) as error:
            raise _BytesError(type(error).__name__) from error
        except KafkaError as error:
            raise Unavailable("kafka", f"{type(error).__name__} while reading") from error
        except (ValueError, IndexError, TypeError, AssertionError, OverflowError, MemoryError) as error:
            raise _BytesError(type(error).__name__) from error  # header key not UTF-8, broken compression, ...
        return found

    def _hand_out(self, partition: Any, records: Sequence[Any], next_offset: int) -> None:
        self._next[partition] = next_offset
        self._batches.append(Batch((partition.topic, partition.partition), records, next_offset))

    async def _notice_moves(self, partitions: Sequence[Any]) -> None:
        """Positions also move without records: past transaction markers, or to the start of what retention left."""
        epoch = self._epoch
        for partition in partitions:
            try:
                async with asyncio.timeout(STEP_MS / 1000):
                    position = await self._consumer.position(partition)
            except (KafkaError, TimeoutError):
                continue
            if epoch != self._epoch:
                return
            if partition in self._next and position <= self._next[partition]:
                continue
            self._hand_out(partition, (), position)

    async def _position(self, partition: Any) -> int:
        try:
            async with asyncio.timeout(STEP_MS / 1000):
                position: int = await self._consumer.position(partition)
        except (KafkaError, TimeoutError):
            return 0
        return position

    async def _isolate(self) -> None:
        """One partition's bytes broke the whole poll: begin again where we were, and ask each partition alone.

        The client has forgotten records that it read before the broken ones, so every partition goes back to the last
        offset it handed out. The next polls walk on in each of them, one record at a time, to where good ones go on.
        """
        epoch, assigned = self._epoch, sorted(self._consumer.assignment())
        names = [(partition.topic, partition.partition) for partition in assigned if partition not in self._next]
        known = {**await self.starts(names), **await self.committed(names)}
        if epoch != self._epoch:
            return  # taken away meanwhile
        for partition in assigned:
            begin = self._next.get(partition, known.get((partition.topic, partition.partition), 0))
            self._next[partition] = begin
            self._consumer.seek(partition, begin)
            self._broken[partition] = (begin, begin, "")
        self._must_isolate = False

    async def _step_past(self, partition: Any) -> None:
        """Go on record by record: hand out what can be, and count as passed what cannot, until a fetch succeeds again.

        The client reads lazily, so records of the same batch before the broken ones come out; those after them cannot.
        """
        name, epoch = (partition.topic, partition.partition), self._epoch
        for _ in range(POLL_RECORDS):
            if partition not in self._broken:
                return  # taken away while another one was asked
            first, at, why = self._broken[partition]
            try:
                found = await self._getmany([partition], STEP_MS, records=1)
            except _BytesError as error:
                if epoch != self._epoch:
                    return
                self._broken[partition] = (first, at + 1, str(error))
                self._consumer.seek(partition, at + 1)
                return
            records = found.get(partition, [])
            if epoch != self._epoch:
                if records:  # the client waited for the new assignment and read on there
                    self._hand_out(partition, records, records[-1].offset + 1)
                return
            if records:
                next_offset = records[-1].offset + 1
                self._broken[partition] = (next_offset, next_offset, "")
                self._hand_out(partition, records, next_offset)
            else:
                end = (await self.ends([name]))[name]
                if epoch != self._epoch:
                    return
                at = max(at, await self._position(partition))  # transaction markers and retention move it too
                if epoch != self._epoch or at < end:
                    return  # not fetched yet
            if why:
                last = (records[0].offset if records else at) - 1
                self._passed.append(Passed(name, first, last, why, too_large=why == RecordTooLargeError.__name__))
            if why or not records:
                self._broken.pop(partition, None)  # past it; the next poll reads on as usual
                if not records:
                    self._hand_out(partition, (), at)
                return


class _BytesError(Exception):
    """The client cannot hand out some record of this fetch; the message is the class of its error."""


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


class Publisher:
    """Writes records and says of each what became of it. One producer, thrown away after any failed send."""

    def __init__(self, connection: Connection, *, idempotence: bool) -> None:
        self._connection = connection
        self._idempotence = idempotence
        self._producer: Any = None

    async def publish(self, rows: Sequence[Outgoing], *, alone: bool = False) -> list[Sent]:
        """Send all and wait; what became of each row, in order. Rows of one key arrive in the order given.

        `alone` sends one after the other, so that the row at fault shows itself; it stops at the first that failed.
        Only a row sent alone can come back as refused. Raises Unavailable when no producer can be had.
        """
        if alone:
            return await self._one_by_one(rows)
        deadline = asyncio.get_running_loop().time() + SEND_DEADLINE_S  # making a producer counts too
        producer = await self._ready()
        results: list[Sent] = [Sent(error="not acknowledged in time")] * len(rows)
        partitions = await self._partitions(producer, {row.topic for row in rows})
        known, stuck = [], set[bytes | None]()
        for place, row in enumerate(rows):
            if row.key in stuck:
                results[place] = Sent(error=ELDER_FIRST)
            elif partitions[row.topic]:
                known.append(place)
            else:
                stuck.add(row.key)
                results[place] = Sent(error=f"topic {row.topic} is not to be had")
        try:
            async with asyncio.timeout_at(deadline):
                futures = await self._send_batches(producer, rows, known, partitions)
            left_s = max(0.0, deadline - asyncio.get_running_loop().time())
            done: set[Any] = set()
            if futures:
                done, _ = await asyncio.wait([future for future, _ in futures], timeout=left_s)
            for future, places in futures:
                if future in done:
                    error = future.exception()
                    for place in places:
                        results[place] = ACKNOWLEDGED if error is None else Sent(error=type(error).__name__)
        except (KafkaError, OSError, TimeoutError) as error:
            for place in known:
                if results[place] is not ACKNOWLEDGED:
                    results[place] = Sent(error=type(error).__name__)
        if any(results[place] is not ACKNOWLEDGED for place in known):
            await self._drop()  # a sequence gap stays for ever in an idempotent producer
        return results

    async def check(self, topics: Sequence[str]) -> list[str]:
        """Those of `topics` that do not exist. Only at start: raises ConfigError when the brokers refuse us,
        Unavailable when they cannot be reached.
        """
        async with _refused_is_an_error(self._connection):
            producer = await self._ready()
        try:
            async with asyncio.timeout(CALL_DEADLINE_S):
                metadata = await producer.client.fetch_all_metadata()
                return [topic for topic in topics if topic not in metadata.topics()]
        except (KafkaError, OSError, TimeoutError) as error:
            raise Unavailable("kafka", f"{type(error).__name__} while reading metadata") from error

    async def close(self, deadline_s: float) -> None:
        """Stop the producer; never hangs and never raises. The next publish makes a new one."""
        producer, self._producer = self._producer, None
        if producer is not None and not await _close(producer, deadline_s):
            await _abandon(producer)

    async def _drop(self) -> None:
        producer, self._producer = self._producer, None
        if producer is not None:
            await _abandon(producer)

    async def _ready(self) -> Any:
        if self._producer is None:
            producer = AIOKafkaProducer(
                **self._connection.arguments(),
                acks="all",
                enable_idempotence=self._idempotence,
                linger_ms=0,
                max_batch_size=MAX_BATCH_BYTES,
                max_request_size=MAX_REQUEST_BYTES,
                request_timeout_ms=int(SEND_DEADLINE_S * 1000),
            )
            try:
                async with asyncio.timeout(PRODUCER_DEADLINE_S):
                    await producer.start()
            except (KafkaError, OSError, TimeoutError) as error:
                await _abandon(producer)
                raise Unavailable("kafka", f"{type(error).__name__} while starting a producer") from error
            except asyncio.CancelledError:
                await _abandon(producer)
                raise
            self._producer = producer
        return self._producer

    async def _send_batches(
        self, producer: Any, rows: Sequence[Outgoing], wanted: Sequence[int], partitions: Mapping[str, list[int]]
    ) -> list[tuple[Any, list[int]]]:
        """Futures, each with the places of the rows it stands for; only the places `wanted` are sent."""
        places_of: dict[tuple[str, int], list[int]] = {}
        for place in wanted:
            row = rows[place]
            among = partitions[row.topic]
            # As every Kafka client does by default, so that neighbours find a key where they expect it.
            partition = among[(murmur2(row.key or b"") & 0x7FFFFFFF) % len(among)]
            places_of.setdefault((row.topic, partition), []).append(place)
        futures: list[tuple[Any, list[int]]] = []
        for (topic, partition), places in places_of.items():
            batch, inside = producer.create_batch(), list[int]()
            for place in places:
                row = rows[place]
                if inside and (len(row.value or b"") > BIG_ROW_BYTES or not self._append(batch, row)):
                    futures.append((await producer.send_batch(batch, topic, partition=partition), inside))
                    batch, inside = producer.create_batch(), []
                if not inside:
                    self._append(batch, row)  # the first one fits, however large it is
                inside.append(place)
            futures.append((await producer.send_batch(batch, topic, partition=partition), inside))
        for future, _ in futures:
            future.add_done_callback(_seen)
        return futures

    @staticmethod
    def _append(batch: Any, row: Outgoing) -> bool:
        return batch.append(timestamp=None, key=row.key, value=row.value, headers=list(row.headers)) is not None

    @staticmethod
    async def _partitions(producer: Any, topics: set[str]) -> dict[str, list[int]]:
        """Partition numbers of each topic; none for one that is missing or may not be seen, which is soon said."""
        found: dict[str, list[int]] = {}
        for topic in topics:
            try:
                async with asyncio.timeout(TOPIC_DEADLINE_S):
                    found[topic] = sorted(await producer.partitions_for(topic))
            except (KafkaError, TimeoutError):
                found[topic] = []
        return found

    async def _one_by_one(self, rows: Sequence[Outgoing]) -> list[Sent]:
        results: list[Sent] = []
        loop = asyncio.get_running_loop()
        deadline = loop.time() + SEND_DEADLINE_S
        partitions = await self._partitions(await self._ready(), {row.topic for row in rows})
        stuck = set[bytes | None]()
        for row in rows:
            if row.key in stuck:
                results.append(Sent(error=ELDER_FIRST))
                continue
            if not partitions[row.topic]:
                stuck.add(row.key)
                results.append(Sent(error=f"topic {row.topic} is not to be had"))
                continue
            if results and self._producer is None and loop.time() > deadline - PRODUCER_DEADLINE_S:
                break  # a new one may take longer than is left
            try:
                producer = await self._ready()
                async with asyncio.timeout_at(deadline):
                    await producer.send_and_wait(row.topic, row.value, key=row.key, headers=list(row.headers))
                results.append(ACKNOWLEDGED)
            except REFUSED_FOR_EVER:
                await self._drop()
                results.append(Sent(error="larger than the topic takes (max.message.bytes)", refused=True))
            except (KafkaError, OSError, TimeoutError, Unavailable) as error:
                await self._drop()
                results.append(Sent(error=type(error).__name__))
                break
        return results + [Sent(error="not tried")] * (len(rows) - len(results))


async def create_topics(
    connection: Connection, topics: Mapping[str, Mapping[str, str]], *, partitions: int, replication: int
) -> list[str]:
    """Create those of `topics` (name -> topic settings) that are missing; returns their names.

    Raises ConfigError when the brokers refuse us or a topic, Unavailable when they cannot be reached.
    """
    admin = AIOKafkaAdminClient(**connection.arguments())
    async with _refused_is_an_error(connection):
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
            await _close(admin, STOP_DEADLINE_S)
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
        await _close(admin, STOP_DEADLINE_S)


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
        await _close(admin, STOP_DEADLINE_S)
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
        async with _refused_is_an_error(self._connection):
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
            await _close(self._consumer, STOP_DEADLINE_S)
            raise
        except (KafkaError, OSError, TimeoutError) as error:
            await _close(self._consumer, STOP_DEADLINE_S)
            raise Unavailable("kafka", f"{type(error).__name__} while starting to read") from error

    async def __aexit__(self, *_: object) -> None:
        """Stop reading; never hangs."""
        await _close(self._consumer, STOP_DEADLINE_S)

    async def read(self, timeout_s: float) -> list[Record]:
        """Records of any partition, in offset order within each; empty after the timeout. Raises Unavailable."""
        try:
            found = await self._consumer.getmany(timeout_ms=int(timeout_s * 1000))
        except KafkaError as error:
            raise Unavailable("kafka", f"{type(error).__name__} while reading") from error
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
            with _said("starting to read"):
                async with asyncio.timeout(START_DEADLINE_S):
                    await self._consumer.start()
                    partitions = await _partitions_of(self._consumer, [self._topic])
                    self._ends = await self._consumer.end_offsets(partitions)
        except (ServiceError, asyncio.CancelledError):
            await _close(self._consumer, STOP_DEADLINE_S)
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        """Stop reading; never hangs."""
        await _close(self._consumer, STOP_DEADLINE_S)

    async def records(self, since: datetime | None = None) -> AsyncIterator[list[Record]]:
        """Lists of records, in offset order within each partition; once.

        Begins with the first record at or after `since` in each partition. Raises Unavailable when nothing comes for
        ten seconds, ServiceError for bytes the client cannot read.
        """
        with _said("looking up where to begin"):
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
        with _said("looking up where to begin"):
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
            with _said(f"reading {self._topic}"):
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

    async def __aenter__(self) -> "Group":
        """Connect; joins nothing. Raises ConfigError for missing topics, Unavailable."""
        try:
            with _said("connecting"):
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
        await asyncio.gather(_close(self._consumer, STOP_DEADLINE_S), _close(self._admin, STOP_DEADLINE_S))

    @property
    def partitions(self) -> list[Partition]:
        """Every partition of the topics, in order."""
        return [(partition.topic, partition.partition) for partition in self._partitions]

    async def members(self) -> int:
        """How many members the group has now; 0 for a group nobody ever joined. Raises Unavailable."""
        with _said("asking for the group's members"):
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
        with _said("reading offsets"):
            async with asyncio.timeout(CALL_DEADLINE_S):
                for partition in self._partitions:
                    offset = await self._consumer.committed(partition)
                    if offset is not None:
                        found[(partition.topic, partition.partition)] = offset
        return found

    async def first_since(self, moment: datetime) -> dict[Partition, int]:
        """The offset of the first record at or after `moment`, of each partition that has one. Raises Unavailable."""
        with _said("looking up offsets"):
            async with asyncio.timeout(CALL_DEADLINE_S):
                found = await _first_since(self._consumer, self._partitions, moment)
        return {(partition.topic, partition.partition): offset for partition, offset in found.items()}

    async def commit(self, offsets: Mapping[Partition, int]) -> None:
        """Commit all of them in one request, which the broker refuses while the group has members (OwnershipLost).

        Raises Unavailable; after a timeout nobody knows whether it was done.
        """
        try:
            with _said("committing"):
                async with asyncio.timeout(CALL_DEADLINE_S):
                    await self._consumer.commit({TopicPartition(*one): offset for one, offset in offsets.items()})
        except CommitFailedError as error:
            raise OwnershipLost("the group has members") from error


@contextmanager
def _said(doing: str) -> Iterator[None]:
    """Raise Unavailable for what the client raises while `doing` this; BROKEN_BYTES and refused commits go through."""
    try:
        yield
    except (CorruptRecordException, RecordTooLargeError, UnsupportedCodecError, CommitFailedError):
        raise
    except (KafkaError, OSError, TimeoutError) as error:
        raise Unavailable("kafka", f"{type(error).__name__} while {doing}") from error


async def _partitions_of(consumer: Any, topics: Sequence[str]) -> list[Any]:
    """Every partition of the topics, in order. Raises ConfigError when one is missing."""
    metadata = await consumer._client.fetch_all_metadata()
    numbers = {topic: metadata.partitions_for_topic(topic) or () for topic in topics}
    if missing := [topic for topic in topics if not numbers[topic]]:
        raise ConfigError([f"topic {topic} is missing: {CREATE_TOPICS}" for topic in missing])
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


def _seen(future: Any) -> None:
    """Its error is known: it may come only after we gave up waiting for it."""
    if not future.cancelled():
        future.exception()


async def _abandon(producer: Any) -> None:
    """Let go of a producer at once. A graceful stop would go on sending what we have given up and will send again."""
    producer._closed = True
    sender = producer._sender.sender_task if producer._sender is not None else None
    producer._message_accumulator.fail_all(KafkaError("given up"))
    for _ in range(2):  # cancelled once it waits for its requests, cancelled twice it gives them up too
        if sender is not None:
            sender.cancel()
        closing = asyncio.ensure_future(producer.client.close())
        await asyncio.wait([closing, *([sender] if sender is not None else [])], timeout=0.5)
        closing.cancel()
        if sender is None or sender.done():
            return


async def _close(client: Any, deadline_s: float) -> bool:
    """Stop a consumer, producer or admin client: it may hang while brokers are away and raise CancelledError.

    Whether it stopped in time.
    """
    stop = getattr(client, "stop", None) or client.close
    task = asyncio.ensure_future(stop())
    done, _ = await asyncio.wait([task], timeout=deadline_s)
    if done:
        if not task.cancelled() and task.exception() is not None:
            log.debug("client stopped with an error", error=type(task.exception()).__name__)
        return True
    task.cancel()
    inner = getattr(client, "_client", None) or getattr(client, "client", None)
    if inner is not None:
        closing = asyncio.ensure_future(inner.close())
        await asyncio.wait([closing, task], timeout=1)
    return False
