"""`make soak MINUTES=n`: random faults under load, for n minutes; every round ends with a check of every guarantee.

A round's faults follow from the seed and its number alone. One replica is never ended, only ill-treated: its memory,
file descriptors, database sessions and tasks are read after each round and must stay flat.
"""

import argparse
import asyncio
import logging
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final
from uuid import UUID

import asyncpg
import psutil  # type: ignore[import-untyped]  # has no types

from consumer import migrations
from consumer.demo.servers import Postgres, free_port
from tests.conftest import RunningService, eventually
from tests.faults.proxy import Proxy
from tests.faults.stage import SEED, Grid, Stage, has_begun, stage
from tests.servers import java_available

ROUND_FAULTS: Final = 4
WARM_ROUNDS: Final = 3  # before these are over nothing counts as the beginning
MEMORY_MB: Final = 30.0  # growth of the steady replica that is still called flat
HANDLES: Final = 15  # the same for descriptors and tasks: reconnecting takes a few more for a while


@dataclass
class Soak:
    """What a round may ill-treat."""

    stage: Stage
    server: Postgres
    door: Proxy
    steady: RunningService
    others: list[RunningService]
    random: random.Random
    campaigns: list[UUID]
    bouncing: list[UUID] = field(default_factory=list)

    async def somebody(self) -> RunningService:
        """A replica that may be ended."""
        return self.others.pop(self.random.randrange(len(self.others)))

    async def one_more(self) -> None:
        """In its place."""
        self.others.append(await self.stage.replica(ready=False, **SETTINGS))

    async def kill(self) -> None:
        """SIGKILL."""
        (await self.somebody()).kill()
        await self.one_more()

    async def terminate(self) -> None:
        """SIGTERM; 3 is right where an outage keeps it from finishing."""
        one = await self.somebody()
        await has_begun(one)
        one.expected_exit = None
        one.terminate()
        code = await one.wait(30)
        assert code in (0, 3), (code, one.raw[-10:])
        await self.one_more()

    async def freeze(self) -> None:
        """SIGSTOP for longer than the group waits, any replica."""
        one = self.random.choice([self.steady, *self.others])
        one.process.send_signal(signal.SIGSTOP)
        await asyncio.sleep(self.random.uniform(1, 12))
        one.process.send_signal(signal.SIGCONT)

    async def postgres_restarts(self) -> None:
        """Fast shutdown or SIGKILL, then some seconds of nothing."""
        await asyncio.to_thread(self.random.choice([self.server.stop, self.server.kill]))
        await asyncio.sleep(self.random.uniform(0, 5))
        await asyncio.to_thread(self.server.start)

    async def sessions_end(self) -> None:
        """Every database session of ours."""
        db = await asyncpg.connect(self.server.url())
        await db.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'campaign-stats'"
        )
        await db.close()

    async def connections_break(self) -> None:
        """All of them, to all servers."""
        for proxy in (self.door, *self.stage.grid.proxies.values()):
            proxy.cut()

    async def broker_dies(self) -> None:
        """One of three, and comes back."""
        number = self.random.choice(list(self.stage.grid.cluster.nodes))
        await asyncio.to_thread(self.stage.grid.cluster.nodes[number].kill)
        await asyncio.sleep(self.random.uniform(0, 8))
        await asyncio.to_thread(self.stage.grid.cluster.start, [number])

    async def row_is_held(self) -> None:
        """The product holds the rows of some campaigns."""
        held = self.random.sample(self.campaigns, 5)
        db = await asyncpg.connect(self.server.url(self.stage.url.rpartition("/")[2]))
        async with db.transaction():
            await db.execute("SELECT FROM campaigns WHERE id = ANY ($1) ORDER BY id FOR UPDATE", held)
            await asyncio.sleep(self.random.uniform(0.5, 5))
        await db.close()

    async def somebody_edits(self) -> None:
        """Stored counters by hand, without a word: the sweep's work."""
        db = await asyncpg.connect(self.stage.url)
        await db.execute(
            """UPDATE campaigns SET stats = '{"total": 7, "sent": "many"}' WHERE id = ANY ($1)""",
            self.random.sample(self.campaigns, 3),
        )
        await db.close()

    async def mail_bounces(self) -> None:
        """Of one more campaign; it must be paused, once."""
        [campaign] = await self.stage.upstream.campaigns(1, {"pending": 5, "sent": 200, "bounced": 20})
        self.bouncing.append(campaign)
        await self.stage.upstream.change([campaign], "sent")


FAULTS: Final[tuple[Callable[[Soak], Awaitable[None]], ...]] = (
    Soak.kill, Soak.terminate, Soak.freeze, Soak.postgres_restarts, Soak.sessions_end, Soak.connections_break,
    Soak.broker_dies, Soak.row_is_held, Soak.somebody_edits, Soak.mail_bounces,
)  # fmt: skip
SETTINGS: Final[dict[str, Any]] = {"sweep_interval_s": 5}


@dataclass
class Reading:
    """Of the steady replica, when all is quiet."""

    memory_mb: float
    descriptors: int
    sessions: int
    tasks: int


async def read(one: Soak) -> Reading:
    """Ask the system, the database and the process itself."""
    process = psutil.Process(one.steady.process.pid)
    before = len(one.steady.messages("tasks"))
    one.steady.process.send_signal(signal.SIGUSR2)
    await eventually(lambda: len(one.steady.messages("tasks")) > before, "it counts its tasks", one.steady)
    to_database = [
        connection
        for connection in process.net_connections()
        if connection.raddr and connection.raddr.port == one.door.port
    ]
    return Reading(
        process.memory_info().rss / 2**20,
        process.num_fds(),
        len(to_database),
        one.steady.messages("tasks")[-1]["tasks"],
    )


