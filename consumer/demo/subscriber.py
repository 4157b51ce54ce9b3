"""A subscriber as another team would write it: plain JSON, reacts to a pause once per id, follows stats by version."""

import asyncio
import json
from collections import Counter
from collections.abc import Callable
from typing import Any, Final
from uuid import UUID

from aiokafka import AIOKafkaConsumer

from consumer.demo.evidence import DeadLetter, Event
from consumer.demo.place import Place
from schemas.events import PAUSED, STATS_UPDATED

POLL_MS: Final = 100
STOP_DEADLINE_S: Final = 5.0


class Subscriber:
    """Reads everything the service writes, from the first record on, outside any group."""

    def __init__(self, place: Place, react: Callable[[UUID], None]) -> None:
        self.events: list[Event] = []  # as they came, repetitions too
        self.dead_letters: list[DeadLetter] = []
        self.latest: dict[UUID, dict[str, Any]] = {}  # data of the newest stats_updated; JSON of others, hence Any
        self.pauses: dict[str, dict[str, Any]] = {}  # event id -> data
        self.tally: Counter[str] = Counter()
        self._react = react
        self._dead_letter_topic = place.topics.dead_letters
        self._consumer: Any = AIOKafkaConsumer(  # Any: aiokafka has no types
            *place.topics.written,
            place.topics.dead_letters,
            bootstrap_servers=place.bootstrap.split(","),
            client_id="campaign-stats-demo-subscriber",
            group_id=None,
            enable_auto_commit=False,
            auto_offset_reset="earliest",
            fetch_max_wait_ms=10 if place.embedded_kafka else 100,
        )

    async def start(self) -> None:
        """Connect."""
        await self._consumer.start()

    async def close(self) -> None:
        """Stop; never hangs."""
        stopping = asyncio.ensure_future(self._consumer.stop())
        await asyncio.wait([stopping], timeout=STOP_DEADLINE_S)
        if not stopping.done():
            stopping.cancel()

    async def run(self) -> None:
        """Read for ever."""
        while True:
            found = await self._consumer.getmany(timeout_ms=POLL_MS)
            for partition, records in found.items():
                for record in records:
                    self._take(partition.topic, record)

    async def has_read_all(self) -> bool:
        """Whether nothing that is in the topics now is still unread."""
        partitions = list(self._consumer.assignment())
        ends = await self._consumer.end_offsets(partitions)
        return all([await self._consumer.position(partition) >= ends[partition] for partition in partitions])

    def _take(self, topic: str, record: Any) -> None:
        if topic == self._dead_letter_topic:
            said = {name: (content or b"").decode("utf-8", "replace") for name, content in record.headers}
            place = (said.get("dead-letter-topic", ""), said.get("dead-letter-partition", ""),
                     said.get("dead-letter-offset", ""))  # fmt: skip
            self.dead_letters.append(DeadLetter(place, record.value, said.get("dead-letter-reason", "")))
            self.tally["dead letters"] += 1
            return
        event = Event.parse(json.loads(record.value))
        self.events.append(event)
        self.tally[event.type] += 1
        if event.type == PAUSED:
            if event.id not in self.pauses:  # at least once: the second time is no news
                self.pauses[event.id] = event.data
                self._react(event.campaign)
        elif event.type == STATS_UPDATED:
            known = self.latest.get(event.campaign)
            if known is None or event.data["version"] > known["version"]:
                self.latest[event.campaign] = event.data
