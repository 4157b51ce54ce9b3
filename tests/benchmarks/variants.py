"""The service with one thing changed: `python -m tests.benchmarks.variants NAME run ...`, else as `campaign-stats run`.

A name that is not there is an error, so no variant outlives the code it changes.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from importlib import import_module
from typing import Final

NEVER: Final = 2**53  # prospects


@dataclass(frozen=True, slots=True)
class Variant:
    """`changes`: `module:qualified.name` -> what stands there instead."""

    sentence: str
    changes: Mapping[str, object]

    def apply(self) -> None:
        """Change this process for good."""
        for place, new in self.changes.items():
            module, _, path = place.partition(":")
            *owners, name = path.split(".")
            owner = reduce(getattr, owners, import_module(module))
            if type(vars(owner).get(name)) is not type(new):
                raise SystemExit(f"{place} is not there, or something else: mend the variant")
            setattr(owner, name, new)


def _asleep(relay: object) -> None:
    """In place of a method that wakes."""


VARIANTS: Final[Mapping[str, Variant]] = {
    "polling": Variant(
        "The relay is never woken after a commit, it looks every 100 ms.",
        {"consumer.relay:Relay.wake": _asleep, "consumer.relay:POLL_S": 0.1, "consumer.relay:SOON_S": 0.1},
    ),
    "never-huge": Variant(
        "No campaign is too large for a chunk; goes with a database whose function thinks so too.",
        {"consumer.outcome:HUGE_PROSPECTS": NEVER},
    ),
}


def command(name: str) -> tuple[str, ...]:
    """What stands before `run` to start this variant."""
    if name not in VARIANTS:
        raise KeyError(name)
    return ("-m", "tests.benchmarks.variants", name)


def main() -> None:
    """Change one thing, then be the service."""
    VARIANTS[sys.argv.pop(1)].apply()
    from consumer.__main__ import main as service

    service()


if __name__ == "__main__":
    main()
