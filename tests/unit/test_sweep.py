"""The sweep beside campaigns that take too long to compare: every other one is looked at once, in order."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

from prometheus_client import CollectorRegistry

from consumer.errors import TooSlow
from consumer.guard import Limits
from consumer.health import Health
from consumer.metrics import Metrics
from consumer.reconcile import Sweep

CAMPAIGNS = 1_000
SLOW, IMPOSSIBLE = range(300, 400), 500


class Store:
    """The campaigns 0 to 999: those of SLOW take too long by more than 7, one of them always."""

    def __init__(self) -> None:
        self.after: int | None = None
        self.seen: list[int] = []
        self.laps = 0

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator["Store"]:
        yield self

    savepoint = transaction

    async def sweep_turn(self) -> tuple[int | None, None]:
        return self.after, None

    def _next(self, after: int | None, campaigns: int) -> list[int]:
        return [number for number in range(CAMPAIGNS) if after is None or number > after][:campaigns]

    async def sweep_page(self, after: int | None, campaigns: int) -> Sequence[Any]:
        page = self._next(after, campaigns)
        if IMPOSSIBLE in page or (len(page) > 7 and any(number in SLOW for number in page)):
            raise TooSlow(is_lock=False)
        self.seen += page
        return [
            SimpleNamespace(
                campaign_id=number, type="linkedin", status="draft", waiting=True, differs=False, counts={},
                guard_paused_at=None, user_limits=None, campaign_limits=None,
            )
            for number in page
        ]  # fmt: skip

    async def sweep_next(self, after: int | None) -> int:
        return self._next(after, 1)[0]

    async def sweep_advance(self, after: int | None, interval_s: float) -> None:
        self.after = after
        self.laps += after is None

    async def save(self, outcome: object) -> None:
        pass


async def test_campaigns_too_large_for_a_page_are_compared_in_smaller_ones_or_left_out() -> None:
    store: Any = Store()
    sweep = Sweep(store, Limits(), Metrics(CollectorRegistry()), Health(), interval_s=1, grace_s=1, retention_days=1)
    while not store.laps:
        await sweep.page()
    assert store.seen == [number for number in range(CAMPAIGNS) if number != IMPOSSIBLE]
