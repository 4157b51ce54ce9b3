"""Servers away, half away, read-only, full, silent: the service stays, says so, waits quietly, goes on by itself."""

import asyncio
import json
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

import asyncpg
import psutil  # type: ignore[import-untyped]  # has no types
import pytest

from consumer import migrations
from consumer.demo.servers import Postgres, free_port
from tests.conftest import RunningService, eventually
from tests.faults.proxy import Proxy
from tests.faults.stage import SLACK, Grid, Stage, stage
from tests.world import hint

pytestmark = pytest.mark.apache_kafka

RECOVERY_S = 10.0  # from healing to everything told and committed
DEAD_SESSION_S = 12.0  # until a connection is found dead: 5 s without an answer, after a second or two of peace
QUIET_CPU = 0.15  # of a core while nothing can be done; what the gauges ask is part of it

Record = Callable[[str, object], None]


@asynccontextmanager
async def sacrificed(servers_directory: Path) -> AsyncIterator[tuple[Postgres, Proxy]]:
    """A PostgreSQL that may be ill-treated, and the door to it."""
    server = Postgres(servers_directory / f"pg-{os.urandom(3).hex()}", options={"max_connections": "60"}, tcp=True)
    try:
        await asyncio.to_thread(server.start)
        admin = await asyncpg.connect(server.url())
        await admin.execute("CREATE DATABASE template_cs")
        await admin.close()
        await migrations.migrate(server.url("template_cs"), reference_schema=True)
        proxy = Proxy(free_port(), server.port)
        proxy.start()
        try:
            yield server, proxy
        finally:
            await asyncio.to_thread(proxy.stop)
    finally:
        await asyncio.to_thread(server.stop)


@dataclass
class Site:
    """One replica, what it works on, and an eye on it."""

    stage: Stage
    replica: RunningService
    campaigns: list[UUID]
    server: Postgres
    door: Proxy
    process: Any
    patience_s: float = 60.0  # for what must come, sooner or later
    cpu_share: float | None = None

    async def degraded(self) -> list[str]:
        """What `/readyz` says; it must say that it is ready all the time."""
        status, body = await self.replica.get("/readyz")
        assert status == 200, body
        said: list[str] = json.loads(body)["degraded"]
        return said

    async def until_degraded(self, dependency: str) -> None:
        """Wait until this one is among the degraded."""

        async def is_said() -> bool:
            return dependency in await self.degraded()

        await eventually(is_said, f"{dependency} is degraded", self.replica, timeout_s=self.patience_s / 2)

    @asynccontextmanager
    async def quiet(self, seconds: float) -> AsyncIterator[None]:
        """What is done inside, and the rest of `seconds`: measured is the CPU that the replica takes."""
        begun, before = time.monotonic(), sum(self.process.cpu_times()[:2])
        yield
        await asyncio.sleep(max(0.0, seconds - (time.monotonic() - begun)))
        self.cpu_share = (sum(self.process.cpu_times()[:2]) - before) / (time.monotonic() - begun)

    async def say(self, campaigns: list[UUID]) -> None:
        """A hint for each."""
        topic = self.stage.topics.of("prospect.status_changed.v1")
        await self.stage.upstream.publish([(topic, str(one), hint(one)) for one in campaigns])

    @asynccontextmanager
    async def busy(self) -> AsyncIterator[None]:
        """With an upstream at work, past every proxy; it has said its last word on each campaign when this ends."""
        stop = asyncio.Event()

        async def work() -> None:
            while not stop.is_set():
                await self.stage.upstream.change(self.campaigns[:5], "sent")
                await asyncio.sleep(0.1)
            await self.stage.upstream.change(self.campaigns, "replied", of="sent")

        task = asyncio.create_task(work())
        try:
            yield
        finally:
            stop.set()
            await asyncio.wait_for(task, 90)

    async def problems(self, healed_at: float, record: Record) -> list[str]:
        """Everything the design promises of an outage; what does not hold."""

        async def is_well() -> bool:
            return await self.degraded() == []

        await eventually(is_well, "nothing is degraded", self.replica, timeout_s=self.patience_s)
        findings = await self.stage.settled_and_checked()
        if self.replica.process.returncode is not None:
            return ["the service ended", *findings.problems]
        recovery_s = self.stage.quiet_at - healed_at
        problems = findings.problems
        metrics = await self.replica.metrics()
        put_off = {  # the product may hold a row at any time; else an outage was taken for a failure
            name: count
            for name, count in metrics.items()
            if name.startswith("campaign_stats_deferred_total{") and "locked" not in name and count
        }
        if put_off:
            problems.append(f"deferred: {put_off}")
        if self.cpu_share is not None and self.cpu_share > QUIET_CPU:
            problems.append(f"busy while nothing could be done: {self.cpu_share:.2f} of a core")
        if recovery_s > RECOVERY_S * SLACK:
            problems.append(f"recovery took {recovery_s:.1f} s")
        if problems:
            problems += [line for line in self.replica.raw if '"dependency' in line][-20:]
        cpu = "" if self.cpu_share is None else f", {self.cpu_share * 100:.0f} % of a core meanwhile"
        record("measured", f"recovered in {recovery_s:.1f} s{cpu}")
        return problems


