"""Reading only, with confluent-kafka: what client and decoder cost before anything is done with a hint.

Idiom: `assign` without a group and `consume` for many messages a call, from the client's reference
(https://docs.confluent.io/platform/current/clients/confluent-kafka-python/html/index.html); the sizes are librdkafka's
(https://github.com/confluentinc/librdkafka/blob/master/CONFIGURATION.md).

MODE=same reads what the service reads, by its own `Hints`. MODE=msgspec takes the campaign's id and looks at nothing
else (https://jcristharif.com/msgspec/perf-tips.html, "Avoid decoding unused fields"): it would take an event of any
type, and an id that is none. The garbage collector is set as the service sets it.

Settings from the environment: KAFKA_BOOTSTRAP_SERVERS, INPUT_TOPIC, EXPECTED (how many records to read), MODE. The
repository must be on PYTHONPATH. Prints one JSON line; CPU is that of all threads, librdkafka's too. Both clocks start
when the first records are in hand, as those of our reading do.
"""

import gc
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec
from confluent_kafka import OFFSET_BEGINNING, Consumer, KafkaException, TopicPartition

from consumer.envelope import Hints

BATCH = 1_000  # to `msgspec` 500 to 2 000 are equal, 10 000 cost 1.15x (measured)
SETTINGS = {
    "group.id": "none",  # must be there; nobody joins it
    "enable.auto.commit": False,
    "queued.min.messages": 500_000,  # let librdkafka's threads run ahead ...
    "queued.max.messages.kbytes": 256 * 1024,
    "fetch.queue.backoff.ms": 10,  # ... and when they are far enough ahead, not rest for a second
    "fetch.message.max.bytes": 4 * 2**20,
}


class Read(NamedTuple):
    """What `Hints` looks at, first; the rest of its Content it does not ask a good record for."""

    value: bytes | None
    headers: Sequence[tuple[str, bytes | None]]
    offset: int = 0
    key: bytes | None = None
    timestamp: int = 0


class Data(msgspec.Struct):
    """The one field that is wanted."""

    campaign_id: str


class Event(msgspec.Struct):
    """And where it stands."""

    data: Data


class Same:
    """The dirty campaigns, as the service finds them."""

    def __init__(self) -> None:
        self._hints = Hints()

    def take(self, messages: list[Any]) -> None:
        """Those of these messages too."""
        self._hints.collect([Read(message.value(), message.headers() or ()) for message in messages])

    def __len__(self) -> int:
        return len(self._hints.settled())


class Bare:
    """The dirty campaigns, nothing validated."""

    def __init__(self) -> None:
        self._decode = msgspec.json.Decoder(Event).decode
        self._campaigns: set[str] = set()

    def take(self, messages: list[Any]) -> None:
        """Those of these messages too."""
        self._campaigns.update({self._decode(message.value()).data.campaign_id for message in messages})

    def __len__(self) -> int:
        return len(self._campaigns)


def read(consumer: Consumer, expected: int, dirty: Same | Bare) -> dict[str, float]:
    """Read so many records."""
    events = 0
    begun = cpu = 0.0
    while events < expected:
        messages = consumer.consume(min(BATCH, expected - events), timeout=1.0)
        if messages and not events:
            begun, cpu = time.monotonic(), time.process_time()
        for message in messages:
            if message.error() is not None:
                raise KafkaException(message.error())
        dirty.take(messages)
        events += len(messages)
    spent = {"cpu_s": time.process_time() - cpu, "seconds": time.monotonic() - begun}
    return {"events": events, "campaigns": len(dirty), **spent}


def main() -> None:
    """Read the topic from its beginning."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)
    expected, topic = int(os.environ["EXPECTED"]), os.environ["INPUT_TOPIC"]
    dirty = Same() if os.environ["MODE"] == "same" else Bare()
    consumer = Consumer({"bootstrap.servers": os.environ["KAFKA_BOOTSTRAP_SERVERS"], **SETTINGS})
    try:
        partitions = consumer.list_topics(topic, timeout=30).topics[topic].partitions
        consumer.assign([TopicPartition(topic, number, OFFSET_BEGINNING) for number in partitions])
        print(json.dumps(read(consumer, expected, dirty)))
    finally:
        consumer.close()


if __name__ == "__main__":
    main()
