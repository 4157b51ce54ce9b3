"""`make bench-profile`: where the time goes while a backlog is drained, and between a single hint and its news.

Each way is gone twice, in a database of its own. Once py-spy watches the service from outside: shares of its CPU, and
the flame graphs drain.svg and idle.svg. Once the service carries clocks inside (`inside.py`): what each step takes,
what it asks the broker; pg_stat_statements says what it asks PostgreSQL, auto_explain how that recounts one chunk.
Prints tables, writes build/profile.json. Exit code 0; 1 when a run came out wrong, 2 when something is missing.
"""

import argparse
import asyncio
import json
import logging
import os
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from uuid import UUID

import asyncpg
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from rich import box
from rich.console import Console
from rich.table import Table

from consumer import database
from consumer.demo.servers import Postgres, ServerFailed, machine_binaries
from schemas import events
from tests.benchmarks import workload
from tests.benchmarks.__main__ import KAFKA, POSTGRES
from tests.benchmarks.profile.inside import CLOCKS
from tests.benchmarks.profile.stacks import Stacks
from tests.benchmarks.profile.statements import EXPLAINED_FROM, StatementNames, explained, recounts
from tests.benchmarks.stage import (
    END_DEADLINE_S,
    LOOK_S,
    PEERS_PYTHON,
    Contestant,
    Failed,
    Group,
    Round,
    Size,
    Stage,
    tree_cpu_s,
)
from tests.servers import REPOSITORY, ApacheKafka, java_available

PICTURES: Final = Path(__file__).parent.parent
RESULTS: Final = REPOSITORY / "build" / "profile.json"
EXTENSIONS: Final = ("pg_stat_statements", "auto_explain")
SETTINGS: Final = {
    **POSTGRES,
    "shared_preload_libraries": ",".join(EXTENSIONS),
    "pg_stat_statements.track": "all",  # also inside functions
    "pg_stat_statements.track_planning": "on",
    "auto_explain.log_min_duration": "-1",  # off, but for the session that asks for plans
}
INSIDE: Final = ("-m", "tests.benchmarks.profile.inside")
SAMPLES_PER_S: Final = 250
WARM_S: Final = 2.0  # of hints before an idle service is watched: prepared statements, plans, caches
LATE_S: Final = 10.0  # for the last news
WHOLE_DEADLINE_S: Final = 20 * 60.0
CHUNK: Final = 1_000
PLAN_MODES: Final = ("auto", "force_custom_plan", "force_generic_plan")
MOVE: Final = """-- upstream
UPDATE campaign_prospects SET status = 'completed', updated_at = clock_timestamp()
 WHERE id = (SELECT id FROM campaign_prospects WHERE campaign_id = $1 AND status = 'pending' LIMIT 1)"""

# The way of a hint: what the child marks with the campaign and the time. `received` is added by the subscriber.
WAY: Final = (
    ("polled", "broker, fetch, poll: handed over"),
    ("free", "until the flush before it is done"),
    ("begun", "session, BEGIN"),
    ("recounted", "recount"),
    ("saved", "guard, decide, save"),
    ("committed", "COMMIT"),
    ("turn", "until the relay's next turn"),
    ("read", "relay: session, BEGIN, lock, read"),
    ("acknowledged", "relay: publish, acknowledged"),
)


