"""What py-spy saw: shares of CPU by step and by line, and flame graphs."""

import html
import linecache
import re
from asyncio import selector_events
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

HOTTEST: Final = 15
# Step -> a frame that only it has, the first that fits a stack counts: file, functions ("" = all of that file).
STEPS: Final = (
    ("save", "consumer/database/", "save _save _deferral _to_json _to_microseconds"),
    ("recount: ask, and make Recounts of the rows", "consumer/database/", "recount _recount"),
    ("guard", "consumer/recount.py", "_guard"),
    ("decide, encode events", "consumer/outcome.py", "decide"),
    ("relay: publish", "consumer/relay.py", "_send"),
    ("relay: SQL and the rest", "consumer/relay.py", ""),
    ("decode, validate, collect", "consumer/pipeline.py", "_collect"),
    ("poll: parse and hand out records", "consumer/broker/source.py", "poll"),
    ("commit offsets", "consumer/broker/source.py", "commit"),
    ("flush: BEGIN, COMMIT and the rest", "consumer/pipeline.py", "flush_for_ever"),
    ("fetch loop: the rest", "consumer/pipeline.py", ""),
    ("gauges", "consumer/service.py", "_sample"),
    ("deferred worker", "consumer/deferred.py", ""),
    ("client: fetches, heartbeats, produce requests", "aiokafka/", ""),
    ("client: fetches, heartbeats, produce requests", "asyncio/streams.py", ""),
    ("rows of PostgreSQL decoded (asyncpg)", "consumer/database/", "_from_microseconds"),
)
SOCKETS: Final = {"recv(": "sockets: recv", "data_received(": "rows of PostgreSQL decoded (asyncpg)"}
EVENT_LOOP: Final = "event loop"
OTHER: Final = "other"
COLOURS: Final = (
    ("consumer/", "#6ea8fe"), ("aiokafka/", "#f2a65a"), ("asyncpg/", "#7cc47f"), ("asyncio/", "#c9ced6"),
)  # fmt: skip


FRAME: Final = re.compile(r"(?P<function>.*) \((?P<file>[^()]*?)(?::(?P<line>\d+))?\)")


@dataclass(frozen=True, slots=True)
class Frame:
    """A place in the code; `file` relative to its package's parent, so that it names no machine."""

    function: str
    file: str
    line: int

    @property
    def name(self) -> str:
        """As shown: without the line."""
        return f"{self.function} ({self.file})" if self.file else self.function


@dataclass(slots=True)
class Stacks:
    """What py-spy saw, from the callback that the event loop runs down to the line: stack -> samples.

    Without those in the selector: it takes a loop that has just been woken, or waits for a core, for one that runs.
    """

    counts: Counter[tuple[Frame, ...]] = field(default_factory=Counter)
    waiting: int = 0

    @classmethod
    def read(cls, raw: str) -> "Stacks":
        """From py-spy's raw format: frames apart by semicolons, then how often."""
        stacks = cls()
        for line in raw.splitlines():
            path, _, count = line.rpartition(" ")
            frames = [_frame(part) for part in path.split(";")]
            if frames[-1].file == "selectors.py":
                stacks.waiting += int(count)
                continue
            ends = [place for place, frame in enumerate(frames) if frame.file == "asyncio/events.py"]
            loop = [place for place, frame in enumerate(frames) if frame.function.endswith("_run_once")]
            first = ends[0] + 1 if ends else loop[0] if loop else 0
            # A callback without a frame in Python stays as the loop's own frame.
            stacks.counts[tuple(frames[first:]) or (frames[-1],)] += int(count)
        return stacks

    @property
    def samples(self) -> int:
        """How many."""
        return sum(self.counts.values())

    def steps(self) -> dict[str, float]:
        """Step -> its share, the largest first."""
        found: Counter[str] = Counter()
        for stack, count in self.counts.items():
            found[_step(stack)] += count
        return {step: count / self.samples for step, count in found.most_common()}

    def lines(self) -> dict[str, float]:
        """The lines that most samples were in themselves -> their share."""
        found: Counter[str] = Counter()
        for stack, count in self.counts.items():
            found[f"{stack[-1].file}:{stack[-1].line} {stack[-1].function}"] += count
        return {line: count / self.samples for line, count in found.most_common(HOTTEST)}

    def flame(self, title: str) -> str:
        """As a picture, callers below; a frame that had less than a thousandth is left out."""
        root = Node("all")
        for stack, count in self.counts.items():
            root.add([frame.name for frame in stack], count)
        least = self.samples / 1000
        height = (root.depth(least) + 2) * ROW
        parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="monospace" '
            'font-size="11">',
            f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
            f'<text x="4" y="13">{html.escape(title)}; blue: this project, orange: aiokafka, green: asyncpg, grey: '
            "asyncio</text>",
        ]
        root.draw(parts, 0.0, height - ROW, WIDTH / max(1, self.samples), least)
        return "\n".join([*parts, "</svg>", ""])


def _frame(text: str) -> Frame:
    found = FRAME.fullmatch(text)
    if found is None:
        return Frame(text, "", 0)
    file = found["file"].partition("site-packages/")[2] or found["file"]
    if file.startswith("/"):
        file = "/".join(Path(file).parts[-2:])
    return Frame(found["function"], file, int(found["line"] or 0))


def _step(stack: Sequence[Frame]) -> str:
    for step, file, functions in STEPS:
        called = frozenset(functions.split())
        if any(
            frame.file.startswith(file) and (not functions or not called.isdisjoint(frame.function.split(".")))
            for frame in stack
        ):
            return step
    last = stack[-1]
    if last.file == "asyncio/selector_events.py":
        text = linecache.getline(selector_events.__file__, last.line)
        return next((step for part, step in SOCKETS.items() if part in text), EVENT_LOOP)
    return EVENT_LOOP if last.file.startswith(("asyncio/", "selectors")) else OTHER


WIDTH: Final = 1200
ROW: Final = 15
LETTER: Final = 6.7  # width of one


@dataclass(slots=True)
class Node:
    """A frame of the flame graph with those that it called."""

    name: str
    count: int = 0
    called: dict[str, "Node"] = field(default_factory=dict)

    def add(self, names: Sequence[str], count: int) -> None:
        """One stack more."""
        node = self
        node.count += count
        for name in names:
            node = node.called.setdefault(name, Node(name))
            node.count += count

    def depth(self, least: float) -> int:
        """Rows that it takes."""
        return 1 + max((node.depth(least) for node in self.called.values() if node.count >= least), default=0)

    def draw(self, parts: list[str], x: float, y: float, scale: float, least: float) -> None:
        """Add its rectangle and, above it, those of what it called."""
        width = self.count * scale
        colour = next((colour for prefix, colour in COLOURS if f"({prefix}" in self.name), "#e3d9b0")
        share = width / WIDTH
        label = self.name if len(self.name) * LETTER < width else self.name.partition(" (")[0]
        if len(label) * LETTER > width:
            label = label[: int(width / LETTER) - 1] + "." if width > 4 * LETTER else ""
        parts.append(
            f'<g><title>{html.escape(self.name)} {share:.1%}</title><rect x="{x:.1f}" y="{y}" width="{width:.1f}" '
            f'height="{ROW - 1}" fill="{colour}"/>'
            + (f'<text x="{x + 2:.1f}" y="{y + 11}">{html.escape(label)}</text>' if label else "")
            + "</g>"
        )
        for node in sorted(self.called.values(), key=lambda node: node.name):
            if node.count >= least:
                node.draw(parts, x, y - ROW, scale, least)
            x += node.count * scale
