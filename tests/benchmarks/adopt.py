"""`make bench-adopt`: what a product at work notices while it takes the service in, and lets it go again.

Every round gets a copy of a product's database (the reference tables, a million prospects, nothing of ours) and writers
in a process of their own, at a bounded rate. Each step of deploy/adopting.md is done while they write, with its SQL.
Prints a table, writes build/adopt.json. Exit code 0 when no writer ever waited longer than STALL_LIMIT_S because of us
and nothing of ours is left, 1 otherwise, 2 when something is missing.
"""

import argparse
import asyncio
import itertools
import json
import os
import random
import re
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final
from uuid import UUID

import asyncpg
from rich import box
from rich.console import Console
from rich.table import Table

from consumer import migrations
from consumer.demo.servers import EmbeddedBroker, Postgres, Server, ServerFailed
from tests.benchmarks import workload
from tests.benchmarks.stage import others_s
from tests.servers import REPOSITORY, ApacheKafka, java_available

PAGE: Final = REPOSITORY / "deploy" / "adopting.md"
RESULTS: Final = REPOSITORY / "build" / "adopt.json"
REFERENCE: Final = Path(migrations.__file__).parent / "reference" / "0001_product_tables.sql"
POSTGRES: Final = {"fsync": "on", "synchronous_commit": "on", "shared_buffers": "512MB", "max_wal_size": "4GB",
                   "log_lock_waits": "on", "deadlock_timeout": "1s"}  # fmt: skip
STALL_LIMIT_S: Final = 2.0
CONNECTIONS: Final = 8
RATE: Final = 200  # transactions a second, all writers together
P99_FROM: Final = 100  # writes; of fewer the 99th percentile is the longest
QUIET_S: Final = 15.0
GRACE_S: Final = 5.0  # instead of a minute, to keep the measurement short
STEP_DEADLINE_S: Final = 600.0
WHOLE_DEADLINE_S: Final = 60 * 60.0
BUSY_BELOW: Final = UUID("10000000-0000-0000-0000-000000000000")  # the long transaction's rows; the writers' are above
OPTIONS: Final = """SELECT relname::text, reloptions FROM pg_class
     WHERE oid IN ('public.campaigns'::regclass, 'public.campaign_prospects'::regclass) ORDER BY 1"""
CATALOG: Final = """
    SELECT 'relation', n.nspname || '.' || c.relname || ' ' || coalesce(c.reloptions::text, '') FROM pg_class c
      JOIN pg_namespace n ON n.oid = c.relnamespace
     WHERE n.nspname !~ '^pg_' AND n.nspname <> 'information_schema'
    UNION ALL SELECT 'function', p.oid::regprocedure::text FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace
     WHERE n.nspname !~ '^pg_' AND n.nspname <> 'information_schema'
    UNION ALL SELECT 'trigger', tgname || ' ' || tgrelid::regclass FROM pg_trigger WHERE NOT tgisinternal
    UNION ALL SELECT 'schema', nspname FROM pg_namespace WHERE nspname !~ '^pg_'
    UNION ALL SELECT 'rights', oid::regclass || ' ' || coalesce(relacl, acldefault('r', relowner))::text FROM pg_class
     WHERE relnamespace = 'public'::regnamespace AND relkind = 'r'
    UNION ALL SELECT 'rights', attrelid::regclass || '.' || attname || ' ' || attacl::text FROM pg_attribute
     WHERE attrelid::regclass::text ~ '^campaign' AND attacl IS NOT NULL
    UNION ALL SELECT 'rights', 'database ' || coalesce(datacl, acldefault('d', datdba))::text FROM pg_database
     WHERE datname = current_database()
    UNION ALL SELECT 'default rights', defaclacl::text FROM pg_default_acl
     ORDER BY 1, 2
"""
PRODUCT_STATS: Final = """
UPDATE campaigns c SET stats = counted.stats
  FROM (SELECT campaign_id, jsonb_build_object('total', count(*), 'sent', count(*) FILTER (WHERE status = 'sent'),
               'replied', count(*) FILTER (WHERE status = 'replied'),
               'bounced', count(*) FILTER (WHERE status = 'bounced')) AS stats
          FROM campaign_prospects GROUP BY campaign_id) AS counted
 WHERE c.id = counted.campaign_id
"""
WRITES: Final = {
    "move": "SELECT update_prospect_with_stat($1, (ARRAY['sent', 'replied', 'completed', 'sent', 'bounced'])[$2])",
    "import": "INSERT INTO campaign_prospects (campaign_id, user_id, status, email)"
    " SELECT campaign_id, user_id, 'pending', 'new-' || $2::int || '@company.example'"
    " FROM campaign_prospects WHERE id = $1",
    "edit": "UPDATE campaign_prospects SET company = 'Company ' || $2::int, updated_at = now() WHERE id = $1",
}
BYSTANDER: Final = "UPDATE accounts SET daily_limit = daily_limit + 1"  # one row of a table that we never lock
STUCK: Final = re.compile(r"still waiting for (?:RowExclusive|RowShare|AccessShare)Lock on relation .*")  # for 1 s
MIX: Final = ("move",) * 7 + ("import", "import", "edit")


