"""`make bench`: start servers, measure, print a table, write build/bench.json.

Exit code 0 when every floor holds, 1 when one does not or a run came out wrong, 2 when something is missing.
QUICK=1 measures less, and says so.
"""

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
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any, Final

from rich import box
from rich.console import Console
from rich.table import Table

from consumer.demo.servers import Postgres, ServerFailed
from tests.benchmarks import drain, workload
from tests.benchmarks.drain import (
    FLOOR,
    MEMORY_LIMIT_MB,
    OTHERS_AT_MOST,
    PEAK_GROWTH_MB,
    PER_EVENT,
    SERVICE,
    Failed,
    Memory,
    Plan,
    Run,
)
from tests.servers import KAFKA_VERSION, REPOSITORY, ApacheKafka, java_available

FULL: Final = Plan(campaigns=5_000, hints=500_000, rounds=3)
QUICK: Final = Plan(campaigns=5_000, hints=200_000, rounds=2)
WHOLE_DEADLINE_S: Final = 40 * 60.0
RESULTS: Final = REPOSITORY / "build" / "bench.json"
POSTGRES: Final = {"fsync": "on", "synchronous_commit": "on", "shared_buffers": "512MB", "max_wal_size": "4GB"}
DISK_AT_LEAST_S: Final = 10e-6  # a flush that is quicker reached no disk


def main() -> int:
    """Measure everything; returns the exit code."""
    if not java_available():
        print("bench: Java 17 or Maven is missing, and only Apache Kafka counts here: install both"
              " (Debian: apt-get install openjdk-17-jre-headless maven)", file=sys.stderr)  # fmt: skip
        return 2
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _end)
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)  # NotLeader right after a topic was made is normal
    quick = os.environ.get("QUICK", "") not in ("", "0")
    plan = QUICK if quick else FULL
    console = Console(width=None if sys.stdout.isatty() else 110, highlight=False)
    with ExitStack() as stack:
        directory = Path(tempfile.mkdtemp(prefix="cs-bench-"))
        stack.callback(shutil.rmtree, directory, ignore_errors=True)
        directory.chmod(0o711)  # PostgreSQL runs under another account when we are root
        flush_s = _flush_s(directory)
        if flush_s < DISK_AT_LEAST_S:
            print(
                f"bench: {directory.parent} flushes nothing to a disk: set TMPDIR to a folder on one", file=sys.stderr
            )
            return 2
        try:
            postgres = Postgres(directory / "pg", options=POSTGRES)
            stack.callback(postgres.stop)
            kafka = ApacheKafka(directory / "kafka")
            stack.callback(kafka.stop)
            stack.callback(_deaf)  # runs first: a second Ctrl-C must not interrupt the cleaning up
            postgres.start()
            kafka.start()
            return asyncio.run(_measure(postgres, kafka, directory, plan, quick, flush_s, console))
        except (Failed, ServerFailed) as error:
            print(f"bench: {error}", file=sys.stderr)
            return 1
        except TimeoutError:
            print("bench: something took longer than it may", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            return 130


async def _measure(
    postgres: Postgres, kafka: ApacheKafka, directory: Path, plan: Plan, quick: bool, flush_s: float, console: Console
) -> int:
    begun = time.monotonic()
    conditions = await _conditions(postgres, plan, quick, flush_s)
    if quick:
        console.print("QUICK=1: fewer rounds and hints than the real measurement; floors apply all the same")
    console.print("  ".join(f"{name} {value}" for name, value in conditions.items()), soft_wrap=True)
    runs: list[Run] = []
    async with asyncio.timeout(WHOLE_DEADLINE_S):
        field = await drain.prepare(postgres, kafka, directory, plan)
        console.print(f"prepared in {time.monotonic() - begun:.0f} s")
        for number in range(1, 2 * plan.rounds + 1):  # more than planned only for rounds that others disturbed
            for run in await drain.duel(field, plan, number):
                runs.append(run)
                console.print(_line(run), soft_wrap=True)
            if number - len({run.round for run in runs if run.others > OTHERS_AT_MOST}) == plan.rounds:
                break
        memory = await drain.memory(field, plan)
    failures = _failures(runs, memory, plan)
    console.print(_table(runs, memory))
    for failure in failures:
        console.print(f"FAILED: {failure}", soft_wrap=True)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(_document(conditions, runs, memory, failures), indent=2) + "\n")
    console.print(f"{time.monotonic() - begun:.0f} s; written to {RESULTS.relative_to(REPOSITORY)}")
    return 1 if failures else 0


async def _conditions(postgres: Postgres, plan: Plan, quick: bool, flush_s: float) -> dict[str, Any]:
    async with workload.connected(postgres.url()) as db:
        version = await db.fetchval("SHOW server_version")
        fsync = await db.fetchval("SHOW fsync")
    return {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "quick": quick,
        "campaigns": plan.campaigns,
        "hints": plan.hints,
        "rounds": plan.rounds,
        "partitions": workload.PARTITIONS,
        "kafka": KAFKA_VERSION,
        "postgresql": version,
        "fsync": fsync,
        "flush_us": round(flush_s * 1e6),
        "python": sys.version.split()[0],
        "cores": os.cpu_count(),
        "load_before": round(os.getloadavg()[0], 2),
    }


