"""Two processes of one group beside one, on the same backlog."""

from functools import partial
from typing import Final

from tests.benchmarks.drain import ask, service_run
from tests.benchmarks.report import Figure, Report, at_least, ratios
from tests.benchmarks.stage import Run, Stage, rates, reported

FLOOR: Final = 0.95
NAMES: Final = {1: "one process", 2: "two processes"}


async def measure(stage: Stage) -> Report:
    """Each once a round, the order reversed every round."""
    runs: list[Run] = []
    for number in range(1, stage.size.rounds + 1):
        async with stage.round(number, seed=200 + number) as common:
            asked = await ask(stage, common)
            for processes in (1, 2) if number % 2 else (2, 1):
                attempt = partial(
                    service_run, stage, common, processes=processes, contestant=NAMES[processes], asked=asked
                )
                runs.append(await stage.undisturbed(f"p{number}-{processes}", attempt))
    report = reported("processes", runs, rounds=stage.size.rounds)
    one, two = (rates(runs, name) for name in NAMES.values())
    report.figures = [
        Figure("two processes vs one: hints/s", ratios(two, one), ",.2f", at_least(FLOOR)),
        Figure("one process: hints/s", list(one.values()), ",.0f"),
        Figure("two processes: hints/s", list(two.values()), ",.0f"),
    ]
    return report
