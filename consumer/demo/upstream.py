"""The product around the service: its engine moves prospects and publishes hints, as unreliably as in real life."""

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Final
from uuid import UUID, uuid4

import asyncpg

from consumer.broker import Outgoing, Publisher
from consumer.demo.place import DemoFailed, Place
from consumer.demo.world import Campaign, Role
from schemas.events import STATUS_CHANGED, SYNC_REQUESTED

SENDERS: Final = 4  # connections; each campaign belongs to one, as in the product's engine
MOVES_PER_SECOND: Final = 60.0  # of each sender
TROUBLE_SHARE: Final = 0.35  # of the moves go to campaigns that bounce, so that something happens in the time
BATCH_S: Final = 0.02
LATEST_S: Final = 2.0
SOURCE: Final = "outreach-engine"
CONTENT_TYPE: Final = (("content-type", b"application/cloudevents+json"),)
NEXT: Final[dict[str, tuple[str, ...]]] = {
    "sent": ("replied", "completed", "completed", "timed_out", "cancelled"),
    "connection_sent": ("connected", "connected", "timed_out", "cancelled"),
    "connected": ("message_sent",),
    "message_sent": ("replied", "completed", "timed_out"),
}


class Desk:
    """One campaign as its sender sees it: who is next, who is in flight, whose mail is about to come back."""

    def __init__(self, campaign: Campaign) -> None:
        self.campaign = campaign
        self.stopped = False  # the subscriber heard of a pause
        self._pending = [row for row, status, _, _ in campaign.rows if status == "pending"]
        self._open = [(row, status) for row, status, _, _ in campaign.rows if status in NEXT]
        self._doomed: list[UUID] = []
        self._mailed = 0

    def move(self, chance: random.Random) -> tuple[UUID, str, str] | None:
        """The next prospect with its statuses before and after; None when there is nothing to do."""
        if self._doomed and (self.stopped or chance.random() < 0.5):
            return self._doomed.pop(0), "sent", "bounced"
        if self.stopped:
            return None
        if self._pending and (chance.random() < 0.7 or self.campaign.role is Role.BOUNCING):
            prospect = self._pending.pop()
            if self.campaign.type == "linkedin":
                self._open.append((prospect, "connection_sent"))
                return prospect, "pending", "connection_sent"
            self._mailed += 1
            if self.campaign.bounce_every and self._mailed % self.campaign.bounce_every == 0:
                self._doomed.append(prospect)
            else:
                self._open.append((prospect, "sent"))
            return prospect, "pending", "sent"
        if not self._open:
            return None
        place = chance.randrange(len(self._open))
        prospect, before = self._open[place]
        after = chance.choice(NEXT[before])
        if after in NEXT:
            self._open[place] = (prospect, after)
        else:
            self._open[place] = self._open[-1]
            self._open.pop()
        return prospect, before, after


