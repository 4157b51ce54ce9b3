"""What the service does at 10, 100 and 1 000 times the load: a simulation fed with what `make bench` measured.

`python -m tests.benchmarks.simulate [FILE]` reads build/bench.json and prints constants and table of
deploy/scaling.md.

One process collects while it flushes: what arrives during one flush makes up the next generation. Hints are Zipf 1.0
over its campaigns, so a generation of n hints has `distinct(n, campaigns)` of them; each costs one recount, whatever n
is. Process and database are busy for a time that is linear in hints, recounts and generations. Replicas share nothing
but database cores. What the network between machines adds is not in it.
"""

import json
import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from tests.servers import REPOSITORY

RESULTS: Final = REPOSITORY / "build" / "bench.json"
GENERATION_AT_MOST: Final = 100_000  # campaigns (consumer.pipeline.COLLECT_AT_MOST)
POOL: Final = 6  # connections of one process at most (consumer.database.pool.POOL_SIZE)
SPARE: Final = 1.5
FRESH_S: Final = 1.0  # a generation: what comes in at its beginning waits for it and for the next one
HOPELESS_S: Final = 600.0
HEADROOM: Final = 3.0  # partitions for each process: to add replicas without a new topic
TURNS: Final = 400
SCALES: Final = (1, 10, 100, 1_000)


@dataclass(frozen=True, slots=True)
class Constants:
    """Measured; microseconds of one core unless the name says otherwise."""

    hint_us: float  # the process: poll, decode, collect
    recount_us: float  # the process: everything else, for each recounted campaign
    database_us: float  # PostgreSQL: for each recounted campaign of 300 prospects, with save, outbox and relay
    generation_us: float  # the process: for each generation, however small
    generation_database_us: float  # PostgreSQL: the same
    generation_s: float  # how long the smallest one takes
    kafka_us: float  # the brokers, for each hint
    told: float  # events published for each recount: 1 where each speaks of a change
    hint_bytes: float
    event_bytes: float


@dataclass(frozen=True, slots=True)
class Load:
    """What comes in, at its peak."""

    hints_per_s: float
    campaigns: int
    prospects: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """What it takes, and what one then sees."""

    processes: int
    generation_s: float
    recounts_per_s: float
    process_busy: float
    database_cores: float
    kafka_cores: float
    mb_per_s: float
    connections: int
    partitions: int


def main() -> int:
    """Print constants and table."""
    source = Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS
    try:
        constants = read(json.loads(source.read_text()))
    except (OSError, KeyError) as error:
        print(
            f"simulate: {source} lacks {error}: run `make bench` first, or `make bench ONLY=drain,reading,latency` and"
            " name build/bench-part.json",
            file=sys.stderr,
        )
        return 2
    print(constants)
    print("| scale | hints/s | campaigns | processes | partitions | busy | generation s | recounts/s | database cores |"
          " Kafka cores | MB/s in | connections |")  # fmt: skip
    print("|" + "---:|" * 12)
    for scale in SCALES:
        load = Load(1_000.0 * scale, 10_000 * scale, 3_000_000 * scale)
        found = fewest(constants, load)
        print(
            f"| {scale:,}x | {load.hints_per_s:,.0f} | {load.campaigns:,} | {found.processes} | {found.partitions} |"
            f" {found.process_busy:.0%} | {found.generation_s:.3f} | {found.recounts_per_s:,.0f} |"
            f" {found.database_cores:.1f} | {found.kafka_cores:.1f} | {found.mb_per_s:,.1f} | {found.connections} |"
        )
    return 0


