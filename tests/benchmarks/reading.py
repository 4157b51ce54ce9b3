"""CPU of poll, decode and validate: aiokafka with our checks beside confluent-kafka with the same, and with none.

Everybody's clocks start when the first records are in hand and none of them is decoded yet, so connecting and the first
fetch are nobody's cost; they stop when the last one is decoded.

As a program (`python -m tests.benchmarks.reading`) it is our contestant: the service's own source and decoder.
"""

import asyncio
import gc
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Final

from consumer.broker import Connection, Source
from consumer.envelope import Hints
from schemas import events
from tests.benchmarks.report import Figure, Report, at_most, ratios
from tests.benchmarks.stage import PEERS, PEERS_PYTHON, Contestant, Round, Run, Stage, others_s, rates, reported

DEADLINE_S: Final = 120.0
OURS: Final = "aiokafka, our checks"
SAME: Final = "confluent-kafka, our checks"
BARE: Final = "confluent-kafka, msgspec, no checks"
COMMANDS: Final[Mapping[str, Sequence[str]]] = {
    OURS: [sys.executable, "-m", "tests.benchmarks.reading"],
    SAME: [str(PEERS_PYTHON), str(PEERS / "read_confluent.py")],
    BARE: [str(PEERS_PYTHON), str(PEERS / "read_confluent.py")],
}
MODES: Final = {OURS: "", SAME: "same", BARE: "msgspec"}


async def measure(stage: Stage) -> Report:
    """Each once a round over the same backlog, the order reversed every round; CPU of the whole process per event."""
    runs: list[Run] = []
    async with stage.round(1, seed=700) as common:
        for number in range(1, stage.size.rounds + 1):
            names = [OURS, SAME, BARE]
            for contestant in names if number % 2 else names[::-1]:
                attempt = partial(_run, stage, common, number, contestant)
                runs.append(await stage.undisturbed(f"read{number}-{names.index(contestant)}", attempt))
    report = reported("reading", runs, rounds=stage.size.rounds)
    cpu = {
        name: {run.round: run.cpu_s / run.events * 1e6 for run in runs if run.counts and run.contestant == name}
        for name in COMMANDS
    }
    report.figures = [
        Figure(f"CPU of reading vs {SAME}", ratios(cpu[OURS], cpu[SAME]), ",.2f", at_most(1.2)),
        Figure(f"CPU of reading vs {BARE}", ratios(cpu[OURS], cpu[BARE]), ",.2f", at_most(3.0)),
        *(Figure(f"{name}: CPU us/event", list(found.values()), ",.2f") for name, found in cpu.items()),
        *(Figure(f"{name}: events/s", list(rates(runs, name).values()), ",.0f") for name in COMMANDS),
    ]
    return report


async def _run(stage: Stage, common: Round, number: int, contestant: str, name: str) -> Run:
    environment = {
        "KAFKA_BOOTSTRAP_SERVERS": stage.kafka.bootstrap,
        "INPUT_TOPIC": common.topics.of(events.STATUS_CHANGED),
        "EXPECTED": str(len(common.draws)),
        "MODE": MODES[contestant],
        "GROUP_ID": name,
    }
    process = Contestant(name, stage.directory / name, COMMANDS[contestant], environment)
    busy_s, begun = others_s(), time.monotonic()
    process.start()
    try:
        code = await process.ended(DEADLINE_S)
        busy_s, seconds = others_s() - busy_s, time.monotonic() - begun
        said = process.last_lines(1)
    finally:
        process.stop()
    problems = []
    found = {"events": 0, "cpu_s": 0.0, "seconds": 1.0, "campaigns": 0}
    if code == 0:
        found = json.loads(said)
    else:
        problems.append(f"ended with {code}: {said}")
    if found["events"] != len(common.draws) or found["campaigns"] != len(set(common.draws)):
        problems.append(f"read {found['events']} events of {found['campaigns']} campaigns")
    return Run(
        contestant,
        number,
        max(1, int(found["events"])),
        found["seconds"],
        found["cpu_s"],
        0.0,
        busy_s / seconds,
        problems,
    )


async def main() -> None:
    """Read INPUT_TOPIC as the service does until EXPECTED events; says in one JSON line what it took."""
    expected = int(os.environ["EXPECTED"])
    connection = Connection(os.environ["KAFKA_BOOTSTRAP_SERVERS"], {})
    source = Source(
        connection, [os.environ["INPUT_TOPIC"]], os.environ["GROUP_ID"], fetch_max_wait_ms=100, revocation_s=5
    )
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)
    hints = Hints()
    count = 0
    begun = cpu_s = 0.0
    await source.start(_nothing, lambda _: None)
    while count < expected:
        batches, _ = await source.poll()
        if batches and not count:
            begun, cpu_s = time.monotonic(), time.process_time()
        for batch in batches:
            plain, others = hints.collect(batch.records)
            count += plain + len(others)
    spent = {"cpu_s": time.process_time() - cpu_s, "seconds": time.monotonic() - begun}
    await source.stop(5)
    print(json.dumps({"events": count, "campaigns": len(hints.settled()), **spent}))


async def _nothing() -> None:
    """No work is under way when partitions are taken."""


if __name__ == "__main__":
    asyncio.run(main())
