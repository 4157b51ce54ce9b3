"""What a recount costs where the product's tables are partitioned by campaign, beside plain ones.

The same campaigns in databases whose tables are plain or hash-partitioned; `migrate` is run on each. In every round
each database recounts and saves the same campaigns, in an order that changes; ratios are taken within a round.
"""

import re
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final
from uuid import UUID

from consumer import migrations
from consumer.database import Database
from consumer.generation import Work
from consumer.guard import Limits
from consumer.recount import Rules, recount_campaigns
from schemas.events import Trigger
from tests.benchmarks import workload
from tests.benchmarks.report import Figure, Report, ratios
from tests.benchmarks.stage import Stage, others_s
from tests.benchmarks.trials import Trial, counted, interleaved, report_of

REFERENCE: Final = Path(migrations.__file__).parent / "reference" / "0001_product_tables.sql"
CHUNK: Final = 1_000  # campaigns of 300 prospects
OTHERS: Final = 9_000  # campaigns of 10
SINGLE: Final = 100  # calls for one campaign each
ROUNDS: Final = 6
MOVED: Final = (
    "SELECT id FROM campaign_prospects WHERE campaign_id = ANY ($1) AND status = 'sent' ORDER BY id LIMIT 100"
)
Step = Callable[[Database, Sequence[Sequence[UUID]]], Awaitable[None]]
FIGURES: Final = {
    "chunk": f"recount and save of {CHUNK:,} campaigns",
    "single": f"recount and save of {SINGLE} campaigns one by one",
    "windows": f"{SINGLE} guard windows",
    "moves": "the product moves 100 prospects by their ids",
}


@dataclass(frozen=True, slots=True)
class Shape:
    """How many partitions the tables have; 1: it is a plain table."""

    campaigns: int
    prospects: int

    def __str__(self) -> str:
        """In the table."""
        if self.prospects == 1:
            return "plain"
        return f"{'both' if self.campaigns > 1 else 'prospects'} in {self.prospects}"


PLAIN: Final = Shape(1, 1)
SHAPES: Final = (PLAIN, Shape(1, 16), Shape(16, 16), Shape(1, 64))


def reference(shape: Shape) -> str:
    """The product's tables and functions, campaigns partitioned by hash of `id`, prospects by hash of `campaign_id`.

    A unique key must hold the partition key: prospects get (campaign_id, id), and an index for the product's own
    look-ups by id. What is not partitioned is as in the reference schema.
    """
    sql = REFERENCE.read_text("utf-8")
    for table, key, partitions in (
        ("campaigns", "id", shape.campaigns),
        ("campaign_prospects", "campaign_id", shape.prospects),
    ):
        if partitions == 1:
            continue
        [made] = re.findall(rf"(?ms)^CREATE TABLE IF NOT EXISTS public\.{table} \(.*?^\);$", sql)
        parted = re.sub(r"\n\);$", f"\n) PARTITION BY HASH ({key});", made)
        if table == "campaign_prospects":
            parted = re.sub(r"\bid( +)uuid PRIMARY KEY DEFAULT", r"id\1uuid NOT NULL DEFAULT", parted)
            parted = parted.replace("\n) PARTITION", ",\n    PRIMARY KEY (campaign_id, id)\n) PARTITION")
            parted += "\nCREATE INDEX campaign_prospects_id ON public.campaign_prospects (id);"
        for number in range(partitions):
            parted += (
                f"\nCREATE TABLE public.{table}_{number} PARTITION OF public.{table}"
                f" FOR VALUES WITH (MODULUS {partitions}, REMAINDER {number});"
            )
        sql = sql.replace(made, parted)
    return sql


async def measure(stage: Stage) -> Report:
    """A database of each shape, all rounds."""
    ids = workload.campaign_ids(CHUNK + OTHERS)
    names = {shape: f"parts_{shape.campaigns}_{shape.prospects}" for shape in SHAPES}
    urls = {shape: stage.postgres.url(name) for shape, name in names.items()}
    try:
        for shape, url in urls.items():
            await _prepare(stage, names[shape], url, shape, ids)
        attempts = {str(shape): partial(_trial, shape, url, ids[:CHUNK]) for shape, url in urls.items()}
        trials = await interleaved(stage, "parts", ROUNDS, attempts)
    finally:
        for name in names.values():
            await workload.drop(stage.postgres.url(), name)
    report = report_of("partitioned", stage, trials)
    for key, title in FIGURES.items():
        plain = counted(trials, str(PLAIN), key)
        report.figures.append(Figure(f"{title}, plain: ms", list(plain.values())))
        for shape in SHAPES[1:]:
            beside = ratios(counted(trials, str(shape), key), plain)
            report.figures.append(Figure(f"{title}, {shape}: time beside plain", beside))
    return report


async def _prepare(stage: Stage, name: str, url: str, shape: Shape, ids: Sequence[UUID]) -> None:
    """Campaigns and prospects, then `migrate`, as where a product has them already."""
    async with workload.connected(stage.postgres.url()) as admin:
        await admin.execute(f"CREATE DATABASE {name}")
    async with workload.connected(url) as db:
        await db.execute(reference(shape))
        await db.execute(workload.LOAD_CAMPAIGNS, ids)
        await db.execute(workload.LOAD_PROSPECTS, ids, [300] * CHUNK + [10] * OTHERS)
        await migrations.migrate(url)
        await workload.settle(db)


async def _trial(shape: Shape, url: str, ids: Sequence[UUID], number: int, _: str) -> Trial:
    """A chunk, single campaigns, windows, moves; after a change and a vacuum, and once each has been planned."""
    begun, busy_s = time.monotonic(), others_s()
    await workload.change(url, number)
    database, ms = Database(url, size=1), {}
    steps: dict[str, tuple[Step, Sequence[Sequence[UUID]]]] = {
        "chunk": (_recount, [ids]),
        "single": (_recount, [[one] for one in ids[:SINGLE]]),
        "windows": (_windows, [[one] for one in ids[:SINGLE]]),
    }
    await database.open()
    try:
        for key, (step, calls) in steps.items():
            await step(database, [ids[-1:]])  # planned
            started = time.perf_counter()
            await step(database, calls)
            ms[key] = (time.perf_counter() - started) * 1e3
    finally:
        await database.close(5)
    drifted = set((await workload.read_truth(url)).drifted()) & set(ids)
    async with workload.connected(url) as db:
        await db.execute("TRUNCATE campaign_stats.outbox")
        moved = [row["id"] for row in await db.fetch(MOVED, ids[:100])]
        call = await db.prepare("SELECT update_prospect_with_stat($1, 'replied')")
        started = time.perf_counter()
        for prospect in moved:
            await call.fetchval(prospect)
        ms["moves"] = (time.perf_counter() - started) * 1e3
    seconds = time.monotonic() - begun
    others = (others_s() - busy_s) / seconds
    problems = [f"{len(drifted)} of the recounted campaigns have wrong stats"] if drifted else []
    return Trial(str(shape), number, len(ids), seconds, 0.0, 0.0, others, problems, values=ms)


async def _recount(database: Database, calls: Sequence[Sequence[UUID]]) -> None:
    """A transaction for each."""
    for ids in calls:
        async with database.transaction() as db:
            works = [Work(one, Trigger.STATUS_CHANGED) for one in ids]
            await recount_campaigns(db, works, "chunk", Rules(Limits()))


async def _windows(database: Database, calls: Sequence[Sequence[UUID]]) -> None:
    """All in one transaction."""
    async with database.transaction() as db:
        for ids in calls:
            await db.windows([(one, 500, None) for one in ids])