@dataclass(frozen=True, slots=True)
class Write:
    """A transaction of a writer, in seconds since 1970. Due at its time, but begun only when the one before ended."""

    due: float
    begun: float
    ended: float
    error: str | None
    bystander: bool = False


@dataclass(frozen=True, slots=True)
class Window:
    """A step of the adoption, in seconds since 1970."""

    step: str
    begun: float
    ended: float


@dataclass(frozen=True, slots=True)
class Felt:
    """What the writers felt of a step: of the writes begun in it the longest, and p99 from when each was due.

    `bystander_s`: the longest of somebody who writes only where we lock nothing; that much is the machine's doing.
    """

    round: int
    step: str
    duration_s: float
    writes: int
    longest_s: float
    bystander_s: float
    p99_s: float
    errors: Sequence[str]


class Failed(Exception):
    """A step that came to nothing; the message says why."""


def documented(section: str, language: str = "sql") -> list[str]:
    """The statements (apart by a blank line) of the `language` blocks below the heading `## section...` of the page."""
    text = PAGE.read_text("utf-8")
    [body] = re.findall(rf"^## {re.escape(section)}.*?\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE)
    blocks: list[str] = re.findall(rf"^```{language}\n(.*?)^```", body, re.DOTALL | re.MULTILINE)
    return [part.strip() for block in blocks for part in re.split(r"\n\s*\n", block)]


class Process(Server):
    """A child that is no server: the writers, or a command."""

    def __init__(self, name: str, directory: Path, command: Sequence[str], env: dict[str, str] | None = None) -> None:
        super().__init__(directory)
        self.name = name
        self._command = command
        self._env = env

    def start(self) -> None:
        """Start it."""
        self.directory.mkdir(parents=True, exist_ok=True)
        self.spawn([sys.executable, *self._command], env={"PYTHONPATH": str(REPOSITORY), **(self._env or {})})

    async def ended(self) -> None:
        """Wait for its end. Raises Failed when that is not a clean one, or does not come in time."""
        deadline = time.monotonic() + STEP_DEADLINE_S
        while self.process is not None and time.monotonic() < deadline:
            if (code := self.process.poll()) is not None:
                if code != 0:
                    raise Failed(f"{self.name} ended with {code}:\n{self.last_lines()}")
                return
            await asyncio.sleep(0.02)
        raise Failed(f"{self.name} took longer than {STEP_DEADLINE_S:g} s:\n{self.last_lines()}")


async def write(url: str, results: Path) -> None:
    """The writers' process: write until SIGTERM, then leave `results` behind. Due times do not wait."""
    loop = asyncio.get_running_loop()
    stopping = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, stopping.set)
    writes: list[Write] = []
    connections = [await asyncpg.connect(url) for _ in range(CONNECTIONS)]
    prospects = await connections[0].fetch(
        "SELECT id FROM campaign_prospects WHERE id >= $1 ORDER BY random() LIMIT 20000", BUSY_BELOW
    )

    async def one(number: int, connection: asyncpg.Connection) -> None:
        dice = random.Random(number)
        due = time.time() + number / RATE
        while not stopping.is_set():
            await asyncio.sleep(max(0.0, due - time.time()))
            statement = WRITES[dice.choice(MIX)]
            error = None
            begun = time.time()
            try:
                await connection.execute(statement, dice.choice(prospects)["id"], dice.randint(1, 5))
            except asyncpg.PostgresError as raised:
                error = f"{type(raised).__name__}: {raised}"
            writes.append(Write(due, begun, time.time(), error))
            due += CONNECTIONS / RATE

    async def bystander(connection: asyncpg.Connection) -> None:
        while not stopping.is_set():
            begun = time.time()
            await connection.execute(BYSTANDER)
            writes.append(Write(begun, begun, time.time(), None, bystander=True))
            await asyncio.sleep(CONNECTIONS / RATE)

    beside = await asyncpg.connect(url)
    await asyncio.gather(bystander(beside), *(one(number, connection) for number, connection in enumerate(connections)))
    for connection in (beside, *connections):
        await connection.close()
    results.write_text(json.dumps([asdict(each) for each in writes]))