@asynccontextmanager
async def site(grid: Grid, directory: Path, *, breakage: str = "", plain_role: bool = False) -> AsyncIterator[Site]:
    """A replica that has served its first hints. `plain_role`: it is no superuser."""
    async with sacrificed(directory) as (server, door), stage(grid, server, door=door) as one:
        if plain_role:
            admin = await asyncpg.connect(one.url)
            await admin.execute(
                """CREATE ROLE service LOGIN;
                   GRANT USAGE ON SCHEMA campaign_stats TO service;
                   GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA campaign_stats, public TO service;
                   GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA campaign_stats TO service"""
            )
            await admin.close()
            one.environment["DATABASE_URL"] = one.environment["DATABASE_URL"].replace("postgres@", "service@")
        campaigns = await one.upstream.campaigns(20, {"pending": 300, "sent": 3})
        replica = await one.replica(breakage=breakage, real_patience=True)
        await one.upstream.change(campaigns, "sent")
        await one.settled()
        yield Site(one, replica, campaigns, server, door, psutil.Process(replica.process.pid))


async def postgres_away(at: Site, seconds: float) -> float:
    """Killed, and started again after `seconds`."""
    async with at.busy():
        await asyncio.to_thread(at.server.kill)
        try:
            async with at.quiet(seconds):
                await at.until_degraded("database")
        finally:
            await asyncio.to_thread(at.server.start)
        return time.monotonic()


async def postgres_restarting(at: Site, times: float) -> float:
    """Stopped and started; in between every session of ours is ended, again and again."""
    async with at.busy():
        for _ in range(int(times)):
            await asyncio.to_thread(at.server.stop)
            await asyncio.to_thread(at.server.start)
            admin = await asyncpg.connect(at.server.url())
            for _ in range(5):
                await asyncio.sleep(0.2)
                await end_our_sessions(admin)
            await admin.close()
        return time.monotonic()


async def end_our_sessions(admin: asyncpg.Connection) -> None:
    await admin.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'campaign-stats'"
    )


async def postgres_read_only(at: Site, seconds: float) -> float:
    """As after a failover: sessions may only read, and those that are there will never do anything else."""
    name = at.stage.url.rpartition("/")[2]
    admin = await asyncpg.connect(at.server.url())
    try:
        await admin.execute(f"ALTER DATABASE {name} SET default_transaction_read_only = on")
        await end_our_sessions(admin)
        async with at.quiet(seconds):
            await at.say(at.campaigns)
            await at.until_degraded("database")
        await admin.execute(f"ALTER DATABASE {name} RESET default_transaction_read_only")
    finally:
        await admin.close()
    return time.monotonic()


async def postgres_full(at: Site, seconds: float) -> float:
    """Others have every connection that the server gives."""
    greedy: list[asyncpg.Connection] = []
    try:
        for is_last_try in (False, True):
            while True:
                try:
                    greedy.append(await asyncpg.connect(at.server.url()))
                except asyncpg.TooManyConnectionsError:
                    break
            if not is_last_try:
                await end_our_sessions(greedy[0])
        async with at.quiet(seconds):
            await at.say(at.campaigns)
            await at.until_degraded("database")
    finally:
        for connection in greedy:
            connection.terminate()
    return time.monotonic()


async def postgres_frozen(at: Site, seconds: float) -> float:
    """Every process of it stopped by SIGSTOP, and thawed."""
    async with at.busy():
        server = psutil.Process(at.server.pid)
        server.send_signal(signal.SIGSTOP)  # first, so that it starts no more of the others
        frozen = [server, *server.children()]
        for process in frozen:
            with suppress(psutil.NoSuchProcess):  # an autovacuum worker may just have ended
                process.send_signal(signal.SIGSTOP)
        try:
            async with at.quiet(seconds):
                await at.until_degraded("database")
        finally:
            for process in frozen:
                with suppress(psutil.NoSuchProcess):
                    process.send_signal(signal.SIGCONT)
        return time.monotonic()


