"""Writes records in batches and says of each what became of it."""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import structlog
from aiokafka import AIOKafkaProducer
from aiokafka.errors import (
    KafkaError,
    MessageSizeTooLargeError,
    RecordListTooLargeError,
)
from aiokafka.partitioner import murmur2

from consumer.broker.link import CALL_DEADLINE_S, Connection, be_impatient, close, refused_is_an_error
from consumer.errors import Unavailable

SEND_DEADLINE_S: Final = 10.0  # with PRODUCER_DEADLINE_S below idle_in_transaction_session_timeout: the relay sends
PRODUCER_DEADLINE_S: Final = 8.0  # inside a transaction
TOPIC_DEADLINE_S: Final = 1.0  # a missing topic must not hold up the others
ABANDON_DEADLINE_S: Final = 0.5
MAX_BATCH_BYTES: Final = 256 * 1024
MAX_REQUEST_BYTES: Final = 16 * 1024 * 1024  # above any broker's usual limit: the broker decides what is too large
BIG_ROW_BYTES: Final = 128 * 1024  # larger rows get a batch of their own, so that one of them cannot spoil many
REFUSED_FOR_EVER: Final = (MessageSizeTooLargeError, RecordListTooLargeError)
ELDER_FIRST: Final = "an elder of its key is not out yet"

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

    `too_large`: it, or the batch it was in, is larger than the topic takes.
    """

    error: str | None = None
    refused: bool = False
    too_large: bool = False


ACKNOWLEDGED: Final = Sent()
TOO_LARGE: Final = Sent("larger than the topic takes (max.message.bytes)", refused=True, too_large=True)


class Publisher:
    """Writes records and says of each what became of it. One producer, thrown away after any failed send."""

    def __init__(self, connection: Connection, *, idempotence: bool) -> None:
        self._connection = connection
        self._idempotence = idempotence
        self._producer: Any = None
        self._requests: Any = None

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
                        results[place] = ACKNOWLEDGED if error is None else _failed(error)
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
        async with refused_is_an_error(self._connection):
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
            )
            be_impatient(producer.client)
            requests = _Requests(producer._sender)
            try:
                async with asyncio.timeout(PRODUCER_DEADLINE_S):
                    await producer.start()
            except (KafkaError, OSError, TimeoutError) as error:
                await _abandon(producer, requests)
                raise Unavailable("kafka", f"{type(error).__name__} while starting a producer") from error
            except asyncio.CancelledError:
                await _abandon(producer, requests)
                raise
            self._producer, self._requests = producer, requests
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
                    futures.append((await self._send_batch(producer, batch, topic, partition), inside))
                    batch, inside = producer.create_batch(), []
                if not inside:
                    self._append(batch, row)  # the first one fits, however large it is
                inside.append(place)
            futures.append((await self._send_batch(producer, batch, topic, partition), inside))
        return futures

    @staticmethod
    async def _send_batch(producer: Any, batch: Any, topic: str, partition: int) -> Any:
        future = await producer.send_batch(batch, topic, partition=partition)
        future.add_done_callback(_seen)
        return future

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
                results.append(
                    Sent(error="larger than the topic takes (max.message.bytes)", refused=True, too_large=True)
                )
            except (KafkaError, OSError, TimeoutError, Unavailable) as error:
                await self._drop()
                results.append(Sent(error=type(error).__name__))
                break
        return results + [Sent(error="not tried")] * (len(rows) - len(results))


def _failed(error: BaseException) -> Sent:
    return Sent(error=type(error).__name__, too_large=isinstance(error, REFUSED_FOR_EVER))


def _seen(future: Any) -> None:
    """Its error is known: it may come only after we gave up waiting for it."""
    if not future.cancelled():
        future.exception()


class _Requests:
    """The produce requests under way of one producer; after `end` none begins any more."""

    def __init__(self, sender: Any) -> None:
        self.tasks = set[asyncio.Task[Any]]()
        self._is_over = False
        self._send = sender._send_produce_req
        sender._send_produce_req = self._tracked

    async def _tracked(self, *arguments: Any) -> None:
        task = asyncio.current_task()
        if self._is_over or task is None:
            return
        self.tasks.add(task)
        try:
            await self._send(*arguments)
        finally:
            self.tasks.discard(task)

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
    batches.fail_all(KafkaError("given up"))
    closing = asyncio.ensure_future(producer.client.close())
    closing.add_done_callback(_seen)
    await asyncio.wait([closing], timeout=ABANDON_DEADLINE_S)
    closing.cancel()