class Round:
    """One adoption from beginning to end; `windows` tells when each step took place."""

    def __init__(self, number: int, url: str, kafka: Any, directory: Path, long_s: float) -> None:
        self.number = number
        self.windows: list[Window] = []
        self.problems: list[str] = []
        self._url = url
        self._kafka = kafka
        self._directory = directory
        self._long_s = long_s

    async def run(self) -> list[Felt]:
        """Everything, beside the writers; what they felt."""
        results = self._directory / f"writes{self.number}.json"
        module = ["-m", "tests.benchmarks.adopt", "--writers", str(results)]
        writers = Process("writers", self._directory, module, {"DATABASE_URL": self._url})
        await workload.create_topics(self._kafka.bootstrap, self._prefix)
        writers.start()
        try:
            async with workload.connected(self._url) as db:
                await self._steps(db)
        except BaseException:
            writers.kill()
            raise
        os.kill(writers.pid, signal.SIGTERM)
        await writers.ended()
        await workload.delete_topics(self._kafka.bootstrap, self._prefix)
        return self._felt([Write(**each) for each in json.loads(results.read_text())])

    async def _steps(self, db: asyncpg.Connection) -> None:
        before = await db.fetch(CATALOG)
        await asyncio.sleep(3)  # caches fill
        async with self._step("quiet: nothing happens"):
            await asyncio.sleep(QUIET_S)
        await self._migrate(db, "migrate")
        await self._first_sweep(db)
        await self._leave(db, "leave")
        await self._nothing_left(db, before)
        async with self._long_transaction():
            await self._migrate(db, f"migrate beside a transaction of {self._long_s:g} s")
        async with self._long_transaction():
            await self._leave(db, f"leave beside a transaction of {self._long_s:g} s")
        await self._nothing_left(db, before)

    @asynccontextmanager
    async def _step(self, name: str) -> AsyncIterator[None]:
        begun = time.time()
        yield
        self.windows.append(Window(name, begun, time.time()))

    async def _migrate(self, db: asyncpg.Connection, name: str) -> None:
        """By the command, as an operator does it; a window for each file besides, by when it was recorded."""
        command = Process("migrate", self._directory, ["-m", "consumer", "migrate"], {"DATABASE_URL": self._url})
        async with self._step(name):
            command.start()
            try:
                await command.ended()
            finally:
                command.kill()
        begun = self.windows[-1].begun
        for row in await db.fetch("SELECT name, applied_at FROM campaign_stats.migrations ORDER BY number"):
            applied = row["applied_at"].timestamp()
            name = row["name"].removesuffix(".sql")
            self.windows.append(Window(f"  {'start, ' if name.startswith('0001') else ''}{name}", begun, applied))
            begun = applied

    async def _first_sweep(self, db: asyncpg.Connection) -> None:
        """Mode `observe`, until every campaign was published once."""
        env = {
            "DATABASE_URL": self._url,
            "KAFKA_BOOTSTRAP_SERVERS": self._kafka.bootstrap,
            "CAMPAIGN_STATS_TOPIC_PREFIX": self._prefix,
            "CAMPAIGN_STATS_HTTP_PORT": "0",
            "CAMPAIGN_STATS_GUARD_MODE": "observe",
            "CAMPAIGN_STATS_DRIFT_GRACE_S": str(GRACE_S),
        }
        if isinstance(self._kafka, EmbeddedBroker):
            env |= {"CAMPAIGN_STATS_PRODUCER_IDEMPOTENCE": "false", "CAMPAIGN_STATS_FETCH_MAX_WAIT_MS": "20"}
        service = Process("service", self._directory, ["-m", "consumer", "run"], env)
        deadline = time.monotonic() + STEP_DEADLINE_S
        async with self._step(f"first start and sweep ({GRACE_S:g} s grace)"):
            service.start()
            try:
                while await db.fetchval(
                    "SELECT (SELECT count(*) FROM campaigns) > (SELECT count(published_counts)"
                    " FROM campaign_stats.campaign_state) OR EXISTS (SELECT 1 FROM campaign_stats.outbox)"
                ):
                    if time.monotonic() > deadline or service.process is None or service.process.poll() is not None:
                        raise Failed(f"the first sweep came to nothing:\n{service.last_lines()}")
                    await asyncio.sleep(0.1)
            finally:
                service.stop()
        paused = await db.fetchval("SELECT count(*) FROM campaigns WHERE pause_reason IS NOT NULL")
        if paused:
            self.problems.append(f"{paused} campaigns were paused in mode observe")

    async def _leave(self, db: asyncpg.Connection, name: str) -> None:
        """The page's statements for the database, without those for its roles, which are not used here."""
        statements = [statement for statement in documented("8.") if "campaign_stats_run" not in statement]
        begun = time.time()
        parts = []
        for statement in statements:
            async with self._step(f"  {_title(statement)}"):
                await db.execute(statement)
            parts.append(self.windows.pop())
        self.windows += [Window(name, begun, time.time()), *parts]

    async def _nothing_left(self, db: asyncpg.Connection, before: Sequence[Any]) -> None:
        if left := {tuple(row) for row in await db.fetch(CATALOG)} ^ {tuple(row) for row in before}:
            self.problems.append(f"after leaving the catalog differs: {sorted(left)}")

    @asynccontextmanager
    async def _long_transaction(self) -> AsyncIterator[None]:
        """A transaction of the product that locked some rows of `campaign_prospects`, and takes its time."""
        async with workload.connected(self._url) as db:
            await db.execute("BEGIN")
            await db.execute(
                "UPDATE campaign_prospects SET company = company"
                " WHERE id IN (SELECT id FROM campaign_prospects WHERE id < $1 LIMIT 20)",
                BUSY_BELOW,
            )  # fmt: skip

            async def end() -> None:
                await asyncio.sleep(self._long_s)
                await db.execute("COMMIT")

            ending = asyncio.create_task(end())
            try:
                yield
                await ending
            finally:
                ending.cancel()

    @property
    def _prefix(self) -> str:
        return f"adopt{self.number}."

    def _felt(self, writes: Sequence[Write]) -> list[Felt]:
        found = []
        for window in self.windows:
            all_inside = [each for each in writes if window.begun <= each.begun < window.ended]
            inside = [each for each in all_inside if not each.bystander]
            beside = [each for each in all_inside if each.bystander]
            waits = sorted(each.ended - each.due for each in inside)
            found.append(
                Felt(
                    round=self.number,
                    step=window.step,
                    duration_s=window.ended - window.begun,
                    writes=len(inside),
                    longest_s=max((each.ended - each.begun for each in inside), default=0.0),
                    bystander_s=max((each.ended - each.begun for each in beside), default=0.0),
                    p99_s=waits[int(len(waits) * 0.99)] if waits else 0.0,
                    errors=sorted({each.error for each in inside if each.error}),
                )
            )
        return found