class Mailbox:
    """Publishes hints and sync requests in small batches, after the commit they speak of; some later than that."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._publisher = Publisher(place.kafka, idempotence=not place.embedded_kafka)
        self._waiting: list[tuple[float, Outgoing]] = []  # (monotonic time from which it may go, record)

    def put(self, record: Outgoing, after_s: float = 0.0) -> None:
        """Publish it soon, or `after_s` seconds from now."""
        self._waiting.append((time.monotonic() + after_s, record))

    def hint(
        self, campaign: UUID, prospect: UUID, before: str | None, after: str, *, copies: int, late_s: float
    ) -> None:
        """A `prospect.status_changed.v1`; copies share one id."""
        data = {"campaign_id": str(campaign), "prospect_id": str(prospect), "to_status": after}
        if before is not None:
            data["from_status"] = before
        record = self._record(STATUS_CHANGED, str(uuid4()), campaign, data)
        for _ in range(copies):
            self.put(record, late_s)

    def request(self, campaign: UUID, user_id: UUID | None, *, copies: int = 1) -> str:
        """A `campaign.sync_requested.v1`; returns its id."""
        data = {"campaign_id": str(campaign), "reason": "demo"}
        if user_id is not None:
            data["user_id"] = str(user_id)
        request_id = str(uuid4())
        for _ in range(copies):
            self.put(self._record(SYNC_REQUESTED, request_id, campaign, data))
        return request_id

    def garbage(self, value: bytes) -> None:
        """Bytes that are no event."""
        self.put(Outgoing(self._place.topics.of(STATUS_CHANGED), b"garbage", value))

    async def run(self) -> None:
        """Publish what is due, for ever."""
        while True:
            await self.flush()
            await asyncio.sleep(BATCH_S)

    async def flush(self, *, everything: bool = False) -> None:
        """Publish what is due (or everything) and wait for the acknowledgements. Raises DemoFailed, Unavailable."""
        now = time.monotonic()
        due = [record for moment, record in self._waiting if everything or moment <= now]
        self._waiting = [] if everything else [(moment, record) for moment, record in self._waiting if moment > now]
        for _ in range(3):
            if not due:
                return
            sent = await self._publisher.publish(due)
            due = [record for record, outcome in zip(due, sent, strict=True) if outcome.error is not None]
        if due:
            raise DemoFailed("Kafka does not acknowledge what the upstream publishes")

    async def close(self) -> None:
        """Drop the producer."""
        await self._publisher.close(5.0)

    def _record(self, event_type: str, event_id: str, campaign: UUID, data: dict[str, str]) -> Outgoing:
        event = {
            "specversion": "1.0",
            "id": event_id,
            "source": SOURCE,
            "type": event_type,
            "time": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
            "subject": str(campaign),
            "datacontenttype": "application/json",
            "data": data,
        }
        topic = self._place.topics.of(event_type)
        return Outgoing(topic, str(campaign).encode(), json.dumps(event).encode(), CONTENT_TYPE)


class Engine:
    """The product's senders. `tally` counts what they did, by name."""

    def __init__(self, pool: "asyncpg.Pool[asyncpg.Record]", world: Sequence[Campaign], mailbox: Mailbox) -> None:
        self.tally: Counter[str] = Counter()
        self.stopping = False  # not cancelled: a sender finishes its transaction
        self._pool = pool
        self._mailbox = mailbox
        self._chance = random.Random()
        self._world = world
        self.desks = {
            campaign.id: Desk(campaign)
            for campaign in world
            if campaign.role in (Role.STEADY, Role.SILENT, Role.BOUNCING, Role.OBSERVED)
        }

    def stop_sending(self, campaign: UUID) -> None:
        """The subscriber's reaction to a pause. Mails on their way may still come back."""
        if campaign in self.desks:
            self.desks[campaign].stopped = True

    def resume(self, campaign: UUID, *, cleaned: bool) -> None:
        """Its owner goes on, with a cleaned list or with the same one."""
        desk = self.desks[campaign]
        desk.stopped = False
        if cleaned:
            desk.campaign.bounce_every = 100

    async def run(self) -> None:
        """All senders, until `stopping`."""
        async with asyncio.TaskGroup() as group:
            for number in range(SENDERS):
                mine = list(self.desks.values())[number::SENDERS]
                group.create_task(self._send(mine), name=f"sender {number}")

    async def _send(self, desks: Sequence[Desk]) -> None:
        trouble = [desk for desk in desks if desk.campaign.role is Role.BOUNCING]
        due = time.monotonic()
        async with self._pool.acquire() as connection:
            while not self.stopping:
                due = max(due + 1 / MOVES_PER_SECOND, time.monotonic() - 0.5)
                await asyncio.sleep(max(0.0, due - time.monotonic()))
                desk = self._chance.choice(trouble if trouble and self._chance.random() < TROUBLE_SHARE else desks)
                move = desk.move(self._chance)
                if move is None:
                    continue
                prospect, before, after = move
                await connection.execute("SELECT public.update_prospect_with_stat($1, $2)", prospect, after)
                self.tally["moves"] += 1
                if after == "bounced":
                    self.tally["bounces"] += 1
                self._tell(desk.campaign, prospect, before, after)

    def _tell(self, campaign: Campaign, prospect: UUID, before: str, after: str) -> None:
        """The hint after the commit: usually right; also late, twice, misleading, and now and then none at all."""
        luck = self._chance.random()
        if campaign.role is Role.SILENT or luck < 0.03:
            self.tally["never hinted"] += 1
            return
        named, copies, late_s = campaign.id, 1, 0.0
        if luck < 0.06:
            self.tally["misleading"] += 1
            named = self._chance.choice(self._world).id  # and the right campaign gets none
        elif luck < 0.09:
            self.tally["misleading"] += 1
            before, after = "bounced", "teleported"
        elif luck < 0.15:
            self.tally["late"] += 1
            late_s = self._chance.uniform(0.3, LATEST_S)
        elif luck < 0.21:
            self.tally["doubled"] += 1
            copies = 2
        self.tally["hints"] += copies
        self._mailbox.hint(named, prospect, before, after, copies=copies, late_s=late_s)