def main() -> int:
    """Measure; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.profile", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--campaigns", type=int, default=10_000)
    parser.add_argument("--hints", type=int, default=1_000_000, help="of the backlog")
    parser.add_argument("--seconds", type=float, default=20.0, help="of single hints to an idle service")
    parser.add_argument("--rate", type=float, default=50.0, help="single hints a second")
    options = parser.parse_args()
    pyspy = next((path for path in _pyspies() if path.exists()), None)
    if missing := _missing(pyspy):
        print("\n".join(f"bench-profile: {line}" for line in missing), file=sys.stderr)
        return 2
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)  # NotLeader right after a topic was made is normal
    console = Console(width=None if sys.stdout.isatty() else 150, highlight=False, soft_wrap=True)
    with ExitStack() as stack:
        directory = Path(tempfile.mkdtemp(prefix="cs-profile-"))
        stack.callback(shutil.rmtree, directory, ignore_errors=True)
        directory.chmod(0o711)  # PostgreSQL runs under another account when we are root
        try:
            postgres = Postgres(directory / "pg", machine_binaries(), options=SETTINGS)
            stack.callback(postgres.stop)
            kafka = ApacheKafka(directory / "kafka", KAFKA)
            stack.callback(kafka.stop)
            postgres.start()
            kafka.start()
            size = Size(options.campaigns, options.hints, rounds=1)
            stage = Stage(postgres, kafka, directory, size, console.print)
            profile = Profile(stage, console, pyspy or Path(), options.seconds, options.rate)
            return asyncio.run(profile.measure())
        except (Failed, ServerFailed, asyncpg.PostgresError) as error:
            print(f"bench-profile: {error}", file=sys.stderr)
            return 1
        except TimeoutError:
            print("bench-profile: something took longer than it may", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            return 130


def _pyspies() -> Iterator[Path]:
    yield PEERS_PYTHON.with_name("py-spy")
    yield Path(sys.executable).with_name("py-spy")
    if found := shutil.which("py-spy"):
        yield Path(found)


def _missing(pyspy: Path | None) -> list[str]:
    """Everything that is not there, by name, with what to do."""
    missing = []
    if not java_available():
        missing.append("Java 17 or Maven is missing (Debian: apt-get install openjdk-17-jdk-headless maven)")
    if pyspy is None:
        missing.append("py-spy is missing: start this by `make bench-profile`, which fetches it")
    binaries = machine_binaries()
    if binaries is None:
        missing.append(
            "a PostgreSQL of the machine's own is missing, and the wheel's has neither pg_stat_statements nor"
            " auto_explain (Debian: apt-get install postgresql)"
        )
    else:
        found = {path.stem for path in (binaries.parent / "lib").rglob("*.so")}
        missing += [
            f"the PostgreSQL in {binaries} has no {name}: install its contrib package"
            for name in EXTENSIONS
            if name not in found
        ]
    return missing


@dataclass(slots=True)
class Window:
    """What was seen of the service while something went on."""

    hints: int
    seconds: float = 0.0
    cpu_s: dict[str, float] = field(default_factory=dict)
    stacks: Stacks | None = None
    clocks: dict[str, Any] = field(default_factory=dict)
    statements: list[dict[str, Any]] = field(default_factory=list)
    arrived: list[dict[str, float]] = field(default_factory=list)  # of each hint: seconds from its timestamp
    recounts: float = 0.0


@dataclass(slots=True)
class Profile:
    """The whole of it."""

    stage: Stage
    console: Console
    pyspy: Path
    seconds: float
    rate: float

    async def measure(self) -> int:
        """Both ways, twice each; returns the exit code."""
        begun = time.monotonic()
        async with workload.connected(self.stage.postgres.url()) as db:
            await db.execute("CREATE EXTENSION pg_stat_statements")
            version = await db.fetchval("SHOW server_version")
        document: dict[str, Any] = {
            "conditions": {
                "campaigns": self.stage.size.campaigns,
                "hints": self.stage.size.hints,
                "postgresql": version,
                "python": sys.version.split()[0],
                "cores": os.cpu_count(),
                "load_before": round(os.getloadavg()[0], 2),
            }
        }
        async with asyncio.timeout(WHOLE_DEADLINE_S):
            async with self.stage.round(1, seed=900) as common:
                watched = await self._drain(common, "drain-watched", is_watched=True)
                clocked = await self._drain(common, "drain-clocked", is_watched=False)
                self._tell("drain", watched, clocked, document)
                document["plans"] = await self._plans(common)
            watched = await self._idle("idle-watched", is_watched=True)
            clocked = await self._idle("idle-clocked", is_watched=False)
            self._tell("idle", watched, clocked, document)
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(document, indent=2) + "\n")
        self.console.print(f"{time.monotonic() - begun:.0f} s; written to {RESULTS.relative_to(REPOSITORY)}")
        return 0

    async def _drain(self, common: Round, name: str, *, is_watched: bool) -> Window:
        before, topics, stage = await self.stage.template(), common.topics, self.stage
        behind = await workload.ends(stage.kafka.bootstrap, topics.of(events.STATS_UPDATED))
        async with stage.database(name, of=common.database) as copy, stage.admin() as admin:
            group = Group(admin, name, topics.of(events.STATUS_CHANGED))
            service = self._service(name, topics.prefix, copy, is_watched=is_watched)
            service.start()
            try:
                await group.joined(service, members=1)
                async with self._window(service, copy, len(common.draws), is_watched=is_watched) as window:
                    await stage.drained(copy, group, [service], len(common.draws))
                await _ended(service, window)
            finally:
                service.stop()
            news = await workload.read_news(stage.kafka.bootstrap, topics.of(events.STATS_UPDATED), behind=behind)
            if problems := await workload.prove(stage.postgres.url(copy), before, news, set(common.draws)):
                raise Failed(f"{name}: {'; '.join(problems)}")
        return window

    async def _idle(self, name: str, *, is_watched: bool) -> Window:
        """Single hints, each after its own commit and for another campaign, and how long each takes to its news."""
        stage = self.stage
        warm = max(1, min(int(self.rate * WARM_S), len(stage.ids) // 2))
        single = stage.ids[warm : warm + max(1, int(self.rate * self.seconds))]
        async with stage.topics(f"{name}.") as topics, stage.database(name) as copy, stage.admin() as admin:
            group = Group(admin, name, topics.of(events.STATUS_CHANGED))
            service = self._service(name, topics.prefix, copy, is_watched=is_watched)
            service.start()
            try:
                await group.joined(service, members=1)
                url, hints = stage.postgres.url(copy), topics.of(events.STATUS_CHANGED)
                async with _received(stage.kafka.bootstrap, topics.of(events.STATS_UPDATED)) as received:
                    await self._tell_one_by_one(url, hints, stage.ids[:warm], received)
                    async with self._window(service, copy, len(single), is_watched=is_watched) as window:
                        sent = await self._tell_one_by_one(url, hints, single, received)
                marks = window.clocks.get("marks", {})
                window.arrived = [
                    {mark: at - moment for mark, at in {**marks.get(key, {}), "received": received[key]}.items()}
                    for key, moment in sent.items()
                ]
                await _ended(service, window)
            finally:
                service.stop()
        return window

    async def _tell_one_by_one(
        self, url: str, topic: str, campaigns: Sequence[UUID], received: Mapping[str, float]
    ) -> dict[str, float]:
        """Move a prospect of each and hint at it, paced; when each hint was sent. Returns once all news are there."""
        sent: dict[str, float] = {}
        producer = AIOKafkaProducer(bootstrap_servers=self.stage.kafka.bootstrap, acks="all")
        await producer.start()
        try:
            async with workload.connected(url) as db:
                begun = time.monotonic()
                for place, campaign in enumerate(campaigns):
                    await asyncio.sleep(begun + place / self.rate - time.monotonic())
                    await db.execute(MOVE, campaign)
                    key, sent_at = str(campaign), time.time()
                    sent[key] = sent_at
                    await producer.send(
                        topic, key=key.encode(), value=_hint(key, place), timestamp_ms=int(sent_at * 1000)
                    )
            deadline = time.monotonic() + LATE_S
            while not sent.keys() <= received.keys():
                if time.monotonic() > deadline:
                    raise Failed(f"{len(sent.keys() - received.keys())} of {len(sent)} hints were not answered by news")
                await asyncio.sleep(LOOK_S)
        finally:
            await producer.stop()
        return sent

    def _service(self, name: str, prefix: str, copy: str, *, is_watched: bool) -> Contestant:
        """Plain, or with clocks inside."""
        if is_watched:
            return self.stage.service(name, prefix, copy, name)
        clocks = str(self.stage.directory / f"{name}.clocks")
        return self.stage.service(name, prefix, copy, name, command=INSIDE, **{CLOCKS: clocks})

    @asynccontextmanager
    async def _window(self, service: Contestant, copy: str, hints: int, *, is_watched: bool) -> AsyncIterator[Window]:
        """From here to the end of the block: CPU of all three, and either py-spy's stacks or clocks and statements."""
        window, raw = Window(hints), self.stage.directory / f"{copy}.stacks"
        clocks = self.stage.directory / f"{copy}.clocks"
        async with workload.connected(self.stage.postgres.url()) as db:
            spy = await self._spy(service, raw) if is_watched else None
            if spy is None:
                await _read_clocks(service, clocks)  # sets them back
                await db.execute("SELECT pg_stat_statements_reset()")
            before, begun = await self._cpu(service, copy), time.monotonic()
            try:
                yield window
            finally:
                if spy is not None and spy.returncode is None:
                    spy.send_signal(signal.SIGINT)
            window.seconds = time.monotonic() - begun
            after = await self._cpu(service, copy)
            window.cpu_s = {who: cpu_s - before[who] for who, cpu_s in after.items()}
            if spy is not None:
                _, said = await asyncio.wait_for(spy.communicate(), END_DEADLINE_S)
                if not raw.exists():
                    raise Failed(f"py-spy: {said.decode(errors='replace').strip()}")
                window.stacks = Stacks.read(raw.read_text())
            else:
                window.clocks = await _read_clocks(service, clocks)
                window.statements = [dict(row) for row in await db.fetch(STATEMENTS, copy)]

    async def _spy(self, service: Contestant, raw: Path) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            self.pyspy, "record", "--pid", str(service.pid), "--rate", str(SAMPLES_PER_S), "--format", "raw",
            "--output", raw, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip

    async def _cpu(self, service: Contestant, copy: str) -> dict[str, float]:
        """CPU seconds so far of the service, of its sessions in PostgreSQL and of Kafka."""
        sessions = await workload.sessions(self.stage.postgres.url(copy))
        return {
            SESSIONS: tree_cpu_s(sessions), "service": service.cpu_s(), "Kafka": tree_cpu_s(self.stage.kafka.pids),
        }  # fmt: skip

    def _tell(self, way: str, watched: Window, clocked: Window, document: dict[str, Any]) -> None:
        """Print the tables of one way, draw its flame graph, and keep everything in the document."""
        per = watched.hints
        cpu_us = {who: seconds / per * 1e6 for who, seconds in watched.cpu_s.items()}
        recounts = max(1.0, watched.recounts)
        self.console.print(
            f"{way}: {per:,} hints, {recounts:,.0f} recounts in {watched.seconds:.1f} s; CPU us per hint: "
            + ", ".join(f"{who} {spent:,.1f}" for who, spent in cpu_us.items())
            + f"; PostgreSQL's {watched.cpu_s.get(SESSIONS, 0.0) / recounts * 1e6:,.0f} us per recount"
        )
        told: dict[str, Any] = {
            "hints": per, "recounts": recounts, "seconds": watched.seconds, "cpu_us_per_hint": cpu_us,
        }  # fmt: skip
        if watched.stacks is not None:
            steps = watched.stacks.steps()
            rows = [[name, f"{share:.1%}", f"{share * cpu_us['service']:.2f}"] for name, share in steps.items()]
            seen = f"{watched.stacks.samples:,} samples of py-spy; {watched.stacks.waiting:,} in the selector left out"
            self._table(f"{way}: CPU of the service's process by step ({seen})", ["step", "share", "us/hint"], rows)
            lines = watched.stacks.lines()
            self._table(f"{way}: the lines that took most themselves", ["line", "share"],
                        [[name, f"{share:.1%}"] for name, share in lines.items()])  # fmt: skip
            flame = PICTURES / f"{way}.svg"
            flame.write_text(watched.stacks.flame(f"{way}: the service's CPU, {per:,} hints"))
            self.console.print(f"{flame.relative_to(REPOSITORY)}: {flame.stat().st_size / 1000:.0f} kB")
            told |= {"steps": steps, "lines": lines}
        told["calls"] = self._calls(way, clocked)
        if clocked.arrived:
            told["way"] = self._way_of_a_hint(clocked)
        told["requests"] = self._requests(way, clocked)
        told["garbage_collections"] = clocked.clocks["garbage"]
        told["statements"] = self._statements(way, clocked)
        document[way] = told

    def _calls(self, way: str, window: Window) -> list[dict[str, Any]]:
        calls = [
            {"step": step, "calls": len(took), "per_hint": len(took) / window.hints, "median_ms": _median(took) * 1000,
             "p99_ms": _p99(took) * 1000, "share_of_time": sum(took) / window.seconds}
            for step, took in window.clocks["steps"].items()
        ]  # fmt: skip
        self._table(f"{way}: what each call took (waiting included; a task's own calls follow one another)",
                    ["task: call", "calls", "per hint", "median ms", "p99 ms", "share of the time"],
                    [[call["step"], f"{call['calls']:,}", f"{call['per_hint']:.2g}", f"{call['median_ms']:.2f}",
                      f"{call['p99_ms']:.2f}", f"{call['share_of_time']:.1%}"] for call in calls])  # fmt: skip
        garbage = window.clocks["garbage"]
        self.console.print(f"{way}: garbage collections {garbage['collections']}, {garbage['seconds']:.2f} s in all")
        return calls

    def _way_of_a_hint(self, clocked: Window) -> list[dict[str, Any]]:
        way, rows = [], []
        earlier = "sent"
        for mark, what in (*WAY, ("received", "the subscriber has the news")):
            both = [marks for marks in clocked.arrived if mark in marks and (earlier == "sent" or earlier in marks)]
            took = [marks[mark] - marks.get(earlier, 0.0) for marks in both]
            since = [marks[mark] for marks in both]
            if took:
                way.append({"stage": what, "median_ms": _median(took) * 1000, "p99_ms": _p99(took) * 1000,
                            "since_sent_ms": _median(since) * 1000})  # fmt: skip
                rows.append([what, f"{_median(took) * 1000:.2f}", f"{_p99(took) * 1000:.2f}",
                             f"{_median(since) * 1000:.2f}"])  # fmt: skip
            # The subscriber may have the news before the relay hears that it was acknowledged.
            earlier = mark if mark != "acknowledged" else "read"
        self._table("idle: the way of a hint, from its timestamp to its news",
                    ["stage", "median ms", "p99 ms", "since the hint, median ms"], rows)  # fmt: skip
        whole = [marks["received"] for marks in clocked.arrived]
        self.console.print(f"idle: hint to news {_median(whole) * 1000:.1f} ms, p99 {_p99(whole) * 1000:.1f} ms")
        return way

    def _requests(self, way: str, window: Window) -> dict[str, float]:
        asked = {kind: count / window.hints * 1000 for kind, count in window.clocks["requests"].items()}
        asked = dict(sorted(asked.items(), key=lambda item: -item[1]))
        self._table(f"{way}: requests to the broker", ["kind", "per 1,000 hints", "per second"],
                    [[kind, f"{count:,.2f}", f"{count * window.hints / 1000 / window.seconds:.1f}"]
                     for kind, count in asked.items()])  # fmt: skip
        return asked

    def _statements(self, way: str, window: Window) -> list[dict[str, Any]]:
        names = StatementNames()
        kept = []
        for row in window.statements:
            name = names.of(row["query"])
            if name is not None:
                kept.append({**row, "name": name})
        whole = sum(row["total_exec_time"] + row["total_plan_time"] for row in kept if row["toplevel"]) or 1.0
        told, rows = [], []
        for row in sorted(kept, key=lambda row: (not row["toplevel"], -row["total_exec_time"])):
            share = (row["total_exec_time"] + row["total_plan_time"]) / whole
            if share < 0.002:
                continue
            calls = row["calls"]
            told.append({
                "statement": row["name"], "nested": not row["toplevel"], "calls": calls,
                "mean_ms": row["mean_exec_time"], "planning_ms": row["total_plan_time"] / calls, "share": share,
                "rows_per_call": row["rows"] / calls, "blocks_hit_per_call": row["shared_blks_hit"] / calls,
                "wal_bytes_per_call": float(row["wal_bytes"]) / calls,
            })  # fmt: skip
            rows.append([("  inside: " if not row["toplevel"] else "") + row["name"], f"{calls:,}",
                         f"{row['mean_exec_time']:.3f}", f"{row['total_plan_time'] / calls:.3f}", f"{share:.1%}",
                         f"{row['rows'] / calls:,.1f}", f"{row['shared_blks_hit'] / calls:,.0f}",
                         f"{float(row['wal_bytes']) / calls / 1024:,.1f}"])  # fmt: skip
        self._table(f"{way}: statements of the service (pg_stat_statements)",
                    ["statement", "calls", "mean ms", "planning ms", "share", "rows/call", "blocks hit/call",
                     "WAL kB/call"], rows)  # fmt: skip
        return told

    async def _plans(self, common: Round) -> dict[str, Any]:
        """What a recount costs PostgreSQL, planned anew for every call and planned once, and how it does a chunk."""
        timed, rows, tree = [], [], list[str]()
        ids = list(dict.fromkeys(common.draws))
        async with self.stage.database("plans", of=common.database) as copy:
            for count in (CHUNK, 1):
                for mode in PLAN_MODES:
                    db = await asyncpg.connect(self.stage.postgres.url(copy), server_settings=database.SESSION)
                    try:
                        wall_ms, cpu_us = await recounts(db, ids[:count], mode)
                        if count == CHUNK and mode == PLAN_MODES[0]:
                            tree = await explained(db, ids[:count])
                    finally:
                        await db.close()
                    timed.append({"campaigns": count, "planned": mode, "ms": wall_ms, "cpu_us_per_recount": cpu_us})
                    rows.append([f"{count:,}", mode, f"{wall_ms:.2f}", f"{cpu_us:.0f}"])
        self._table("a recount in one session, all of it stale: how it is planned",
                    ["campaigns", "plan_cache_mode", "median ms", "CPU us per recount"], rows)  # fmt: skip
        self.console.print(f"plans of a chunk of {CHUNK:,} (auto_explain, statements above {EXPLAINED_FROM}):")
        for line in tree:
            self.console.print(f"  {line}")
        return {"recounts": timed, "chunk": tree}

    def _table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        table = Table(box=box.ASCII, title=title, title_justify="left")
        for place, column in enumerate(columns):
            table.add_column(column, justify="right" if place else "left", no_wrap=place > 0)
        for row in rows:
            table.add_row(*row)
        self.console.print(table)