def _title(statement: str) -> str:
    """Short, for the table."""
    if statement.startswith("DO "):
        return "DROP TRIGGER, both"
    return re.sub(r"CONCURRENTLY IF EXISTS |public\.|;| \(.*", "", statement, flags=re.DOTALL)


async def prepare(postgres: Postgres, prospects: int) -> int:
    """The product as it is before, in the template database; how many campaigns."""
    dice = random.Random(2)
    sizes: list[int] = []
    while sum(sizes) < prospects:
        sizes.append(min(dice.randint(*workload.PROSPECTS), prospects - sum(sizes)))
    async with workload.connected(postgres.url()) as admin:
        await admin.execute(f'CREATE DATABASE "{workload.TEMPLATE}"')
    async with workload.connected(postgres.url(workload.TEMPLATE)) as db:
        await db.execute(REFERENCE.read_text("utf-8"))
        await db.execute(workload.LOAD_CAMPAIGNS, workload.campaign_ids(len(sizes)))
        await db.execute(workload.LOAD_PROSPECTS, workload.campaign_ids(len(sizes)), sizes)
        await db.execute(PRODUCT_STATS)
        await db.execute("INSERT INTO accounts (user_id, type, daily_limit) VALUES (gen_random_uuid(), 'email', 0)")
        await workload.settle(db)
    return len(sizes)