def read(document: Mapping[str, Any]) -> Constants:
    """Constants from build/bench.json. Raises KeyError when it lacks drain, reading or latency.

    At 1 000 hints a second, each for another campaign, generations are small: what a hint costs there beyond its share
    of the drain's is its share of the generation.
    """
    hint_us = _median(document, "reading", "aiokafka, our checks: CPU us/event")
    runs = [run for run in document["measures"]["drain"]["runs"] if run["contestant"] == "service" and run["counts"]]
    hints, recounts = (sum(run[name] for run in runs) for name in ("events", "recounts"))
    recount_us = (sum(run["cpu_s"] for run in runs) * 1e6 - hint_us * hints) / recounts
    database_us = sum(run["postgres_s"] for run in runs) * 1e6 / recounts
    together = _median(document, "latency", "service: hints/generation")
    beyond_us = _median(document, "latency", "service: CPU us/hint") - hint_us - recount_us
    beyond_database_us = _median(document, "latency", "service: CPU us/hint in PostgreSQL") - database_us
    return Constants(
        hint_us=hint_us,
        recount_us=recount_us,
        database_us=database_us,
        generation_us=beyond_us * together,
        generation_database_us=beyond_database_us * together,
        generation_s=_median(document, "latency", "service: ms/generation") / 1e3
        - together * (recount_us + database_us) / 1e6,
        kafka_us=sum(run["kafka_s"] for run in runs) * 1e6 / hints,
        told=1.0,  # not the drain's: there all changes are made before, and most campaigns are recounted again
        hint_bytes=435,
        event_bytes=1_000,
    )


def _median(document: Mapping[str, Any], measure: str, figure: str) -> float:
    found: float = document["measures"][measure]["figures"][figure]["median"]
    return found


def fewest(constants: Constants, load: Load) -> Outcome:
    """The fewest processes whose generations would stay below FRESH_S with more load than this: SPARE times as much."""
    processes = 1
    while True:
        found = simulate(constants, load, processes)
        more = simulate(constants, replace(load, hints_per_s=SPARE * load.hints_per_s), processes)
        if found is not None and more is not None and more.generation_s <= FRESH_S:
            return found
        processes += 1


def simulate(constants: Constants, load: Load, processes: int) -> Outcome | None:
    """Generation after generation of one process, whose share is an equal one, until they repeat; None: falls behind.

    A flush waits for the database, and the process decodes meanwhile what makes up the next generation.
    """
    rate, campaigns = load.hints_per_s / processes, max(1, load.campaigns // processes)
    database_us = constants.database_us * (load.prospects / load.campaigns) / 300
    hints = recounts = seconds = process_s = 0.0
    for _ in range(TURNS):
        hints = max(1.0, rate * seconds)
        recounts = distinct(hints, campaigns)
        flush_s = recounts * (constants.recount_us + database_us) / 1e6 + constants.generation_s
        process_s = (
            hints * constants.hint_us + recounts * constants.recount_us + constants.generation_us
        ) / 1e6  # fmt: skip
        seconds = max(flush_s, process_s, hints / rate)
        if recounts > GENERATION_AT_MOST or seconds > HOPELESS_S:
            return None
    total = recounts / seconds * processes
    return Outcome(
        processes,
        seconds,
        total,
        process_s / seconds,
        processes * (recounts * database_us + constants.generation_database_us) / 1e6 / seconds,
        load.hints_per_s * constants.kafka_us / 1e6,
        (load.hints_per_s * constants.hint_bytes + total * constants.told * constants.event_bytes) / 1e6,
        processes * POOL,
        math.ceil(processes * HEADROOM),
    )


def distinct(draws: float, campaigns: int) -> float:
    """How many campaigns are expected among so many draws, Zipf 1.0: the sum of 1 - (1 - p)^n, ranks in bins of 5 %."""
    total = math.log(campaigns) + 0.57722 + 1 / (2 * campaigns) - 1 / (12 * campaigns**2)
    return sum(
        width * -math.expm1(draws * math.log1p(-min(0.999999, 1 / (rank * total)))) for rank, width in _bins(campaigns)
    )


def _bins(campaigns: int) -> Iterator[tuple[float, int]]:
    low = 1
    while low <= campaigns:
        high = min(campaigns, max(low, int(low * 1.05)))
        yield math.sqrt(low * high), high - low + 1
        low = high + 1


if __name__ == "__main__":
    sys.exit(main())
