"""Writes records in batches and says of each what became of it."""

import asyncio
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from itertools import zip_longest
from typing import Any, Final

import structlog
from aiokafka import AIOKafkaProducer
from aiokafka.errors import (
    ClusterAuthorizationFailedError,
    KafkaError,
    MessageSizeTooLargeError,
    RecordListTooLargeError,
    TopicAuthorizationFailedError,
)
from aiokafka.partitioner import murmur2
from aiokafka.record.default_records import DefaultRecordBatchBuilder

from consumer.broker.link import CALL_DEADLINE_S, Connection, be_impatient, close, refused_is_an_error
from consumer.broker.rights import hidden_problems
from consumer.errors import MAY_NOT, ConfigError, Unavailable

SEND_DEADLINE_S: Final = 10.0  # with PRODUCER_DEADLINE_S below idle_in_transaction_session_timeout: the relay sends
PRODUCER_DEADLINE_S: Final = 8.0  # inside a transaction
IDLE_S: Final = 5.0  # a connection that went dead while it was idle would cost the next send its whole deadline
TOPIC_DEADLINE_S: Final = 1.0  # for brokers to say whether a topic is there; a missing one must not hold up the others
TOPIC_PAUSE_S: Final = 0.05
NEW_TOPIC_S: Final = 5.0  # until every broker has learned of a topic that was just made
NEW_TOPIC_PAUSE_S: Final = 0.2
ABANDON_DEADLINE_S: Final = 0.5
MAX_BATCH_BYTES: Final = 256 * 1024
MAX_REQUEST_BYTES: Final = 16 * 1024 * 1024  # above any broker's usual limit: the broker decides what is too large
BIG_ROW_BYTES: Final = 128 * 1024  # larger rows get a batch of their own, so that one of them cannot spoil many
TOO_LARGE_ERRORS: Final = (MessageSizeTooLargeError, RecordListTooLargeError)

Partition = tuple[str, int]
"""Topic and number."""

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Outgoing:
    """One record to publish; `headers` are (name, bytes) pairs."""

    topic: str
    key: bytes | None
    value: bytes | None
    headers: Sequence[tuple[str, bytes | None]] = ()


@dataclass(frozen=True, slots=True)
class Sent:
    """What became of a row: acknowledged (`error` None), refused for ever, or failed for now.

    `refused`: it is larger than its topic takes. `closed`: its topic is missing or we may not write to it, which says
    nothing of other topics.
    """

    error: str | None = None
    refused: bool = False
    closed: bool = False


ACKNOWLEDGED: Final = Sent()
TOO_LARGE: Final = Sent("larger than the topic takes (max.message.bytes)", refused=True)
LATE: Final = Sent("not acknowledged in time")


class ElderFirst(KafkaError):  # type: ignore[misc]  # aiokafka has no types
    """Of a batch that was not sent, because one before it in its partition failed."""


@dataclass(slots=True)
class _Batch:
    """On its way: the rows it stands for, by place, and the future that says what became of all of them."""

    partition: Partition
    places: list[int]
    size: int
    future: Any