async def postgres_silent(at: Site, seconds: float) -> float:
    """The way to it loses everything, without a reset; connections of that time are never heard of again."""
    async with at.busy():
        at.door.silence()
        async with at.quiet(seconds):
            await eventually(lambda: at.degraded(), "something is degraded", at.replica, timeout_s=DEAD_SESSION_S)
        at.door.heal()
        return time.monotonic()


async def row_locked(at: Site, seconds: float) -> float:
    """The product holds a campaign's row; this one waits, nobody else does."""
    held, others = at.campaigns[0], at.campaigns[1:]
    holder = await asyncpg.connect(at.stage.url)
    try:
        async with holder.transaction():
            await holder.execute("SELECT FROM campaigns WHERE id = $1 FOR UPDATE", held)
            before = await holder.fetchval("SELECT clock_timestamp()")
            async with at.quiet(seconds):
                await at.say([held])
                await at.stage.upstream.change(others, "sent")
                synced = "SELECT bool_and(last_synced_at > $1) FROM campaigns WHERE id <> $2"
                await eventually(lambda: holder.fetchval(synced, before, held), "the others do not wait", at.replica)
                until = time.monotonic() + seconds
                while time.monotonic() < until:
                    assert await at.degraded() == []
                    waiting = await holder.fetch("SELECT DISTINCT campaign_id FROM campaign_stats.deferred")
                    assert [row["campaign_id"] for row in waiting] == [held]
                    await asyncio.sleep(0.5)
            await holder.execute("UPDATE campaign_prospects SET status = 'replied' WHERE campaign_id = $1", held)
    finally:
        await holder.close()
    return time.monotonic()


async def row_security(at: Site, seconds: float) -> float:
    """Switched on: every row of ours would vanish. It must be an error, never a count of zero."""
    admin = await asyncpg.connect(at.stage.url)
    try:
        await admin.execute("ALTER TABLE campaign_prospects ENABLE ROW LEVEL SECURITY")
        async with at.quiet(seconds):
            await at.stage.upstream.change(at.campaigns, "replied", of="sent")
            await at.until_degraded("database")
        assert await admin.fetchval("SELECT count(*) FROM campaigns WHERE (stats ->> 'total')::int = 0") == 0
        await admin.execute("ALTER TABLE campaign_prospects DISABLE ROW LEVEL SECURITY")
    finally:
        await admin.close()
    return time.monotonic()


async def function_replaced(at: Site, seconds: float) -> float:
    """Our function replaced by another version under load, then dropped, then there again."""
    ours = "FROM pg_proc WHERE oid = 'campaign_stats.recalculate_campaign_stats'::regproc"
    admin = await asyncpg.connect(at.stage.url)
    try:
        text = await admin.fetchval(f"SELECT pg_get_functiondef(oid) {ours}")
        name = await admin.fetchval(f"SELECT oid::regprocedure::text {ours}")
        async with at.busy():
            for number in range(5):
                await admin.execute(text.replace("BEGIN", f"BEGIN -- version {number}", 1))
                await asyncio.sleep(0.2)
            await admin.execute(f"DROP FUNCTION {name}")
            async with at.quiet(seconds):
                await at.until_degraded("database")
            await admin.execute(text)
            return time.monotonic()
    finally:
        await admin.close()


async def one_broker_away(at: Site, seconds: float) -> float:
    """One of three killed under load; the other two are enough."""
    grid = at.stage.grid
    async with at.busy():
        await asyncio.to_thread(grid.cluster.nodes[1].kill)
        try:
            await asyncio.sleep(seconds)
            count = (await at.replica.metrics())["campaign_stats_generations_total"]

            async def goes_on() -> bool:
                return (await at.replica.metrics())["campaign_stats_generations_total"] > count + 3

            await eventually(goes_on, "two brokers are enough", at.replica, timeout_s=30)
        finally:
            await asyncio.to_thread(grid.cluster.start, [1])
        return time.monotonic()


async def one_broker_silent(at: Site, seconds: float) -> float:
    """The way to one of three loses everything, without a reset; it leads a third of the partitions."""
    proxy = at.stage.grid.proxies[1]
    async with at.busy():
        proxy.silence()
        try:
            await asyncio.sleep(seconds)
        finally:
            proxy.heal()
        return time.monotonic()


