"""One, two and three processes on three brokers: what holds of the model in deploy/scaling.md on this machine."""

from dataclasses import replace
from functools import partial
from typing import Final

from tests.benchmarks.drain import service_run, warm_up
from tests.benchmarks.report import Figure, Report, ratios
from tests.benchmarks.stage import Run, Stage, rates, reported
from tests.servers import ApacheCluster

NAMES: Final = {1: "one process, 3 brokers", 2: "two processes, 3 brokers", 3: "three processes, 3 brokers"}
PARTITIONS: Final = 6
REPLICAS: Final = 3
DELAY: Final = {"group.initial.rebalance.delay.ms": "1500"}  # all members join in one rebalance


async def measure(stage: Stage) -> Report:
    """Each once a round, in another order every round; every record is on three brokers before it counts."""
    brokers = ApacheCluster(stage.directory / "cluster", {1: 0, 2: 0, 3: 0}, DELAY)
    for node in brokers.nodes.values():
        node.secured, node.ports = {}, {}
        node.properties.pop("advertised.listeners", None)
    runs: list[Run] = []
    try:
        brokers.start()
        on_three = replace(stage, kafka=brokers, replication=REPLICAS, template_name="cluster", before=None, ids=())
        for number in range(1, stage.size.rounds + 1):
            async with on_three.round(number, seed=800 + number) as common:
                if number == 1:
                    await warm_up(on_three, common)
                for processes in (1, 2, 3) if number % 2 else (3, 2, 1):
                    attempt = partial(service_run, on_three, common, processes=processes, contestant=NAMES[processes])
                    runs.append(await stage.undisturbed(f"c{number}-{processes}", attempt))
        await on_three.forget()
    finally:
        brokers.stop()
    report = reported("cluster", runs)
    found = {processes: rates(runs, name) for processes, name in NAMES.items()}
    report.figures = [
        Figure("3 brokers: two processes vs one", ratios(found[2], found[1])),
        Figure("3 brokers: three processes vs one", ratios(found[3], found[1])),
        *(Figure(f"{NAMES[processes]}: hints/s", list(mine.values()), ",.0f") for processes, mine in found.items()),
        *(_host_cpu(runs, name) for name in NAMES.values()),
    ]
    return report


def _host_cpu(runs: list[Run], name: str) -> Figure:
    spent = [
        (run.cpu_s + run.postgres_s + run.kafka_s) / run.events * 1e6
        for run in runs
        if run.counts and run.contestant == name
    ]
    return Figure(f"{name}: CPU us/hint, whole host", spent, ",.1f")