async def measure(postgres: Postgres, kafka: Any, directory: Path, options: argparse.Namespace) -> int:
    """All rounds; the exit code."""
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    begun = time.monotonic()
    async with asyncio.timeout(WHOLE_DEADLINE_S):
        campaigns = await prepare(postgres, options.prospects)
        async with workload.connected(postgres.url()) as db:
            version = await db.fetchval("SHOW server_version")
        conditions = {
            "prospects": options.prospects,
            "campaigns": campaigns,
            "writes_per_s": RATE,
            "rounds": options.rounds,
            "long_transaction_s": options.long,
            "postgresql": version,
            "broker": type(kafka).__name__,
            "cores": os.cpu_count(),
            "load_before": round(os.getloadavg()[0], 2),
        }
        console.print("  ".join(f"{name} {value}" for name, value in conditions.items()), soft_wrap=True)
        felt: list[Felt] = []
        problems: list[str] = []
        others: list[float] = []
        for number in range(1, options.rounds + 1):
            name = f"adopt{number}"
            await workload.copy_database(postgres.url(), name, workload.TEMPLATE)
            one = Round(number, postgres.url(name), kafka, directory, options.long)
            began, busy_s = time.monotonic(), others_s()
            felt += await one.run()
            others.append(round((others_s() - busy_s) / (time.monotonic() - began), 2))
            problems += [f"round {number}: {problem}" for problem in one.problems]
            await workload.drop(postgres.url(), name)
            console.print(f"round {number}: other programs kept {others[-1]:.2f} cores busy")
    problems += [f"a writer waited for a lock: {line}" for line in STUCK.findall(postgres.log.read_text("utf-8"))]
    for each in felt:
        problems += [f"round {each.round}, {each.step.strip()}: a writer got {error}" for error in each.errors]
        if each.longest_s > STALL_LIMIT_S and not each.step.startswith("quiet"):
            problems.append(
                f"round {each.round}, {each.step.strip()}: a writer was held up for {each.longest_s:.1f} s,"
                f" {STALL_LIMIT_S:g} are allowed"
            )
    console.print(_table(felt))
    for problem in problems:
        console.print(f"FAILED: {problem}", soft_wrap=True)
    RESULTS.parent.mkdir(exist_ok=True)
    document = {
        "conditions": conditions,
        "others_cores": others,
        "steps": [asdict(each) for each in felt],
        "failures": problems,
    }
    RESULTS.write_text(json.dumps(document, indent=2) + "\n")
    console.print(f"{time.monotonic() - begun:.0f} s; written to {RESULTS.relative_to(REPOSITORY)}")
    return 1 if problems else 0


def _table(felt: Sequence[Felt]) -> Table:
    table = Table(box=box.ASCII, title="what writers felt while a step went on: median (min-max) of the rounds")
    table.add_column("step", no_wrap=True)
    for column in ("takes, s", "longest stall, ms", "bystander's, ms", "p99, ms", "p99 / quiet"):
        table.add_column(column, justify="right", no_wrap=True)
    rounds = [list(steps) for _, steps in itertools.groupby(felt, key=lambda each: each.round)]
    for same in zip(*rounds, strict=True):
        many = all(each.writes >= P99_FROM for each in same)
        table.add_row(
            same[0].step,
            _spread([each.duration_s for each in same], ".2f"),
            _spread([each.longest_s * 1_000 for each in same], ".0f"),
            _spread([each.bystander_s * 1_000 for each in same], ".0f"),
            _spread([each.p99_s * 1_000 for each in same], ".1f") if many else "",
            _spread([each.p99_s / steps[0].p99_s for each, steps in zip(same, rounds, strict=True)], ".1f")
            if many
            else "",
        )
    return table


def _spread(values: Iterable[float], form: str) -> str:
    found = sorted(values)
    if len(found) == 1:
        return format(found[0], form)
    return f"{statistics.median(found):{form}} ({found[0]:{form}}-{found[-1]:{form}})"


def main() -> int:
    """Parse, start the servers, measure; the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.adopt", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--prospects", type=int, default=1_000_000, help="how many the product has (1000000)")
    parser.add_argument("--rounds", type=int, default=3, help="how often all of it is done (3)")
    parser.add_argument("--long", type=float, default=30.0, help="seconds of the product's long transaction (30)")
    parser.add_argument("--writers", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.writers is not None:
        asyncio.run(write(os.environ["DATABASE_URL"], options.writers))
        return 0
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    with ExitStack() as stack:
        directory = Path(tempfile.mkdtemp(prefix="cs-adopt-"))
        stack.callback(shutil.rmtree, directory, ignore_errors=True)
        directory.chmod(0o711)  # PostgreSQL runs under another account when we are root
        try:
            postgres = Postgres(directory / "pg", options=POSTGRES)
            stack.callback(postgres.stop)
            kafka = ApacheKafka(directory / "kafka") if java_available() else EmbeddedBroker(directory / "broker")
            stack.callback(kafka.stop)
            postgres.start()
            kafka.start()
            return asyncio.run(measure(postgres, kafka, directory, options))
        except (Failed, ServerFailed) as error:
            print(f"bench-adopt: {error}", file=sys.stderr)
            return 1
        except TimeoutError:
            print("bench-adopt: something took longer than it may", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            return 130


if __name__ == "__main__":
    sys.exit(main())
