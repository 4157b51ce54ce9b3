"""How cost grows: one thing at a time is changed, everything else stays as in the drain.

Every point is a drain like any other (same clock, same proof). Read by `plots`, which draws and fits.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final

from tests.benchmarks.drain import service_run
from tests.benchmarks.report import Figure, Report
from tests.benchmarks.stage import Run, Size, Stage, reported

HINTS: Final = 300_000
CAMPAIGNS: Final = 2_000
PROSPECTS: Final = 300
PARTITIONS: Final = 6
HINT_BYTES: Final = 435  # of a hint without padding (workload)
REPEATS: Final = 2


@dataclass(frozen=True, slots=True)
class Point:
    """One place on one curve."""

    axis: str
    campaigns: int = CAMPAIGNS
    prospects: int = PROSPECTS
    hints: int = HINTS
    partitions: int = PARTITIONS
    dirty: float = 1.0
    pad: int = 0

    @property
    def x(self) -> float:
        """Where it stands on its axis."""
        return {
            "hints": self.hints,
            "campaigns": self.campaigns,
            "prospects per campaign": self.prospects,
            "partitions": self.partitions,
            "share of dirty campaigns": self.dirty,
            "bytes of a hint": HINT_BYTES + self.pad,
        }[self.axis]


POINTS: Final = (
    *(Point("hints", hints=hints) for hints in (30_000, 100_000, 300_000, 1_000_000, 2_000_000)),
    *(Point("partitions", partitions=partitions) for partitions in (1, 3, 6, 12, 24)),
    *(Point("share of dirty campaigns", dirty=dirty) for dirty in (0.01, 0.03, 0.1, 0.3, 1.0)),
    *(Point("bytes of a hint", pad=pad) for pad in (0, 565, 1_565, 3_565, 7_565)),
    *(Point("campaigns", campaigns=campaigns, prospects=60) for campaigns in (200, 1_000, 5_000, 20_000, 50_000)),
    *(Point("prospects per campaign", prospects=prospects) for prospects in (10, 30, 100, 300, 1_000)),
)


async def measure(stage: Stage) -> Report:
    """Every point REPEATS times, all once and then all again; template databases are dropped when done with."""
    runs: list[Run] = []
    points: list[dict[str, Any]] = []
    for (campaigns, prospects), mine in _by_template().items():
        template = _with_template(stage, campaigns, prospects)
        for repeat in range(REPEATS):
            for number, point in enumerate(mine):
                seed = 500 + repeat * len(mine) + number
                async with template.round(
                    repeat + 1, seed=seed, hints=point.hints, of=point.dirty, pad=point.pad, partitions=point.partitions
                ) as common:
                    attempt = partial(service_run, template, common, contestant=f"{point.axis} {point.x:g}")
                    run = await stage.undisturbed(f"g{campaigns}-{prospects}-{seed}", attempt)
                runs.append(run)
                points.append({"axis": point.axis, "x": point.x, "campaigns": campaigns, "run": len(runs) - 1})
        await template.forget()
    report = reported("growth", runs, rounds=1)
    report.runs = [{**point, **report.runs[point["run"]]} for point in points]
    for axis in dict.fromkeys(point.axis for point in POINTS):
        us = [run["seconds"] / run["events"] * 1e6 for run in report.runs if run["axis"] == axis and run["counts"]]
        report.figures.append(Figure(f"us per hint, over {axis}", us, ",.1f"))
    return report


def _by_template() -> dict[tuple[int, int], list[Point]]:
    found: dict[tuple[int, int], list[Point]] = {}
    for point in POINTS:
        found.setdefault((point.campaigns, point.prospects), []).append(point)
    return found


def _with_template(stage: Stage, campaigns: int, prospects: int) -> Stage:
    """The same servers with a template of its own."""
    return replace(
        stage,
        size=Size(campaigns, HINTS, REPEATS),
        prospects=(round(prospects * 0.8), round(prospects * 1.2)),
        template_name=f"growth{campaigns}x{prospects}-",
        ids=(),
        before=None,
    )