class Publisher:
    """Writes records and says of each what became of it. One producer, thrown away after any failed send."""

    def __init__(self, connection: Connection, *, idempotence: bool) -> None:
        self._connection = connection
        self._idempotence = idempotence
        self._producer: Any = None
        self._requests: Any = None
        self._batch_bytes: dict[str, int] = {}  # of each topic that refused a batch: what it may take
        self._missing: set[str] = set()

    async def publish(self, rows: Sequence[Outgoing]) -> list[Sent]:
        """Send all and wait; what became of each row, in order. Rows of one topic and key arrive in the order given.

        A batch refused for its size goes again in halves, in the same call as far as there is time: only a row that is
        too large by itself comes back as refused. Raises Unavailable when no producer can be had.
        """
        deadline = asyncio.get_running_loop().time() + SEND_DEADLINE_S  # making a producer counts too
        results = [LATE] * len(rows)
        queues = await self._queues(await self._ready(), rows, results)
        too_large: dict[str, int] = {}  # of each topic: the smallest row refused, in bytes
        while queues:
            queues = await self._attempt(rows, queues, results, too_large, deadline)
        return results

    async def _attempt(
        self,
        rows: Sequence[Outgoing],
        queues: Mapping[Partition, Sequence[int]],
        results: list[Sent],
        too_large: dict[str, int],
        deadline: float,
    ) -> dict[Partition, list[int]]:
        """Send the places of each partition and note what became of them; those that are worth another attempt."""
        batches: list[_Batch] = []
        is_over = False
        try:
            async with asyncio.timeout_at(deadline):
                producer = await self._ready()
                await self._send_batches(producer, rows, queues, batches)
                await self._answered(producer, batches)
        except (KafkaError, OSError, TimeoutError, Unavailable) as error:
            log.debug("sending ended early", error=type(error).__name__)
            is_over = True
        again: dict[Partition, list[int]] = {}
        failed: dict[Partition, Sent] = {}
        for batch in batches:  # those of a partition in the order they were sent
            topic = batch.partition[0]
            cause = batch.future.exception() if batch.future.done() else TimeoutError()
            if cause is None:
                became = ACKNOWLEDGED
            elif isinstance(cause, TOO_LARGE_ERRORS):
                again.setdefault(batch.partition, [])
                if len(batch.places) > 1:
                    # Never raised again: batches smaller than they might be cost little, a refused one a producer.
                    self._batch_bytes[topic] = min(batch.size // 2, self._batch_bytes.get(topic, batch.size))
                    again[batch.partition] += batch.places
                    continue
                became = TOO_LARGE
                size = _size(rows[batch.places[0]])
                too_large[topic] = min(size, too_large.get(topic, size))
            elif isinstance(cause, ElderFirst) and batch.partition in again:
                again[batch.partition] += batch.places
                continue
            else:
                became = failed.setdefault(batch.partition, self._failed(cause, topic))
            for place in batch.places:
                results[place] = became
        if is_over or again or failed:
            await self._drop()  # a sequence gap stays for ever in an idempotent producer
        left: dict[Partition, list[int]] = {}
        for partition, places in again.items():
            for place in places:
                if _size(rows[place]) >= too_large.get(partition[0], sys.maxsize):
                    results[place] = TOO_LARGE  # what is at least as large as a refused row need not be tried
                else:
                    left.setdefault(partition, []).append(place)
        return {} if is_over else left

    @staticmethod
    async def _answered(producer: Any, batches: Sequence[_Batch]) -> None:
        """Wait until it is known what became of each, or nothing is awaited but topics that have gone."""
        waiting = {batch.future: batch.partition[0] for batch in batches}
        while waiting:
            done, _ = await asyncio.wait(waiting, timeout=TOPIC_DEADLINE_S)
            for future in done:
                del waiting[future]
            if not any(producer.client.cluster.partitions_for_topic(topic) for topic in waiting.values()):
                return

    def _failed(self, error: BaseException, topic: str) -> Sent:
        if isinstance(error, TopicAuthorizationFailedError):
            return _forbidden(topic)
        producer = self._producer
        if producer is not None and not producer.client.cluster.partitions_for_topic(topic):
            return _absent(producer, topic)  # gone while we were sending
        return LATE if isinstance(error, TimeoutError) else Sent(type(error).__name__)

    async def check(self, topics: Sequence[str], *, patience_s: float = 0) -> list[str]:
        """Those of `topics` that do not exist, also not after `patience_s`: each broker learns by itself, moments after
        the others, of a topic that was just made. Raises ConfigError when the brokers refuse us or hide one of these
        topics, Unavailable when they cannot be reached.
        """
        deadline = time.monotonic() + patience_s
        async with refused_is_an_error(self._connection):
            producer = await self._ready()
        try:
            while True:
                async with asyncio.timeout(CALL_DEADLINE_S):
                    metadata = await producer.client.fetch_all_metadata()
                    missing = [topic for topic in topics if topic not in metadata.topics()]
                    if hidden := await hidden_problems(producer.client, missing):
                        raise ConfigError(list(hidden.values()))
                if not missing or time.monotonic() >= deadline:
                    return missing
                log.info("topics not there yet", topics=missing)
                await asyncio.sleep(NEW_TOPIC_PAUSE_S)
        except (KafkaError, OSError, TimeoutError) as error:
            raise Unavailable("kafka", f"{type(error).__name__} while reading metadata") from error

    async def close(self, deadline_s: float) -> None:
        """Stop the producer; never hangs and never raises. The next publish makes a new one."""
        producer, self._producer = self._producer, None
        if producer is not None and not await close(producer, deadline_s):
            await _abandon(producer, self._requests)

    async def _drop(self) -> None:
        producer, self._producer = self._producer, None
        if producer is not None:
            await _abandon(producer, self._requests)

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
                connections_max_idle_ms=int(IDLE_S * 1000),
            )
            be_impatient(producer.client)
            requests = _Requests(producer._sender)
            try:
                async with asyncio.timeout(PRODUCER_DEADLINE_S):
                    await producer.start()
            except (KafkaError, OSError, TimeoutError) as error:
                await _abandon(producer, requests)
                is_forbidden = isinstance(error, ClusterAuthorizationFailedError)  # an idempotent one takes a topic
                why = f"{MAY_NOT} Write any topic" if is_forbidden else type(error).__name__
                raise Unavailable("kafka", f"{why} while starting a producer") from error
            except asyncio.CancelledError:
                await _abandon(producer, requests)
                raise
            self._producer, self._requests = producer, requests
        return self._producer

    async def _queues(self, producer: Any, rows: Sequence[Outgoing], results: list[Sent]) -> dict[Partition, list[int]]:
        """Places of the rows for each partition, in order; those whose topic is not to be had get their result."""
        topics = {topic: await self._partitions(producer, topic) for topic in {row.topic for row in rows}}
        if None in topics.values():
            await self._drop()  # nobody answers it: begin again with a new one
        queues: dict[Partition, list[int]] = {}
        for place, row in enumerate(rows):
            among = topics[row.topic]
            if among:
                # As every Kafka client does by default, so that neighbours find a key where they expect it.
                number = among[_hash(row.key or b"") % len(among)]
                queues.setdefault((row.topic, number), []).append(place)
            elif among is not None:
                results[place] = _absent(producer, row.topic)
        return queues

    async def _send_batches(
        self,
        producer: Any,
        rows: Sequence[Outgoing],
        queues: Mapping[Partition, Sequence[int]],
        sent: list[_Batch],
    ) -> None:
        """Hand the places of each partition to the producer and note in `sent` what it took."""
        filled = [self._fill(producer, partition, rows, places) for partition, places in queues.items()]
        for row_of_batches in zip_longest(*filled):  # the producer takes one of each partition at a time
            for one in row_of_batches:
                if one is None:
                    continue
                batch, partition, places = one
                size = batch.size()
                future = await producer.send_batch(batch, partition[0], partition=partition[1])
                future.add_done_callback(_seen)
                sent.append(_Batch(partition, places, size, future))

    def _fill(
        self, producer: Any, partition: Partition, rows: Sequence[Outgoing], places: Sequence[int]
    ) -> list[tuple[Any, Partition, list[int]]]:
        """The rows in as many batches as they need."""
        most = self._batch_bytes.get(partition[0], MAX_BATCH_BYTES)
        batch, inside = producer.create_batch(), list[int]()
        filled = [(batch, partition, inside)]
        for place in places:
            row = rows[place]
            is_full = len(row.value or b"") > BIG_ROW_BYTES or (
                most < MAX_BATCH_BYTES and batch.size() + _size(row) > most
            )
            if inside and (is_full or not self._append(batch, row)):
                batch, inside = producer.create_batch(), []
                filled.append((batch, partition, inside))
            if not inside:
                self._append(batch, row)  # the first one fits, however large it is
            inside.append(place)
        return filled

    @staticmethod
    def _append(batch: Any, row: Outgoing) -> bool:
        return batch.append(timestamp=None, key=row.key, value=row.value, headers=list(row.headers)) is not None

    async def _partitions(self, producer: Any, topic: str) -> list[int] | None:
        """Partition numbers of a topic; none for one that is missing or may not be seen, None when nobody says so.

        One that was just created may take a moment; one that was missing before is not waited for again.
        """
        client, answers = producer.client, 0
        with suppress(KafkaError, TimeoutError):
            async with asyncio.timeout(TOPIC_DEADLINE_S):
                client.add_topic(topic)
                # Twice at least: an update may have been under way before the topic was added.
                while not client.cluster.partitions_for_topic(topic) and not (topic in self._missing and answers > 1):
                    answers += await client.force_metadata_update()
                    await asyncio.sleep(TOPIC_PAUSE_S)
        if found := client.cluster.partitions_for_topic(topic):
            self._missing.discard(topic)
            return sorted(found)
        if answers < 2:
            return None
        self._missing.add(topic)
        return []


