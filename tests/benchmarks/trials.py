"""Several contestants in turn, round after round, and what their runs say: common to all that is no drain."""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial

from tests.benchmarks.report import Report
from tests.benchmarks.stage import Run, Stage


@dataclass(frozen=True, slots=True)
class Trial(Run):
    """A run that is about more than events per second: its figures are `values`, each under its name."""

    values: Mapping[str, float] = field(default_factory=dict)

    def line(self) -> str:
        """For the screen, once it is over."""
        said = "  ".join(f"{name} {value:,.4g}" for name, value in self.values.items())
        return f"{Run.line(self)}  {said}"


Attempt = Callable[[int, str], Awaitable[Trial]]
"""One run in a round, under a name that no other run has."""


async def undisturbed(stage: Stage, name: str, attempt: Callable[[str], Awaitable[Trial]]) -> Trial:
    """As the stage does it, for trials."""
    tried: list[Trial] = []

    async def once(name: str) -> Run:
        tried.append(await attempt(name))
        return tried[-1]

    await stage.undisturbed(name, once)
    return tried[-1]


async def interleaved(stage: Stage, name: str, rounds: int, contestants: Mapping[str, Attempt]) -> list[Trial]:
    """Each contestant once a round, the order reversed every round."""
    trials = []
    for number in range(1, rounds + 1):
        attempts = list(contestants.values())
        for place, attempt in enumerate(attempts if number % 2 else reversed(attempts)):
            trials.append(await undisturbed(stage, f"{name}{number}-{place}", partial(attempt, number)))
    return trials


def counted(trials: Sequence[Trial], contestant: str, value: str) -> dict[int, float]:
    """Round -> this value of this contestant, where its run counts."""
    return {trial.round: trial.values[value] for trial in trials if trial.counts and trial.contestant == contestant}


def report_of(measure: str, stage: Stage, trials: Sequence[Trial]) -> Report:
    """Everything but the figures."""
    return Report(
        measure,
        rounds=stage.size.rounds,
        runs=[{**asdict(trial), "counts": trial.counts} for trial in trials],
        problems=[f"{trial.contestant} in round {trial.round}: {why}" for trial in trials for why in trial.problems],
    )
