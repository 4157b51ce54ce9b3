"""What a measurement says: figures with median and spread, their limits, and everything that went wrong."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from rich import box
from rich.table import Table

ENOUGH: Final = 3  # rounds that must count before a ratio may be compared with its limit


@dataclass(frozen=True, slots=True)
class Limit:
    """What the median must keep. `is_aim`: missing it is said and fails nothing."""

    value: float
    is_floor: bool
    is_aim: bool = False

    def holds(self, median: float) -> bool:
        """Whether the median keeps it."""
        return median >= self.value if self.is_floor else median <= self.value

    def __str__(self) -> str:
        """As it stands in the table."""
        return f"{'aim ' if self.is_aim else ''}{'>=' if self.is_floor else '<='} {self.value:g}"


def at_least(value: float, *, is_aim: bool = False) -> Limit:
    """A floor."""
    return Limit(value, is_floor=True, is_aim=is_aim)


def at_most(value: float) -> Limit:
    """A ceiling."""
    return Limit(value, is_floor=False)


@dataclass(frozen=True, slots=True)
class Figure:
    """One line of the table: a value for each round that counts. Without a limit it is true of one machine only."""

    name: str
    values: Sequence[float]
    form: str = ",.2f"
    limit: Limit | None = None

    def spread(self) -> dict[str, float]:
        """Median, lowest and highest; empty without values."""
        if not self.values:
            return {}
        return {"median": statistics.median(self.values), "min": min(self.values), "max": max(self.values)}


@dataclass(slots=True)
class Report:
    """What one measurement found. `problems`: runs that were wrong; they make the whole command fail.

    `rounds`: how many values a figure with a limit must have.
    """

    measure: str
    figures: list[Figure] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    runs: list[Mapping[str, Any]] = field(default_factory=list)
    rounds: int = ENOUGH
    seconds: float = 0.0

    def failures(self) -> list[str]:
        """Why this measurement does not pass; empty when it does."""
        found = [f"{self.measure}: INVALID, does not count: {problem}" for problem in self.problems]
        for figure in self.figures:
            if figure.limit is None:
                found += [] if figure.values else [f"{figure.name}: no run counts"]
                continue
            if len(figure.values) < self.rounds:
                found.append(f"{figure.name}: only {len(figure.values)} of {self.rounds} rounds count")
            elif not figure.limit.is_aim and not figure.limit.holds(statistics.median(figure.values)):
                median = format(statistics.median(figure.values), figure.form)
                found.append(f"{figure.name}: {median}, the limit is {figure.limit}")
        return found

    def document(self) -> dict[str, Any]:
        """As written to build/bench.json."""
        return {
            "seconds": round(self.seconds, 1),
            "figures": {
                figure.name: {
                    **figure.spread(),
                    "values": list(figure.values),
                    "limit": None if figure.limit is None else str(figure.limit),
                }
                for figure in self.figures
            },
            "runs": self.runs,
            "failures": self.failures(),
        }


def ratios(above: Mapping[int, float], below: Mapping[int, float]) -> list[float]:
    """Round by round the first over the second, where both count."""
    return [above[number] / below[number] for number in sorted(above.keys() & below.keys())]


def table(reports: Sequence[Report]) -> Table:
    """All figures; ratios were taken within a round."""
    printed = Table(box=box.ASCII, title="valid and undisturbed runs only; ratios within a round")
    for column in ("measure", "median", "min", "max", "limit", ""):
        printed.add_column(column, justify="left" if column == "measure" else "right", no_wrap=column != "measure")
    for report in reports:
        for figure in report.figures:
            spread = [format(value, figure.form) for value in figure.spread().values()] or ["-", "-", "-"]
            verdict = ""
            if figure.limit is not None and figure.values:
                verdict = "" if figure.limit.holds(statistics.median(figure.values)) else "MISSED"
            printed.add_row(figure.name, *spread, str(figure.limit or ""), verdict)
        printed.add_section()
    return printed