async def swept(one: Soak) -> None:
    """Wait until a sweep that began after now is over: what nobody told is found then."""
    db = await asyncpg.connect(one.stage.url)
    over = "SELECT lap_started > $1 AND lap_finished >= lap_started FROM campaign_stats.sweep"
    try:
        for _ in range(2):  # a lap's begin is written with its first page, which may have been read before
            is_over = partial(db.fetchval, over, await db.fetchval("SELECT clock_timestamp()"))
            await eventually(is_over, "a whole sweep", one.steady, timeout_s=60)
    finally:
        await db.close()


async def one_round(one: Soak, number: int) -> tuple[list[str], list[str], Reading, int]:
    """Faults under load, quiet, check: the faults' names, the problems, a reading, how many hints."""
    one.random = random.Random(f"{SEED}:{number}")
    chosen = [one.random.choice(FAULTS) for _ in range(ROUND_FAULTS)]
    stop, before = asyncio.Event(), one.stage.upstream.records

    async def load() -> None:
        choose = random.Random(f"{SEED}:{number}:load")
        while not stop.is_set():
            some = choose.sample(one.campaigns, 20)
            status, of = choose.choice([("sent", "pending"), ("replied", "sent"), ("pending", "replied")])
            await one.stage.upstream.change(some, status, of=of)
            await one.stage.upstream.request(some[:1])
            if choose.random() < 0.1:
                await one.stage.upstream.babble(2)

    work = asyncio.create_task(load())
    try:
        for fault in chosen:
            await asyncio.sleep(one.random.uniform(0, 3))
            await fault(one)
    finally:
        stop.set()
        await asyncio.wait_for(work, 120)
    if Soak.somebody_edits in chosen:
        await swept(one)
    findings = await one.stage.settled_and_checked(paused=one.bouncing)
    await one.steady.ready()
    return (
        [fault.__name__ for fault in chosen],
        findings.problems,
        await read(one),
        (one.stage.upstream.records - before),
    )


async def soak(minutes: float, directory: Path) -> int:
    """Round after round; 1 when anything did not hold."""
    print(f"seed {SEED}: make soak MINUTES={minutes:g} SEED={SEED} repeats this", flush=True)
    grid, server = Grid(directory / "grid"), Postgres(directory / "pg", options={"fsync": "off"}, tcp=True)
    door = Proxy(free_port(), server.port)
    bad = rounds = hints = 0
    readings: list[Reading] = []
    try:
        grid.start()
        server.start()
        door.start()
        admin = await asyncpg.connect(server.url())
        await admin.execute("CREATE DATABASE template_cs")
        await admin.close()
        await migrations.migrate(server.url("template_cs"), reference_schema=True)
        async with stage(grid, server, partitions=6, door=door) as one:
            campaigns = await one.upstream.campaigns(100, {"pending": 60, "sent": 20})
            steady = await one.replica(**SETTINGS)
            it = Soak(one, server, door, steady, [], random.Random(SEED), campaigns)
            for _ in range(2):
                await it.one_more()
            await one.upstream.change(campaigns, "sent")
            end = time.monotonic() + minutes * 60
            while time.monotonic() < end:
                begun = time.monotonic()
                faults, problems, reading, count = await one_round(it, rounds)
                readings.append(reading)
                rounds, hints, bad = rounds + 1, hints + count, bad + bool(problems)
                print(
                    f"{'FAILED' if problems else 'ok':6} round {rounds:3} {time.monotonic() - begun:5.0f} s"
                    f" {count:6} records {reading.memory_mb:5.0f} MB {reading.descriptors:3} fds"
                    f" {reading.sessions} sessions {reading.tasks:3} tasks  {', '.join(faults)}",
                    flush=True,
                )
                for problem in problems[:10]:
                    print(f"       {problem}", flush=True)
    finally:
        door.stop()
        server.stop()
        grid.stop()
    growth = grown(readings)
    print(f"{rounds} rounds, {hints} records, {len(it.bouncing)} pauses; {bad} rounds failed; {growth}")
    return 1 if bad or not rounds or growth.startswith("GROWS") else 0


def grown(readings: list[Reading]) -> str:
    """The last third against the first one after the warm-up, by their medians."""
    counted = readings[WARM_ROUNDS:]
    if len(counted) < 6:
        return "too few rounds to say whether it grows"
    third = len(counted) // 3
    words, grows = [], False
    for name, allowed in (("memory_mb", MEMORY_MB), ("descriptors", HANDLES), ("sessions", 2), ("tasks", HANDLES)):
        first = statistics.median(getattr(one, name) for one in counted[:third])
        last = statistics.median(getattr(one, name) for one in counted[-third:])
        grows |= last - first > allowed
        words.append(f"{name} {first:.0f} -> {last:.0f}")
    return f"{'GROWS' if grows else 'flat'}: {', '.join(words)}"


def main() -> None:
    """Parse, run, exit."""
    parser = argparse.ArgumentParser(description="Random faults under load, checked round after round.")
    parser.add_argument("--minutes", type=float, required=True)
    minutes = parser.parse_args().minutes
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)  # the tests' own client, which is cut off too
    if not java_available():
        sys.exit("soak: Java 17 and Maven are missing (Debian: openjdk-17-jre-headless maven)")
    with tempfile.TemporaryDirectory(prefix="cs-") as name:
        os.chmod(name, 0o755)  # PostgreSQL may run as another account
        sys.exit(asyncio.run(soak(minutes, Path(name))))


if __name__ == "__main__":
    main()
