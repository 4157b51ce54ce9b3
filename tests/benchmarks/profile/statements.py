"""What PostgreSQL is asked, by name, and what a recount costs it in each way of planning."""

import json
import re
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from typing import Any, Final
from uuid import UUID

import asyncpg
import psutil  # type: ignore[import-untyped]  # has no types

from consumer.database import statement

WARM_RECOUNTS: Final = 8  # from the sixth execution on PostgreSQL may keep a plan for all values
RECOUNTS: Final = (500, 10)  # timed: of a single campaign, of a chunk
EXPLAINED_FROM: Final = "1ms"


class StatementNames:
    """Which file, or which function, a statement comes from."""

    def __init__(self) -> None:
        files = resources.files("consumer") / "sql"
        self._files = {
            _squeezed(file.read_text("utf-8"))[:60]: file.name for file in files.iterdir() if file.name.endswith(".sql")
        }
        migrations = resources.files("consumer") / "migrations"
        self._migrations = [
            _squeezed(file.read_text("utf-8")) for file in migrations.iterdir() if file.name.endswith(".sql")
        ]

    def of(self, query: str) -> str | None:
        """Its name; None for a statement of the benchmark itself."""
        text = _squeezed(query)
        if text.startswith(("-- upstream", "SELECT (SELECT count(*)")) or "pg_stat_statements" in text:
            return None
        for start, name in self._files.items():
            if text.startswith(start):
                return name
        start = text.partition("$")[0].strip()  # constants are replaced by numbers
        for migration in self._migrations:
            place = migration.find(start) if len(start) > 12 else -1
            if place > 0:
                functions = re.findall(r"FUNCTION (?:campaign_stats\.)?(\w+)", migration[:place])
                if functions:
                    return f"{functions[-1]}: {start[:20]}"
        return text[:40]


def _squeezed(text: str) -> str:
    return " ".join(text.split())


async def recounts(db: asyncpg.Connection, ids: Sequence[UUID], mode: str) -> tuple[float, float]:
    """Recount these again and again, undone each time: median milliseconds, CPU of the session per recount in us."""
    await db.execute(f"SET plan_cache_mode = {mode}")
    session, took = psutil.Process(db.get_server_pid()), list[float]()
    recount = await db.prepare(statement("recount"))
    cpu_s = 0.0
    for repeat in range(-WARM_RECOUNTS, RECOUNTS[len(ids) > 1]):
        if repeat == 0:
            took.clear()
            cpu_s = sum(session.cpu_times()[:2])
        begun = time.perf_counter()
        await _undone(db, recount, ids)
        took.append(time.perf_counter() - begun)
    cpu_s = sum(session.cpu_times()[:2]) - cpu_s
    return statistics.median(took) * 1000, cpu_s / (len(took) * len(ids)) * 1e6


async def _undone(db: asyncpg.Connection, recount: Any, ids: Sequence[UUID]) -> None:
    transaction = db.transaction()
    await transaction.start()
    await recount.fetch(ids, "chunk")
    await transaction.rollback()  # the next one finds the same differences


async def explained(db: asyncpg.Connection, ids: Sequence[UUID]) -> list[str]:
    """The plans of one more recount in this session, statements inside the function too: a line for each node."""
    said: list[str] = []
    db.add_log_listener(lambda _, message: said.append(str(message)))
    recount = await db.prepare(statement("recount"))
    for name, value in {
        "log_level": "notice", "log_format": "json", "log_nested_statements": "on", "log_analyze": "on",
        "log_buffers": "on", "log_min_duration": EXPLAINED_FROM,
    }.items():  # fmt: skip
        await db.execute(f"SET auto_explain.{name} = '{value}'")
    await _undone(db, recount, ids)
    await db.execute("SET auto_explain.log_min_duration = -1")
    names, found = StatementNames(), defaultdict(list)
    for message in said:
        if (place := message.find("{")) >= 0:
            plan = json.loads(message[place:])
            found[names.of(plan["Query Text"]) or ""].append(plan["Plan"])
    lines = []
    for name, plans in found.items():
        lines.append(f"{name}: {len(plans)} x, {sum(plan['Actual Total Time'] for plan in plans):.2f} ms")
        lines += [f"  {line}" for line in _plan_lines(plans[0])]
    return lines


NODE: Final = ("Node Type", "Subplan Name", "Index Name", "Relation Name", "CTE Name", "Function Name")


def _plan_lines(plan: Mapping[str, Any], depth: int = 0) -> Iterator[str]:
    """A line for each node that ran: what it did, rows and loops, milliseconds in all loops, buffers."""
    loops = plan.get("Actual Loops", 1)
    if not loops:
        return
    what = " ".join(str(plan[key]) for key in NODE if key in plan)
    rows, took = plan.get("Actual Rows", 0), plan.get("Actual Total Time", 0.0) * loops
    guess = plan.get("Plan Rows", 0)
    yield (
        f"{'  ' * depth}{what}: {rows:g} rows (guessed {guess:g}) x {loops}, {took:.2f} ms,"
        f" {plan.get('Shared Hit Blocks', 0)} blocks"
    )
    for below in plan.get("Plans", ()):
        yield from _plan_lines(below, depth + 1)
