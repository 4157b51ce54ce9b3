"""`make bench`: start servers, measure, print a table, write build/bench.json.

`ONLY=drain,relaying` measures a part, `QUICK=1` the most important with fewer rounds and less of everything, `LONG=1`
what needs millions (`make bench-long`). Exit code 0 when every limit holds, 1 when one does not or a run came out
wrong, 2 when something is missing.
"""

import asyncio
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any, Final

from rich.console import Console

from consumer.demo.servers import Postgres, ServerFailed
from tests.benchmarks import (
    cluster,
    counting,
    crash,
    decoding,
    drain,
    growth,
    hot,
    joining,
    latency,
    memory,
    partitioned,
    processes,
    reading,
    relaying,
    tracing,
    warm,
    wear,
    workload,
)
from tests.benchmarks.report import Report, table
from tests.benchmarks.stage import PEERS_PYTHON, Failed, Size, Stage, flush_s
from tests.servers import KAFKA_VERSION, REPOSITORY, ApacheKafka, java_available

FULL: Final = Size(campaigns=10_000, hints=1_000_000, rounds=3)
QUICK: Final = Size(campaigns=5_000, hints=500_000, rounds=2, is_quick=True)
DEADLINE_S: Final = {"QUICK": 8 * 60.0, "": 40 * 60.0, "LONG": 2 * 60 * 60.0}  # the first two are promised
POSTGRES: Final = {"fsync": "on", "synchronous_commit": "on", "shared_buffers": "512MB", "max_wal_size": "4GB"}
KAFKA: Final = {"group.initial.rebalance.delay.ms": "1000"}  # default 3 000; so that two join in one rebalance
DISK_AT_LEAST_S: Final = 10e-6  # a flush that is quicker reached no disk
PEER_PACKAGES: Final = ("faststream", "quixstreams", "confluent_kafka", "msgspec")

Measure = Callable[[Stage], Awaitable[Report]]
MEASURES: Final[Mapping[str, Measure]] = {
    "drain": drain.measure,
    "reading": reading.measure,
    "decoding": decoding.measure,
    "tracing": tracing.measure,
    "counting": counting.measure,
    "latency": latency.measure,
    "hot": hot.measure,
    "relaying": relaying.measure,
    "joining": joining.measure,
    "processes": processes.measure,
    "crash": crash.measure,
}
IN_QUICK: Final = ("drain", "counting", "latency", "relaying", "crash")
LONG: Final[Mapping[str, Measure]] = {
    "memory": memory.measure,
    "warm": warm.measure,
    "cluster": cluster.measure,
    "growth": growth.measure,
    "wear": wear.measure,
    "partitioned": partitioned.measure,
}
WITH_PEERS: Final = frozenset(("drain", "reading", "warm"))
QUICK_WITH_PEERS: Final = WITH_PEERS - {"drain"}  # whose peer is then the per-event consumer alone


