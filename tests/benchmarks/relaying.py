"""Emptying an outbox: the service, the same without idempotence, and a publisher that works row by row.

The clock starts with the last look (every 10 ms, at the topic's ends) that found nothing published, and stops when the
table is empty. No hints come meanwhile, and starting up does not count. Rows are news of ca. 1 kB, of 10 000 campaigns.
"""

import sys
from collections.abc import Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from typing import Final

from schemas import events
from schemas.topics import Topics
from tests.benchmarks import outbox, workload
from tests.benchmarks.report import ENOUGH, Figure, Report, at_least, ratios
from tests.benchmarks.stage import PEERS, Contestant, Stage, others_s, stopped
from tests.benchmarks.trials import Trial, counted, interleaved, report_of

ROWS: Final = 100_000
PEER_ROWS: Final = 3_000
START_DEADLINE_S: Final = 60.0
DEADLINE_S: Final = 120.0
BY_ROW_FLOOR: Final = 15.0
IDEMPOTENCE_FLOOR: Final = 0.85
SERVICE, CARELESS, BY_ROW = "service", "service without idempotence", "row by row"


@dataclass(frozen=True, slots=True)
class Way:
    """`idempotence`: of the service; None is the peer."""

    rows: int
    idempotence: bool | None

    def process(self, stage: Stage, name: str, topics: Topics, url: str) -> Contestant:
        """Not started yet."""
        if self.idempotence is not None:
            setting = str(self.idempotence).lower()
            return stage.service(
                f"{name}-service", topics.prefix, name, name, CAMPAIGN_STATS_PRODUCER_IDEMPOTENCE=setting
            )
        return Contestant(
            f"{name}-peer",
            stage.directory / f"{name}-peer",
            [sys.executable, str(PEERS / "relay_by_row.py")],
            {
                "DATABASE_URL": url,
                "KAFKA_BOOTSTRAP_SERVERS": stage.kafka.bootstrap,
                "OUTPUT_TOPIC": topics.of(events.STATS_UPDATED),
            },
        )


WAYS: Final[Mapping[str, Way]] = {
    SERVICE: Way(ROWS, idempotence=True),
    BY_ROW: Way(PEER_ROWS, idempotence=None),
    CARELESS: Way(ROWS, idempotence=False),
}


async def measure(stage: Stage) -> Report:
    """Each once a round, the order reversed every round."""
    for count in {way.rows for way in WAYS.values()}:
        await outbox.make(stage, _base(count), count)
    trials = await interleaved(
        stage, "relaying", ENOUGH, {name: partial(_run, stage, name, way) for name, way in WAYS.items()}
    )
    for count in {way.rows for way in WAYS.values()}:
        await workload.drop(stage.postgres.url(), _base(count))
    report = report_of("relaying", stage, trials)
    rates = {name: counted(trials, name, "rows/s") for name in WAYS}
    report.figures = [
        Figure("relay vs row by row: rows/s", ratios(rates[SERVICE], rates[BY_ROW]), ",.1f", at_least(BY_ROW_FLOOR)),
        Figure(
            "relay, idempotence on vs off: rows/s",
            ratios(rates[SERVICE], rates[CARELESS]),
            limit=at_least(IDEMPOTENCE_FLOOR),
        ),
    ]
    for name in WAYS:
        report.figures.append(Figure(f"relay, {name}: rows/s", list(rates[name].values()), ",.0f"))
        cpu = counted(trials, name, "CPU us/row")
        report.figures.append(Figure(f"relay, {name}: CPU us/row", list(cpu.values()), ",.1f"))
    return report


def _base(count: int) -> str:
    return f"outbox{count}"


async def _run(stage: Stage, contestant: str, way: Way, number: int, name: str) -> Trial:
    async with AsyncExitStack() as stack:
        topics = await stack.enter_async_context(stage.topics(f"{name}."))
        url = await stack.enter_async_context(outbox.copied(stage, name, _base(way.rows)))
        db = await stack.enter_async_context(workload.connected(url))
        topic = topics.of(events.STATS_UPDATED)
        published = await stack.enter_async_context(outbox.looking(stage.kafka.bootstrap, topic))
        process = way.process(stage, name, topics, url)
        try:
            process.start()
            begun = await outbox.reached(published, 1, process, START_DEADLINE_S)
            cpu_s, busy_s = process.cpu_s(), others_s()
            await outbox.reached(published, way.rows, process, DEADLINE_S)
            ended = await outbox.emptied(db, process, DEADLINE_S)
            cpu_s, busy_s = process.cpu_s() - cpu_s, others_s() - busy_s
            problems = await stopped([process])
        finally:
            process.stop()
        problems += await outbox.misled(stage.kafka.bootstrap, topic, way.rows)
        seconds = ended - begun
        return Trial(
            contestant,
            number,
            way.rows,
            seconds,
            cpu_s,
            process.peak_mb,
            busy_s / seconds,
            problems,
            published=await published(),
            values={"rows/s": way.rows / seconds, "CPU us/row": cpu_s / way.rows * 1e6},
        )
