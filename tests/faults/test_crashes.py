"""SIGKILL at every step of the way: nothing is lost, nothing is invented, whoever comes next repeats it harmlessly."""

import asyncio
import itertools
import random
from collections.abc import Callable
from uuid import UUID, uuid4

import pytest

from consumer.demo.servers import Postgres
from tests.conftest import RunningService, eventually
from tests.faults.checker import Findings
from tests.faults.rigged import BACKLOG_POINTS, POINTS
from tests.faults.stage import SEED, Grid, Stage, backlog, held_by_the_product, stage

pytestmark = pytest.mark.apache_kafka

AT_ONCE = 5  # scenarios that run side by side, most of the time waiting for the group to miss its dead member


async def eventful(one: Stage, doomed: RunningService) -> list[UUID]:
    """Something for every part of the service to do, and no second word on any of it; who must be paused.

    A campaign's row is held until `doomed` has put its recount off, or is dead.
    """
    upstream = one.upstream
    plain = await upstream.campaigns(30, {"pending": 20, "sent": 5})
    bouncing = await upstream.campaigns(3, {"pending": 5, "sent": 200, "bounced": 20})
    locked = await upstream.campaigns(1, {"pending": 20})
    asked = await upstream.campaigns(3, {"sent": 3})
    async with held_by_the_product(one, locked[0], doomed):
        await upstream.babble(3)
        await upstream.change([*plain, *bouncing], "sent")
        await upstream.request([*asked, uuid4()])
    return bouncing


async def killed_there(grid: Grid, postgres: Postgres, point: str, *, breakage: str = "") -> Findings:
    """A replica dies at the point, another one finishes the work; what the checker finds."""
    async with stage(grid, postgres) as one:
        sweeps = "sweep" in point
        drifted = await one.upstream.campaigns(2, {"sent": 4}) if sweeps else []
        interval_s = 0.3 if sweeps else 0
        doomed = await one.replica(point=point, breakage=breakage, ready=not sweeps, sweep_interval_s=interval_s)
        async with asyncio.timeout(90):
            paused = await eventful(one, doomed)
        await eventually(lambda: doomed.process.returncode is not None, f"killed at `{point}`", timeout_s=40)
        assert doomed.process.returncode == -9, (point, doomed.raw[-5:])
        await one.replica(sweep_interval_s=interval_s)
        return await one.settled_and_checked(paused=paused, untold=[] if sweeps else drifted)


async def test_a_kill_at_any_step_loses_and_invents_nothing(grid: Grid, postgres: Postgres) -> None:
    """SIGKILL at each of the named points between poll and offsets."""
    turn = asyncio.Semaphore(AT_ONCE)

    async def one(point: str) -> tuple[str, list[str]]:
        async with turn:
            return point, (await killed_there(grid, postgres, point)).problems

    results = await asyncio.gather(*(one(point) for point in POINTS))
    assert [result for result in results if result[1]] == []


BROKEN = (
    ("offsets_before_the_transaction", "in chunk", "follower: nothing was ever told"),
    ("stats_without_their_news", "after chunk", "follower: nothing was ever told"),
    ("delete_before_the_acknowledgement", "before send", "follower: nothing was ever told"),
    ("fresh_id_for_each_sending", "after acknowledgement", "pauses: one pause was told under two ids|id of campaign."),
    ("dead_letters_after_the_offsets", "after offsets", "dead letters: b'no JSON"),
    ("take_rows_and_forget_them", "in deferred", "numbers: "),
)
"""Deliberate breakage, where it is killed, what the checker must say."""


async def test_the_same_kills_find_a_service_that_is_broken(grid: Grid, postgres: Postgres) -> None:
    """Six deliberate breakages, each found by a kill at the right moment."""
    turn = asyncio.Semaphore(AT_ONCE)

    async def one(breakage: str, point: str) -> list[str]:
        async with turn:
            return (await killed_there(grid, postgres, point, breakage=breakage)).problems

    results = await asyncio.gather(*(one(breakage, point) for breakage, point, _ in BROKEN))
    for (breakage, point, due), problems in zip(BROKEN, results, strict=True):
        assert any(problem.startswith(tuple(due.split("|"))) for problem in problems), (breakage, point, problems)


async def killed_behind_a_backlog(grid: Grid, postgres: Postgres, point: str, *, breakage: str = "") -> Findings:
    """The same where so many hints wait that some are recounted ahead; most campaigns are spoken of once, first."""
    async with stage(grid, postgres, partitions=1) as one:
        campaigns = await one.upstream.campaigns(600, {"sent": 5})
        await backlog(one, campaigns, len(campaigns))
        await backlog(one, campaigns[:100], 12_000)
        doomed = await one.replica(point=point, breakage=breakage, ready=False)
        await eventually(lambda: doomed.process.returncode is not None, f"killed at `{point}`", timeout_s=40)
        assert doomed.process.returncode == -9, (point, doomed.raw[-5:])
        await one.replica()
        return await one.settled_and_checked()


async def test_a_kill_behind_a_backlog_loses_nothing(grid: Grid, postgres: Postgres) -> None:
    """SIGKILL while a backlog is read and campaigns are recounted ahead, and when it is read"""
    results = await asyncio.gather(*(killed_behind_a_backlog(grid, postgres, point) for point in BACKLOG_POINTS))
    assert [found.problems for found in results] == [[]] * len(BACKLOG_POINTS)


async def test_the_same_kills_find_offsets_that_move_with_what_is_recounted_ahead(
    grid: Grid, postgres: Postgres
) -> None:
    """Breakage found by each of the kills behind a backlog [offsets_with_what_is_recounted_ahead]"""
    breakage = "offsets_with_what_is_recounted_ahead"
    results = await asyncio.gather(
        *(killed_behind_a_backlog(grid, postgres, point, breakage=breakage) for point in BACKLOG_POINTS)
    )
    for point, found in zip(BACKLOG_POINTS, results, strict=True):
        assert any(problem.startswith("follower: nothing was ever told") for problem in found.problems), point


@pytest.mark.faults
async def test_kills_at_random_moments_under_load(
    grid: Grid, postgres: Postgres, record_property: Callable[[str, object], None]
) -> None:
    """SIGKILL of one of three replicas at fifteen random moments under load"""
    async with stage(grid, postgres, partitions=6) as one:
        campaigns = await one.upstream.campaigns(100, {"pending": 100})
        bouncing = await one.upstream.campaigns(15, {"pending": 5, "sent": 200, "bounced": 20})
        replicas = [await one.replica() for _ in range(3)]
        stop = asyncio.Event()

        async def load() -> None:
            choose = random.Random(f"{SEED}:load")
            for turn in itertools.count():
                if stop.is_set():
                    return
                some = choose.sample(campaigns, 20)
                await one.upstream.change([*some, *bouncing[turn : turn + 1]], "sent")
                await one.upstream.request(some[:2])
                await one.upstream.babble(1)

        dice = random.Random(f"{SEED}:kills")
        work = asyncio.create_task(load())
        try:
            for _ in range(15):
                await asyncio.sleep(dice.uniform(0.2, 3))
                replicas.pop(dice.randrange(len(replicas))).kill()
                replicas.append(await one.replica(ready=False))
        finally:
            stop.set()
            await work
        await one.upstream.change([*campaigns, *bouncing], "sent")  # the last word on each
        findings = await one.settled_and_checked(paused=bouncing)
        record_property("measured", f"{one.upstream.records} records, {len(findings.told)} events told")
        assert findings.problems == []