def main() -> int:
    """Measure what was asked for; returns the exit code."""
    mode = next((name for name in ("QUICK", "LONG") if os.environ.get(name, "") not in ("", "0")), "")
    offered = LONG if mode == "LONG" else {name: MEASURES[name] for name in IN_QUICK} if mode else MEASURES
    wanted = [name.strip() for name in os.environ.get("ONLY", "").split(",") if name.strip()]
    chosen = {name: measure for name, measure in {**MEASURES, **LONG}.items() if name in (wanted or offered)}
    if unknown := sorted(set(wanted) - {*MEASURES, *LONG}):
        print(f"bench: ONLY={','.join(unknown)} is unknown, there are {', '.join((*MEASURES, *LONG))}", file=sys.stderr)
        return 2
    with_peers = QUICK_WITH_PEERS if mode == "QUICK" else WITH_PEERS
    if missing := _missing(with_peers=not with_peers.isdisjoint(chosen)):
        print("\n".join(f"bench: {line}" for line in missing), file=sys.stderr)
        return 2
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _end)
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)  # NotLeader right after a topic was made is normal
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    with ExitStack() as stack:
        directory = Path(tempfile.mkdtemp(prefix="cs-bench-"))
        stack.callback(shutil.rmtree, directory, ignore_errors=True)
        directory.chmod(0o711)  # PostgreSQL runs under another account when we are root
        disk_s = flush_s(directory)
        if disk_s < DISK_AT_LEAST_S:
            print(f"bench: {directory.parent} flushes nothing to a disk: set TMPDIR to one", file=sys.stderr)
            return 2
        try:
            postgres = Postgres(directory / "pg", options=POSTGRES)
            stack.callback(postgres.stop)
            kafka = ApacheKafka(directory / "kafka", KAFKA)
            stack.callback(kafka.stop)
            stack.callback(_deaf)  # runs first: a second Ctrl-C must not interrupt the cleaning up
            postgres.start()
            kafka.start()
            size = QUICK if mode == "QUICK" else FULL
            stage = Stage(postgres, kafka, directory, size, lambda line: console.print(line, soft_wrap=True))
            return asyncio.run(_measure(stage, chosen, mode, disk_s, console))
        except ServerFailed as error:
            print(f"bench: {error}", file=sys.stderr)
            return 1
        except TimeoutError:
            print("bench: something took longer than it may", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            return 130


def _missing(*, with_peers: bool) -> list[str]:
    """Everything that is not there, by name, with what to do."""
    missing = []
    if not java_available():
        missing.append(
            "Java 17 or Maven is missing, and only Apache Kafka counts here: install both"
            " (Debian: apt-get install openjdk-17-jdk-headless maven)"
        )
    if not with_peers:
        return missing
    homes = [f"{home}/bin" for home in (os.environ.get("JAVA_HOME"),) if home]
    folders = os.pathsep.join([*homes, os.environ.get("PATH", os.defpath)])
    tools = {"javac": "a JDK (Debian: openjdk-17-jdk-headless)", "mvn": "Maven (Debian: maven)"}
    if packages := [package for tool, package in tools.items() if shutil.which(tool, path=folders) is None]:
        missing.append(f"the peer Kafka Streams cannot be built: install {' and '.join(packages)}")
    if not PEERS_PYTHON.exists():
        missing.append(
            f"the peers {', '.join(PEER_PACKAGES)} are missing: start this by `make bench`, which fetches them"
        )
    else:
        probe = "import importlib.util, sys; print(*(n for n in sys.argv[1:] if importlib.util.find_spec(n) is None))"
        lacking = subprocess.run(
            [PEERS_PYTHON, "-c", probe, *PEER_PACKAGES], capture_output=True, text=True, check=True
        ).stdout.split()  # fmt: skip
        missing += [
            f"the peer {name} is missing: remove .cache/peers and start this by `make bench`" for name in lacking
        ]
    return missing


async def _measure(stage: Stage, chosen: Mapping[str, Measure], mode: str, disk_s: float, console: Console) -> int:
    begun = time.monotonic()
    conditions = await _conditions(stage, mode, disk_s)
    if mode == "QUICK":
        console.print("QUICK=1: fewer rounds and hints than the real measurement; limits apply all the same")
    console.print("  ".join(f"{name} {value}" for name, value in conditions.items()), soft_wrap=True)
    reports = []
    try:
        async with asyncio.timeout(DEADLINE_S[mode]):
            for name, measure in chosen.items():
                console.print(f"{name} ...")
                started = time.monotonic()
                try:
                    report = await measure(stage)
                except Exception as error:  # the others' figures are worth as much without this one's
                    report = Report(name, problems=[str(error) or type(error).__name__])
                    if not isinstance(error, (Failed, ServerFailed)):
                        console.print_exception()
                report.seconds = time.monotonic() - started
                reports.append(report)
                console.print(f"{name}: {report.seconds:.0f} s")
    except TimeoutError:
        reports.append(Report("all", problems=[f"it was not done after {DEADLINE_S[mode] / 60:.0f} minutes"]))
    failures = [failure for report in reports for failure in report.failures()]
    console.print(table(reports))
    for failure in failures:
        console.print(f"FAILED: {failure}", soft_wrap=True)
    results = _results(mode, is_part=bool(os.environ.get("ONLY")))
    _write({"conditions": conditions, "measures": {report.measure: report.document() for report in reports}}, results)
    console.print(f"{time.monotonic() - begun:.0f} s; written to {results.relative_to(REPOSITORY)}")
    return 1 if failures else 0


def _results(mode: str, *, is_part: bool) -> Path:
    """A part, or a quick one, never takes the place of the whole."""
    whole = {"LONG": "bench-long", "QUICK": "bench-quick"}.get(mode, "bench")
    return REPOSITORY / "build" / f"{whole}{'-part' if is_part else ''}.json"


def _write(document: Mapping[str, Any], results: Path) -> None:
    results.parent.mkdir(exist_ok=True)
    results.write_text(json.dumps(document, indent=2) + "\n")


async def _conditions(stage: Stage, mode: str, disk_s: float) -> dict[str, Any]:
    async with workload.connected(stage.postgres.url()) as db:
        version = await db.fetchval("SHOW server_version")
        fsync = await db.fetchval("SHOW fsync")
    return {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "mode": mode or "full",
        "campaigns": stage.size.campaigns,
        "hints": stage.size.hints,
        "rounds": stage.size.rounds,
        "partitions": workload.PARTITIONS,
        "kafka": KAFKA_VERSION,
        "postgresql": version,
        "fsync": fsync,
        "flush_us": round(disk_s * 1e6),
        "python": sys.version.split()[0],
        "cores": os.cpu_count(),
        "load_before": round(os.getloadavg()[0], 2),
    }


def _end(number: int, _: FrameType | None) -> None:
    sys.exit(128 + number)


def _deaf() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


if __name__ == "__main__":
    sys.exit(main())
