"""A running count of hints per campaign in Quix Streams' state: what a stream processor does with them, no database.

Idiom: https://quix.io/docs/quix-streams/advanced/stateful-processing.html (the counter) and .../configuration.html
("Processing Callbacks": stop after so many). The state is in RocksDB with its changelog topic, a checkpoint commits
every 5 s and hints are parsed as JSON: all as by default, and at least once. Every count is published.

SQUEEZED=1 goes further: the state holds bytes, and a sink of our own (.../connectors/sinks/custom-sinks.html) publishes
the counts when a checkpoint commits, not for every hint (CPU 0.7x, measured).

Settings from the environment: KAFKA_BOOTSTRAP_SERVERS, INPUT_TOPIC, OUTPUT_TOPIC, GROUP_ID, STATE_DIR, EXPECTED (after
how many hints to end). Prints `counted N` while it works, and once more when all of it is committed.
"""

import os
import threading
from typing import Any

from quixstreams import Application, State
from quixstreams.sinks import BaseSink, SinkBackpressureError

SAY_S = 0.1


class Latest(BaseSink):
    """Publishes the latest value of each key, as it is, whenever a checkpoint commits."""

    def __init__(self, app: Application, topic: str) -> None:
        super().__init__()
        self.producer = app.get_producer()
        self.topic = topic
        self.latest: dict[bytes, bytes] = {}
        self.errors: list[object] = []

    def add(self, value: bytes, key: bytes, *_: Any, **__: Any) -> None:
        """What the stream hands over, hint by hint."""
        self.latest[key] = value

    def flush(self) -> None:
        """The checkpoint waits for this. Raises SinkBackpressureError: the hints are to be read again."""
        for key, value in self.latest.items():
            self.producer.produce(self.topic, key=key, value=value, on_delivery=self.delivered)
        if self.producer.flush() or self.errors:
            raise SinkBackpressureError(retry_after=1.0)
        self.latest.clear()

    def delivered(self, error: object, _: object) -> None:
        """The broker's answer."""
        if error is not None:
            self.errors.append(error)

    def on_paused(self) -> None:
        """What was not delivered is counted again."""
        self.latest.clear()
        self.errors.clear()


def count(_: object, state: State) -> bytes:
    """How many hints of this key there were, this one included."""
    total: int = state.get("hints", 0) + 1
    state.set("hints", total)
    return b"%d" % total


def count_bytes(_: object, state: State) -> bytes:
    """The same with a state of bytes, which is not serialized again."""
    total = b"%d" % (int(state.get_bytes(b"hints", b"0")) + 1)
    state.set_bytes(b"hints", total)
    return total


def main() -> None:
    """Count until EXPECTED or SIGTERM."""
    expected = int(os.environ["EXPECTED"])
    counted = 0
    done = threading.Event()

    def on_message_processed(*_: object) -> None:
        nonlocal counted
        counted += 1
        if counted >= expected:
            app.stop()

    def say() -> None:
        while not done.wait(SAY_S):
            print(f"counted {counted}", flush=True)

    app = Application(
        os.environ["KAFKA_BOOTSTRAP_SERVERS"],
        consumer_group=os.environ["GROUP_ID"],
        auto_offset_reset="earliest",
        state_dir=os.environ["STATE_DIR"],
        on_message_processed=on_message_processed,
        loglevel="WARNING",
    )
    hints = app.topic(os.environ["INPUT_TOPIC"], key_deserializer="bytes")
    if os.environ.get("SQUEEZED") == "1":
        app.dataframe(hints).apply(count_bytes, stateful=True).sink(Latest(app, os.environ["OUTPUT_TOPIC"]))
    else:
        counts = app.topic(os.environ["OUTPUT_TOPIC"], key_serializer="bytes", value_serializer="bytes")
        app.dataframe(hints).apply(count, stateful=True).to_topic(counts)
    saying = threading.Thread(target=say)
    saying.start()
    try:
        app.run()
    finally:
        done.set()
        saying.join()
    print(f"counted {counted}", flush=True)


if __name__ == "__main__":
    main()