def _failures(runs: Sequence[Run], memory: Memory, plan: Plan) -> list[str]:
    found = [
        f"INVALID, does not count: {run.contestant} in round {run.round}: {problem}"
        for run in runs
        for problem in run.problems
    ]
    found.extend(f"INVALID, does not count: memory run: {problem}" for problem in memory.problems)
    ratios = drain.ratios(runs)
    if len(ratios) < plan.rounds:
        found.append(f"only {len(ratios)} of {plan.rounds} rounds count: runs were wrong or other programs too busy")
    if ratios and statistics.median(ratios) < FLOOR:
        found.append(f"{statistics.median(ratios):.0f} times the per-event consumer's rate, the floor is {FLOOR:g}")
    peak = max([memory.first_peak_mb, memory.second_peak_mb, *(r.peak_mb for r in runs if r.contestant == SERVICE)])
    if peak >= MEMORY_LIMIT_MB:
        found.append(f"{peak:.0f} MB resident, the limit is {MEMORY_LIMIT_MB:g}")
    if memory.peak_growth_mb > PEAK_GROWTH_MB:
        found.append(f"the second backlog took {memory.peak_growth_mb:.1f} MB more, {PEAK_GROWTH_MB:g} are allowed")
    if memory.rest_growth_mb > memory.rest_allowed_mb:
        found.append(
            f"the second backlog left {memory.rest_growth_mb:.1f} MB, {memory.rest_allowed_mb:.1f} are allowed"
        )
    return found


def _table(runs: Sequence[Run], memory: Memory) -> Table:
    table = Table(box=box.ASCII, title="valid and undisturbed rounds only; ratios within a round")
    for column in ("measure", "median", "min", "max", "limit"):
        table.add_column(column, justify="left" if column == "measure" else "right", no_wrap=True)

    def row(name: str, values: Sequence[float], form: str, limit: str = "") -> None:
        if values:
            table.add_row(name, *(format(value, form) for value in drain.spread(values).values()), limit)
        else:
            table.add_row(name, "-", "-", "-", limit)

    valid = drain.counting(runs)
    for name in (SERVICE, PER_EVENT):
        mine = [run for run in valid if run.contestant == name]
        row(f"{name}: events/s", [run.rate for run in mine], ",.0f")
        row(f"{name}: CPU us/event", [run.cpu_s / run.events * 1e6 for run in mine], ",.1f")
        row(f"{name}: published events/event", [run.published / run.events for run in mine], ".3f")
        row(f"{name}: start to join, s", [run.start_s for run in mine], ".2f")
        row(f"{name}: highest resident MB", [run.peak_mb for run in mine], ".0f", _limit(name))
    row("cores kept busy by other programs", [run.others for run in valid], ".2f")
    row(f"{SERVICE} / {PER_EVENT}", drain.ratios(runs), ",.0f", f">= {FLOOR:g}")
    row("one process, 1st backlog: highest MB", [memory.first_peak_mb], ".1f", f"< {MEMORY_LIMIT_MB:g}")
    row("one process, 2nd backlog: highest MB", [memory.second_peak_mb], ".1f", f"< {MEMORY_LIMIT_MB:g}")
    row("one process, 2nd backlog: more than 1st, MB", [memory.peak_growth_mb], "+.1f", f"<= {PEAK_GROWTH_MB:g}")
    row(
        "one process, 2nd backlog: left behind, MB", [memory.rest_growth_mb], "+.1f", f"<= {memory.rest_allowed_mb:.1f}"
    )
    return table


def _limit(contestant: str) -> str:
    return f"< {MEMORY_LIMIT_MB:g}" if contestant == SERVICE else ""


def _line(run: Run) -> str:
    verdict = f"INVALID: {'; '.join(run.problems)}" if run.problems else "valid"
    if run.others > OTHERS_AT_MOST:
        verdict += ", disturbed: the round does not count"
    return (
        f"round {run.round}  {run.contestant:18}  {run.events:>7,} events in {run.seconds:6.2f} s = {run.rate:>9,.0f}/s"
        f"  published {run.published:>6,}  others {run.others:4.2f} cores  {verdict}"
    )


def _document(
    conditions: dict[str, Any], runs: Sequence[Run], memory: Memory, failures: Sequence[str]
) -> dict[str, Any]:
    ratios = drain.ratios(runs)
    return {
        "conditions": conditions,
        "drain": {
            "others_at_most": OTHERS_AT_MOST,
            "ratio": {**drain.spread(ratios), "floor": FLOOR} if ratios else None,
            "runs": [{**asdict(run), "rate": run.rate} for run in runs],
        },
        "memory": {
            **asdict(memory),
            "peak_growth_mb": memory.peak_growth_mb,
            "peak_allowed_mb": PEAK_GROWTH_MB,
            "rest_growth_mb": memory.rest_growth_mb,
            "rest_allowed_mb": memory.rest_allowed_mb,
        },
        "failures": list(failures),
    }


def _flush_s(directory: Path) -> float:
    """How long the disk takes for a small write that must last; the per-event consumer waits for that every time."""
    taken = []
    with (directory / "flush").open("wb", buffering=0) as file:
        for _ in range(200):
            file.write(bytes(8192))
            begun = time.perf_counter()
            os.fdatasync(file.fileno())
            taken.append(time.perf_counter() - begun)
    (directory / "flush").unlink()
    return statistics.median(taken)


def _end(number: int, _: FrameType | None) -> None:
    sys.exit(128 + number)


def _deaf() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


if __name__ == "__main__":
    sys.exit(main())
