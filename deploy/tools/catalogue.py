"""deploy/metrics.md: every metric, as the code tells of it."""

from collections.abc import Iterable, Sequence
from functools import cache
from typing import Final

from prometheus_client import CollectorRegistry, generate_latest

from consumer.metrics import Entry, Metrics
from deploy.tools.programs import ROOT, debian, run

DOCUMENT: Final = ROOT / "deploy" / "metrics.md"
HOW_TO_WRITE: Final = "make deploy-files"
MOST_SERIES: Final = 1_000  # of one process, without the partitions it reads

HEAD: Final = """\
# Metrics

Written from `consumer/metrics.py` by `make deploy-files`. They are at `/metrics` of port `CAMPAIGN_STATS_HTTP_PORT`.
All series but those of partitions are there from the start, at 0, so that a rate is right from the first event on. No
label holds an id of a campaign, a user or a prospect: one process has {series} series, buckets counted, and one more
for each partition that it reads. Beside them stand the usual ones of the process (`process_*`, `python_*`).

With an OpenTelemetry SDK `campaign_stats_event_delay_seconds` carries exemplars (`trace_id`) of sampled traces;
Prometheus keeps them with `--enable-feature=exemplar-storage`.

"""


@cache
def catalogue() -> Sequence[Entry]:
    """Every metric of the service, in the order of the code."""
    return tuple(Metrics(CollectorRegistry()).catalogue)


def exposition() -> str:
    """What a new process shows at /metrics of its own series, with one partition assigned."""
    metrics = Metrics(CollectorRegistry())
    metrics.lag.labels("prospect.status-changed", "0").set(0)
    return generate_latest(metrics.registry).decode()


def series() -> int:
    """Series of one process that reads no partition; `_created` ones, which nothing here asks for, are not counted."""
    lines = generate_latest(Metrics(CollectorRegistry()).registry).decode().splitlines()
    return sum(not line.startswith("#") and "_created" not in line for line in lines)


def names(entry: Entry) -> list[str]:
    """The names under which queries ask for it."""
    if entry.kind == "counter":
        return [f"{entry.name}_total"]
    if entry.kind == "histogram":
        return [f"{entry.name}_bucket", f"{entry.name}_sum", f"{entry.name}_count"]
    return [entry.name]


def text() -> str:
    """The document."""
    rows = "".join(_row(entry) for entry in catalogue())
    table = "| metric | kind, unit | what it says | look at it when |\n|---|---|---|---|\n" + rows
    return HEAD.format(series=series()) + table + "\n## Labels\n\n" + "".join(_labels())


def _row(entry: Entry) -> str:
    name = f"{entry.name}_total" if entry.kind == "counter" else entry.name
    labels = "{" + ", ".join(entry.labels) + "}" if entry.labels else ""
    cells = (f"`{name}{labels}`", f"{entry.kind}, {entry.unit}", entry.meaning, entry.look)
    return "| " + " | ".join(cells) + " |\n"


def _labels() -> Iterable[str]:
    told: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for entry in catalogue():
        for label, values in entry.labels.items():
            told.setdefault((label, tuple(values or ())), []).append(entry.name)
    yield "| label | of | values |\n|---|---|---|\n"
    for (label, values), owners in told.items():
        shown = ", ".join(f"`{value}`" for value in values) or "of the partitions that this process reads"
        yield f"| `{label}` | {', '.join(f'`{owner}`' for owner in owners)} | {shown} |\n"


def problems() -> list[str]:
    """Where the document is not what the code says, or promtool finds fault with what a scrape gets."""
    found = []
    if not DOCUMENT.exists() or DOCUMENT.read_text() != text():
        found.append(f"{DOCUMENT.relative_to(ROOT)} is not what consumer/metrics.py says: {HOW_TO_WRITE}")
    if series() > MOST_SERIES:
        found.append(f"one process has {series()} series, more than {MOST_SERIES}: take a label away")
    return found


def promtool_problems() -> list[str]:
    """What `promtool check metrics` says."""
    code, said = run(debian("promtool", "prometheus"), "check", "metrics", accepts=exposition())
    return said.splitlines() if code != 0 or said else []