async def all_brokers_away(at: Site, seconds: float) -> float:
    """All three killed, and started again after `seconds`."""
    grid = at.stage.grid
    async with at.busy():
        for node in grid.cluster.nodes.values():
            await asyncio.to_thread(node.kill)
        try:
            async with at.quiet(seconds):
                await at.until_degraded("kafka")
        finally:
            await asyncio.to_thread(grid.cluster.start)
        return time.monotonic()


async def kafka_silent(at: Site, seconds: float) -> float:
    """The way to all brokers loses everything, without a reset."""
    proxies = at.stage.grid.proxies.values()
    async with at.busy():
        for proxy in proxies:
            proxy.silence()
        try:
            async with at.quiet(seconds):
                await at.until_degraded("kafka")
        finally:
            for proxy in proxies:
                proxy.heal()
        return time.monotonic()


Outage = Callable[[Site, float], Awaitable[float]]
LONG, SHORT = pytest.mark.faults, pytest.mark.short


@pytest.mark.parametrize(
    ("outage", "amount"),
    [
        pytest.param(postgres_away, 5, id="PostgreSQL killed, away for 5 s", marks=SHORT),
        pytest.param(
            postgres_restarting, 3, id="PostgreSQL restarted three times, and all its sessions ended", marks=LONG
        ),
        pytest.param(postgres_read_only, 4, id="PostgreSQL read-only, as after a failover"),
        pytest.param(postgres_full, 4, id="PostgreSQL out of connections", marks=LONG),
        pytest.param(postgres_frozen, 12, id="PostgreSQL frozen for 12 s", marks=LONG),
        pytest.param(postgres_silent, 5, id="PostgreSQL silent for 5 s, half open"),
        pytest.param(row_locked, 5, id="a row locked for 5 s", marks=SHORT),
        pytest.param(row_security, 4, id="row security switched on", marks=LONG),
        pytest.param(function_replaced, 4, id="our function replaced, dropped and back"),
        pytest.param(one_broker_away, 15, id="one broker of three killed", marks=LONG),
        pytest.param(one_broker_silent, 20, id="one broker of three silent for 20 s, half open", marks=LONG),
        pytest.param(all_brokers_away, 60, id="all brokers killed, away for 60 s", marks=LONG),
        pytest.param(kafka_silent, 60, id="all brokers silent for 60 s, half open", marks=LONG),
    ],
)
async def test_an_outage_is_waited_out(
    grid: Grid, servers_directory: Path, outage: Outage, amount: float, record_property: Record
) -> None:
    """Outage"""
    async with site(grid, servers_directory, plain_role=outage is row_security) as at:
        assert await at.problems(await outage(at, amount), record_property) == []


@pytest.mark.faults
async def test_long_outages_of_postgresql_are_waited_out(
    grid: Grid, servers_directory: Path, record_property: Record
) -> None:
    """Outages side by side [PostgreSQL killed, away for 60 s; silent for 45 s, half open; a row locked for 60 s]"""

    async def one_of(outage: Outage, seconds: float) -> list[str]:
        def named(name: str, value: object) -> None:
            record_property(name, f"{outage.__name__} {value}")

        async with site(grid, servers_directory) as at:
            return await at.problems(await outage(at, seconds), named)

    found = await asyncio.gather(one_of(postgres_away, 60), one_of(postgres_silent, 45), one_of(row_locked, 60))
    assert not any(found), found


@pytest.mark.faults
@pytest.mark.parametrize(
    ("breakage", "outage", "amount", "due"),
    [
        ("no_backoff", postgres_away, 5, "busy while nothing could be done"),
        ("every_error_is_the_campaigns", row_security, 4, "database is degraded"),
        ("stale_pool", postgres_read_only, 4, "nothing is degraded"),
        (
            "no_deadline_for_an_answer",
            postgres_silent,
            12,
            "never quiet|nothing is degraded",
        ),
        ("health_says_nothing", function_replaced, 4, "database is degraded"),
        ("patient_with_brokers", kafka_silent, 25, "recovery took|nothing is degraded"),
    ],
)
async def test_the_same_outages_find_a_service_that_is_broken(
    grid: Grid, servers_directory: Path, breakage: str, outage: Outage, amount: float, due: str
) -> None:
    """Breakage found by an outage"""
    found: list[str] = []
    async with site(grid, servers_directory, breakage=breakage, plain_role=outage is row_security) as at:
        at.replica.expected_exit = None
        at.patience_s = at.stage.patience_s = 16.0
        try:
            found = await at.problems(await outage(at, amount), lambda *_: None)
        except AssertionError as error:
            found = [str(error)]
        finally:
            if at.replica.process.returncode is None:
                at.replica.kill()
    assert any(word in problem for problem in found for word in due.split("|")), found
