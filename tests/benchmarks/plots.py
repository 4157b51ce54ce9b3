"""Draw growth.svg from what `make bench-long` wrote: time per hint, time per recount and memory over each axis.

Needs matplotlib, which is in the peers' environment: `make bench-plots` starts it there. Of bench-long.json and
bench-long-part.json it takes the newer one that tells of growth.
"""

import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("svg")
mpl.rcParams.update({"svg.hashsalt": "campaign-stats", "font.size": 8, "svg.fonttype": "none"})

import matplotlib.pyplot as plt  # noqa: E402  # after the backend was chosen
from matplotlib.ticker import NullFormatter  # noqa: E402

HERE = Path(__file__).parent
ROWS = (
    ("us per hint", lambda run: run["seconds"] / run["events"] * 1e6),
    ("us per recount (in its transaction)", lambda run: run["recount_s"] / max(1, run["recounts"]) * 1e6),
    ("highest resident MB", lambda run: run["peak_mb"]),
)


def newest(folder: Path) -> Sequence[Mapping[str, Any]]:
    """The runs of growth that were written last. Raises SystemExit when there are none."""
    for file in sorted(folder.glob("bench-long*.json"), key=lambda file: file.stat().st_mtime, reverse=True):
        if growth := json.loads(file.read_text())["measures"].get("growth"):
            return [run for run in growth["runs"] if run["counts"]]
    raise SystemExit(f"plots: no file in {folder} tells of growth: run `make bench-long ONLY=growth` first")


def draw(runs: Sequence[Mapping[str, Any]], picture: Path) -> None:
    """One column for each axis, one row for each cost; a dot for each run, the line through the medians."""
    axes = list(dict.fromkeys(run["axis"] for run in runs))
    figure, grid = plt.subplots(
        len(ROWS), len(axes), figsize=(2.6 * len(axes), 2.2 * len(ROWS)), squeeze=False, layout="constrained"
    )
    for row, (label, cost) in enumerate(ROWS):
        for column, axis in enumerate(axes):
            _draw(grid[row][column], [run for run in runs if run["axis"] == axis], cost)
            grid[row][column].set_xlabel(axis if row == len(ROWS) - 1 else "")
            grid[row][column].set_ylabel(label if column == 0 else "")
    figure.savefig(picture, metadata={"Date": None, "Creator": None})


def _draw(plot: Any, runs: Sequence[Mapping[str, Any]], cost: Any) -> None:
    by_x: dict[float, list[float]] = {}
    for run in runs:
        by_x.setdefault(run["x"], []).append(cost(run))
    points = sorted(by_x.items())
    plot.plot([x for x, _ in points], [statistics.median(found) for _, found in points], color="#1f6feb")
    plot.plot(
        [x for x, found in points for _ in found], [y for _, found in points for y in found], ".", color="#1f6feb"
    )
    plot.set_xscale("log")
    plot.xaxis.set_minor_formatter(NullFormatter())
    plot.set_ylim(bottom=0)
    plot.grid(visible=True, alpha=0.3)


if __name__ == "__main__":
    draw(newest(Path(sys.argv[1])), HERE / "growth.svg")