SESSIONS: Final = "PostgreSQL, the service's sessions"
STATEMENTS: Final = """
SELECT query, toplevel, calls, rows, total_exec_time, mean_exec_time, total_plan_time, shared_blks_hit, wal_bytes
  FROM pg_stat_statements s JOIN pg_database d ON d.oid = s.dbid WHERE d.datname = $1
"""


async def _ended(service: Contestant, window: Window) -> None:
    told = await service.metrics()
    window.recounts = told['campaign_stats_recounts_total{caller="chunk"}']
    if service.process is not None:
        service.process.terminate()
    if (code := await service.ended()) != 0:
        raise Failed(f"the service ended with {code}: {service.last_lines(3)}")


async def _read_clocks(service: Contestant, clocks: Path) -> dict[str, Any]:
    """What the clocks inside show; sets them back."""
    clocks.unlink(missing_ok=True)
    os.kill(service.pid, signal.SIGUSR1)
    deadline = time.monotonic() + END_DEADLINE_S
    while not clocks.exists():
        if time.monotonic() > deadline or service.has_ended:
            raise Failed(f"no clocks of {service.name}: {service.last_lines(3)}")
        await asyncio.sleep(LOOK_S / 5)
    shown: dict[str, Any] = json.loads(clocks.read_text())
    return shown