@lru_cache(maxsize=16_384)  # 5 us each time: the client's is in Python
def _hash(key: bytes) -> int:
    number: int = murmur2(key) & 0x7FFFFFFF
    return number


def _absent(producer: Any, topic: str) -> Sent:
    """Brokers hide what we may not write to, but say so when asked for it by name."""
    if topic in producer.client.cluster.unauthorized_topics:
        return _forbidden(topic)
    return Sent(f"topic {topic} is not to be had", closed=True)


def _forbidden(topic: str) -> Sent:
    return Sent(f"{MAY_NOT} Write topic {topic}", closed=True)


def _size(row: Outgoing) -> int:
    """The bytes of a batch that holds this row alone, at most; a larger row has a larger number."""
    size: int = DefaultRecordBatchBuilder.estimate_size_in_bytes(row.key, row.value, list(row.headers))
    return size


def _seen(future: Any) -> None:
    """Its error is known: it may come only after we gave up waiting for it."""
    if not future.cancelled():
        future.exception()


class _Requests:
    """The produce requests under way of one producer; after `end` none begins any more.

    Nothing follows a batch that failed into its partition: it would stand before its elders.
    """

    def __init__(self, sender: Any) -> None:
        self.tasks = set[asyncio.Task[Any]]()
        self._broken = set[Any]()
        self._is_over = False
        self._sender = sender
        self._send = sender._send_produce_req
        sender._send_produce_req = self._tracked

    async def _tracked(self, node_id: int, batches: dict[Any, Any]) -> None:
        task = asyncio.current_task()
        if self._is_over or task is None:
            return
        for partition in self._broken & batches.keys():
            batches.pop(partition).failure(exception=ElderFirst())
            self._sender._muted_partitions.remove(partition)
        if not batches:
            self._sender._in_flight.remove(node_id)
            return
        self.tasks.add(task)
        try:
            await self._send(node_id, batches)
        finally:
            self.tasks.discard(task)
            self._broken.update(
                partition for partition, batch in batches.items() if batch.future.done() and batch.future.exception()
            )

    def end(self) -> set[asyncio.Task[Any]]:
        """Cancel them; they are over once the returned tasks are."""
        self._is_over = True
        for task in self.tasks:
            task.cancel()
        return set(self.tasks)


