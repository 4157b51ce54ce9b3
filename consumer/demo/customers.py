"""People and other programs around the product: they ask, resume, edit by hand, import, and send garbage."""

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Sequence
from typing import Final
from uuid import UUID, uuid4

import asyncpg

from consumer.demo.evidence import Asked
from consumer.demo.upstream import Engine, Mailbox
from consumer.demo.world import Campaign, Role
from schemas.events import STATS_UPDATED, SYNC_REJECTED

TURN_S: Final = 0.1
ASK_EVERY_S: Final = 0.6
EDIT_EVERY_S: Final = 2.5
RESUME_AFTER_S: Final = 3.0
GARBAGE: Final = (
    b'{"specversion": "1.0", "type": "prospect.status_changed.v1", "data": {"campaign_',
    b"PROSPECT;CHANGED;sent;bounced",
)


class Customers:
    """Everything besides the engine. What they did is kept for the proof."""

    def __init__(
        self,
        pool: "asyncpg.Pool[asyncpg.Record]",
        world: Sequence[Campaign],
        engine: Engine,
        mailbox: Mailbox,
        seconds: float,
    ) -> None:
        self.asked: dict[str, Asked] = {}
        self.garbage: list[bytes] = []
        self.stopping = False  # not cancelled: what was committed must also be remembered
        self.resumed: Counter[UUID] = Counter()
        self._pool = pool
        self._world = world
        self._engine = engine
        self._mailbox = mailbox
        self._seconds = seconds
        self._chance = random.Random()
        self._to_resume: list[tuple[float, UUID]] = []
        self._resumable = [campaign.id for campaign in world if campaign.role is Role.BOUNCING][:2]

    def hear_of_pause(self, campaign: UUID) -> None:
        """An owner reads the news: one goes on with a cleaned list, one with the same list, the others think."""
        if campaign in self._resumable and not self.resumed[campaign]:
            self._to_resume.append((time.monotonic() + RESUME_AFTER_S, campaign))

    async def run(self) -> None:
        """All of it, until `stopping`; the rare things at fixed parts of the time."""
        begun = time.monotonic()
        script = [
            (0.05, self._ask_in_vain),
            (0.15, self._send_garbage),
            (0.30, self._import_without_hint),
            (0.50, self._time_out_many),
        ]
        ask_at = edit_at = begun
        while not self.stopping:
            now = time.monotonic()
            while script and now - begun >= script[0][0] * self._seconds:
                await script.pop(0)[1]()
            if now >= ask_at:
                self._ask()
                ask_at = now + ASK_EVERY_S
            if now >= edit_at:
                await self._edit_by_hand()
                edit_at = now + EDIT_EVERY_S
            for moment, campaign in list(self._to_resume):
                if now >= moment:
                    self._to_resume.remove((moment, campaign))
                    await self._resume(campaign)
            await asyncio.sleep(TURN_S)

    def _ask(self) -> None:
        campaign = self._chance.choice(self._world)
        user_id = self._chance.choice((None, campaign.user_id))
        copies = 2 if self._chance.random() < 0.15 else 1
        self._remember(campaign.id, user_id, STATS_UPDATED, copies)

    async def _ask_in_vain(self) -> None:
        self._remember(uuid4(), None, SYNC_REJECTED)
        self._remember(self._chance.choice(self._world).id, uuid4(), SYNC_REJECTED)

    def _remember(self, campaign: UUID, user_id: UUID | None, expected: str, copies: int = 1) -> None:
        self.asked[self._mailbox.request(campaign, user_id, copies=copies)] = Asked(campaign, expected)
        self._engine.tally["sync requests"] += copies

    async def _send_garbage(self) -> None:
        for value in GARBAGE:
            self._mailbox.garbage(value)
            self.garbage.append(value)

    async def _edit_by_hand(self) -> None:
        """Somebody "corrects" stored numbers, and tells nobody."""
        campaign = self._chance.choice([c for c in self._world if c.role in (Role.QUIET, Role.STEADY)])
        wrong = json.dumps({"sent": self._chance.randint(0, 900), "replied": self._chance.randint(0, 90)})
        await self._pool.execute(
            "UPDATE public.campaigns SET stats = stats || $2::text::jsonb WHERE id = $1", campaign.id, wrong
        )
        self._engine.tally["edits by hand"] += 1

    async def _import_without_hint(self) -> None:
        """A list of 300 new prospects goes into a draft; nobody publishes anything."""
        draft = next(c for c in self._world if c.role is Role.QUIET and c.status == "draft")
        await self._pool.execute(
            "INSERT INTO public.campaign_prospects (campaign_id, user_id, status, source)"
            " SELECT $1, $2, 'pending', 'import' FROM generate_series(1, 300)",
            draft.id,
            draft.user_id,
        )
        self._engine.tally["imported"] += 300

    async def _time_out_many(self) -> None:
        """The product's night job moves 100 prospects in one statement, past its own counters; one hint for all."""
        campaign = next(c for c in self._world if c.role is Role.STEADY and c.type == "email")
        moved = await self._pool.fetch(
            """UPDATE public.campaign_prospects SET status = 'timed_out', updated_at = clock_timestamp()
                WHERE id IN (SELECT id FROM public.campaign_prospects
                              WHERE campaign_id = $1 AND status = 'sent' ORDER BY id LIMIT 100 FOR UPDATE SKIP LOCKED)
                RETURNING id""",
            campaign.id,
        )
        self._engine.tally["moves"] += len(moved)
        if moved:
            self._engine.tally["hints"] += 1
            self._mailbox.hint(campaign.id, moved[0]["id"], "sent", "timed_out", copies=1, late_s=0.0)

    async def _resume(self, campaign: UUID) -> None:
        """As the product does it: status and reason of the row. It tells nobody; the sweep sees it."""
        done = await self._pool.execute(
            "UPDATE public.campaigns SET status = 'active', pause_reason = NULL, updated_at = clock_timestamp()"
            " WHERE id = $1 AND status = 'paused'",
            campaign,
        )
        if done != "UPDATE 1":
            return
        self.resumed[campaign] += 1
        self._engine.tally["resumed"] += 1
        self._engine.resume(campaign, cleaned=campaign == self._resumable[0])