@asynccontextmanager
async def _received(bootstrap: str, topic: str) -> AsyncIterator[dict[str, float]]:
    """A subscriber: key -> when its first record came, growing."""
    received: dict[str, float] = {}
    consumer = AIOKafkaConsumer(topic, bootstrap_servers=bootstrap, auto_offset_reset="earliest")

    async def read() -> None:
        async for record in consumer:
            received.setdefault(record.key.decode(), time.time())

    await consumer.start()
    reading = asyncio.create_task(read())
    try:
        yield received
    finally:
        reading.cancel()
        with suppress(asyncio.CancelledError):
            await reading
        await consumer.stop()


def _hint(campaign: str, number: int) -> bytes:
    return json.dumps(
        {
            "specversion": "1.0", "id": f"{number:032x}", "source": "/engine/sender", "type": events.STATUS_CHANGED,
            "subject": campaign, "datacontenttype": "application/json",
            "data": {"campaign_id": campaign, "prospect_id": campaign, "to_status": "completed"},
        },
        separators=(",", ":"),
    ).encode()  # fmt: skip


def _median(values: Sequence[float]) -> float:
    return statistics.median(values) if values else 0.0


def _p99(values: Sequence[float]) -> float:
    return sorted(values)[int(len(values) * 0.99)] if values else 0.0


if __name__ == "__main__":
    sys.exit(main())