async def _abandon(producer: Any, requests: _Requests) -> None:
    """Let go of a producer at once, and of all that it has not sent: it will be sent again by its successor.

    A graceful stop would go on sending. aiokafka's sender waits for its requests even when it is cancelled, so these
    are ended first: one of them would otherwise reach the broker behind what the successor sent.
    """
    producer._closed = True
    sender, batches = producer._sender.sender_task, producer._message_accumulator
    ended = requests.end()
    if sender is not None:
        sender.remove_done_callback(producer._sender._fail_all)
        sender.add_done_callback(_seen)
        sender.cancel()
        ended.add(sender)
    if ended:
        await asyncio.wait(ended, timeout=ABANDON_DEADLINE_S)
    for batch in [*batches._pending_batches, *(batch for some in batches._batches.values() for batch in some)]:
        batch.future.add_done_callback(_seen)
        batch._drain_waiter.add_done_callback(_seen)
    for some in batches._batches.values():
        batches._pending_batches.update(some)  # aiokafka takes one off there that waits for another try, too
    batches.fail_all(KafkaError("given up"))
    closing = asyncio.ensure_future(producer.client.close())
    closing.add_done_callback(_seen)
    await asyncio.wait([closing], timeout=ABANDON_DEADLINE_S)
    closing.cancel()
