"""Looks for seeds whose histories find a breakage: `python -m tests.faults.seeds NAME...`; without names, for all."""

import asyncio
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from consumer import migrations
from consumer.demo.servers import Postgres
from tests.faults.arena import Arena
from tests.faults.breakages import BREAKAGES, Breakage
from tests.faults.machine import EXAMPLES, play, small_and_impatient
from tests.faults.model import Violation

QUICK: Final = 6  # examples in which a recorded seed finds its breakage


def find_seed(arena: Arena, breakage: Breakage, *, most: int = 40) -> int | None:
    """The first seed that finds the breakage within a few examples, or else within more; None when none does."""
    for examples in (QUICK, EXAMPLES):
        for seed in range(1, most + 1):
            begun = time.monotonic()
            try:
                with breakage.applied(arena):
                    play(arena, seed, examples)
            except Violation as found:
                if re.search(breakage.finding, str(found)):
                    print(f"{breakage.name}: {seed}  # {time.monotonic() - begun:.1f} s: {found}", flush=True)
                    return seed
    return None


def main(names: Sequence[str]) -> int:
    """Look for seeds; 1 when a breakage is not found, 2 when there is none of that name."""
    if unknown := set(names) - {breakage.name for breakage in BREAKAGES}:
        print(f"no such breakage: {', '.join(sorted(unknown))}", file=sys.stderr)
        return 2
    wanted = [breakage for breakage in BREAKAGES if not names or breakage.name in names]
    with tempfile.TemporaryDirectory(prefix="cs-") as directory:
        Path(directory).chmod(0o755)  # PostgreSQL may run as another account
        server = Postgres(Path(directory) / "pg", options={"fsync": "off"})
        try:
            server.start()
            asyncio.run(migrations.migrate(server.url(), reference_schema=True))
            arena = Arena(server.url())
            with small_and_impatient():
                missed = [breakage.name for breakage in wanted if find_seed(arena, breakage) is None]
            arena.close()
        finally:
            server.stop()
    for name in missed:
        print(f"{name}: not found")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
