"""The status page: what this process does right now, as HTML. Everything it shows is in memory already.

It shows ids of campaigns and counts; no name, no address, no setting, no text of an error.
"""

import base64
import hashlib
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from html import escape
from importlib.resources import files
from typing import Final, Protocol
from uuid import UUID

from prometheus_client import CollectorRegistry

from consumer.guard import BASIS_POINTS
from consumer.health import Health
from consumer.panels import PANELS, WINDOW_S, Panel

NOTE_EVERY_S: Final = 10.0  # a look at all series takes about a millisecond
LEAST_S: Final = 1.0  # a rate of less tells nothing
QUANTILES: Final = {"p50": 0.5, "p99": 0.99}

STYLE: Final = files("consumer.status").joinpath("page.css").read_text()
SCRIPT: Final = files("consumer.status").joinpath("page.js").read_text()

Labels = tuple[tuple[str, str], ...]
Series = dict[str, dict[Labels, float]]
"""Name of a sample -> its labels -> its value."""


def _allowed(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


HEADERS: Final = {
    "Content-Security-Policy": "default-src 'none'; connect-src 'self'; img-src data:; base-uri 'none'; "
    f"form-action 'none'; frame-ancestors 'none'; style-src {_allowed(STYLE)}; script-src {_allowed(SCRIPT)}",
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class Pause(Protocol):
    """A campaign that the guard paused, whichever replica did it."""

    @property
    def campaign_id(self) -> UUID: ...
    @property
    def paused_at(self) -> datetime: ...
    @property
    def sent(self) -> int: ...
    @property
    def bounced(self) -> int: ...
    @property
    def threshold_bp(self) -> int: ...


class Numbers:
    """All series of this process, now and over the last five minutes."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry
        self._noted: deque[tuple[float, Series]] = deque()
        self._since = time.monotonic()

    def note(self) -> None:
        """Remember the present values, at most every NOTE_EVERY_S."""
        now = time.monotonic()
        if self._noted and now - self._noted[-1][0] < NOTE_EVERY_S:
            return
        self._noted.append((now, self.read()))
        while now - self._noted[0][0] > WINDOW_S:
            self._noted.popleft()

    def read(self) -> Series:
        """The present values."""
        series: Series = {}
        for family in self._registry.collect():
            for sample in family.samples:
                series.setdefault(sample.name, {})[tuple(sorted(sample.labels.items()))] = sample.value
        return series

    def values(self, panels: Iterable[Panel], series: Series) -> list[tuple[Panel, dict[str, float]]]:
        """For each panel what its query would say of this process: value of its `by` label, or "", -> number.

        A quantile of nothing is missing.
        """
        now = time.monotonic()
        then, before = self._noted[0] if self._noted else (self._since, {})
        return [(panel, _folded(panel, series, before, max(LEAST_S, now - then))) for panel in panels]


def _folded(panel: Panel, series: Series, before: Series, seconds: float) -> dict[str, float]:
    if panel.fold in QUANTILES:
        buckets: dict[str, dict[float, float]] = {}
        name = f"{panel.metric}_bucket"
        for labels, value in series.get(name, {}).items():
            told = dict(labels)
            grown = value - before.get(name, {}).get(labels, 0.0)
            group = buckets.setdefault(told.get(panel.by or "", ""), {})
            edge = float(told["le"])
            group[edge] = group.get(edge, 0.0) + grown
        found = {group: _quantile(edges, QUANTILES[panel.fold]) for group, edges in buckets.items()}
        return {group: value for group, value in found.items() if value is not None}
    folded: dict[str, float] = {}
    name = f"{panel.metric}_total" if panel.fold == "rate" else panel.metric
    for labels, value in series.get(name, {}).items():
        group_name = dict(labels).get(panel.by or "", "")
        if panel.fold == "rate":
            value = (value - before.get(name, {}).get(labels, 0.0)) / seconds
        known = folded.get(group_name)
        folded[group_name] = value if known is None else max(known, value) if panel.fold == "max" else known + value
    return folded


def _quantile(edges: Mapping[float, float], share: float) -> float | None:
    """As Prometheus's histogram_quantile: linear inside a bucket, the last finite edge beyond. None of nothing."""
    ordered = sorted(edges.items())
    if not ordered or ordered[-1][1] <= 0:
        return None
    rank, below, lower = share * ordered[-1][1], 0.0, 0.0
    for edge, count in ordered:
        if count >= rank:
            if edge == float("inf"):
                return lower
            return lower + (edge - lower) * (rank - below) / (count - below) if count > below else edge
        below, lower = count, edge
    return lower


@dataclass(slots=True)
class Status:
    """What the page is made of. `pauses`: the latest ones, the newest first; None until they were read once."""

    version: str
    health: Health
    numbers: Numbers
    mode: str
    pauses: Sequence[Pause] | None = None
    started_at: float = field(default_factory=time.monotonic)

    def page(self) -> str:
        """The whole page."""
        return (
            '<!doctype html><html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
            f"<title>campaign-stats: {escape(self._headline()[0])}</title>"
            f"<style>{STYLE}</style></head><body>"
            f"{self._header()}<main>{self._main()}</main>"
            "<footer><p>Numbers of this process; waiting rows and pauses of all replicas. Rates and quantiles over the "
            'last five minutes. <a href="/metrics">Metrics</a></p></footer>'
            f"<script>{SCRIPT}</script></body></html>"
        )

    def _headline(self) -> tuple[str, str]:
        """In two or three words how it is, and how that looks: good, wait or wrong."""
        if self.health.stopping:
            return "shutting down", "wait"
        if (reason := self.health.not_ready) is not None:
            return reason, "wrong" if self.health.degraded else "wait"
        if degraded := self.health.degraded:
            return f"waiting for {' and '.join(degraded)}", "wrong"
        return "ready", "good"

    def _header(self) -> str:
        words, look = self._headline()
        up = _span(time.monotonic() - self.started_at)
        return (
            f"<header><h1>campaign-stats <small>{escape(self.version)}</small></h1>"
            f'<p id="state" role="status" class="{look}">{escape(words)}</p>'
            f'<p class="quiet">up <span id="up">{up}</span>, bounce guard: {escape(self.mode)}'
            '<span id="stale" hidden> · this page is not being updated</span></p></header>'
        )

    def _main(self) -> str:
        series = self.numbers.read()
        known = {(panel.group, panel.title): values for panel, values in self.numbers.values(PANELS, series)}
        letters = series.get("campaign_stats_dead_letters_total", {})
        by_reason = {dict(labels)["reason"]: value for labels, value in letters.items()}
        return self._now(known) + self._pauses() + _waiting(known) + _letters(by_reason) + _tables(known)

    def _now(self, known: Mapping[tuple[str, str], Mapping[str, float]]) -> str:
        lag = sum(known["In", "Lag"].values())
        recounts = sum(known["Recounts", "Campaigns recounted"].values())
        published = sum(known["Out", "Events published"].values())
        p99 = known["Out", "From hint to published event, p99"].get("news")
        facts = (
            ("Lag", f"{_count(lag)} records"),
            ("Recounted", f"{_rate(recounts)} campaigns/s"),
            ("Published", f"{_rate(published)} events/s"),
            ("Hint to news, p99", "nothing yet" if p99 is None else _seconds(p99)),
        )
        items = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts)
        return f'<section id="now"><h2>Right now</h2><p>{escape(self._doing(lag))}</p><dl>{items}</dl></section>'

    def _doing(self, lag: float) -> str:
        if self.health.stopping:
            return "It finishes what is under way, and ends."
        if self.health.degraded:
            return "Nothing is lost: hints wait in Kafka, events in the outbox. It goes on by itself."
        if self.health.not_ready is not None:
            return "It has not begun to read."
        return "It works off a backlog." if lag else "Everything that was read is counted; it waits for hints."

    def _pauses(self) -> str:
        if self.pauses is None:
            body = "<p>Not read from the database yet.</p>"
        elif not self.pauses:
            body = "<p>The bounce guard has paused no campaign.</p>"
        else:
            rows = [
                (
                    f"<code>{pause.campaign_id}</code>",
                    f"<time>{pause.paused_at.astimezone(UTC):%Y-%m-%d %H:%M:%S}</time>",
                    f"{pause.bounced} of {pause.sent}",
                    f"{_percent(pause.bounced * BASIS_POINTS // max(1, pause.sent))}",
                    _percent(pause.threshold_bp),
                )
                for pause in self.pauses
            ]
            body = _table("Last pauses", ("campaign", "paused (UTC)", "bounced", "rate", "limit"), rows)
        return f'<section id="pauses"><h2>Last pauses</h2>{body}</section>'


def _waiting(known: Mapping[tuple[str, str], Mapping[str, float]]) -> str:
    deferred = known["Put off", "Deferred rows"]
    rows = [(escape(reason), _count(number)) for reason, number in sorted(deferred.items()) if number]
    outbox = known["Out", "Events waiting"].get("", 0.0)
    aside = known["Out", "Events set aside"].get("", 0.0)
    oldest = _seconds(known["Out", "Oldest event waiting"].get("", 0.0))
    lines = [
        f"Events to be published: {_count(outbox)}, the oldest waits for {oldest}." if outbox else "No event waits.",
        f"Events set aside, because no broker takes them: {_count(aside)}." if aside else "No event is set aside.",
    ]
    if rows:
        age = _seconds(known["Put off", "Oldest deferred row"].get("", 0.0))
        lines.append(f"Recounts are put off, the oldest for {age}:")
    else:
        lines.append("No recount is put off.")
    paragraphs = "".join(f"<p>{escape(line)}</p>" for line in lines)
    table = _table("Deferred recounts", ("reason", "rows"), rows) if rows else ""
    return f'<section id="waiting"><h2>Waiting</h2>{paragraphs}{table}</section>'


def _letters(letters: Mapping[str, float]) -> str:
    rows = [(escape(reason), _count(number)) for reason, number in sorted(letters.items()) if number]
    body = _table("Dead letters", ("reason", "records"), rows) if rows else "<p>None.</p>"
    return f'<section id="letters"><h2>Dead letters since the start</h2>{body}</section>'


def _tables(known: Mapping[tuple[str, str], Mapping[str, float]]) -> str:
    sections: dict[str, list[tuple[str, ...]]] = {}
    for panel in PANELS:
        values = known[panel.group, panel.title]
        rows = sections.setdefault(panel.group, [])
        shown = [(by, value) for by, value in sorted(values.items()) if value or not by or panel.by is None]
        rows += [(escape(panel.title), escape(by), _with_unit(value, panel.unit)) for by, value in shown] or [
            (escape(panel.title), "", "0" if values else "nothing yet")
        ]
    return "".join(
        f'<section id="{_id(group)}"><h2>{escape(group)}</h2>{_table(group, ("what", "of", "value"), rows)}</section>'
        for group, rows in sections.items()
    )


def _id(group: str) -> str:
    return f"panel-{group.lower().replace(' ', '-')}"


def _table(name: str, heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Cells are HTML already."""
    head = "".join(f'<th scope="col">{escape(one)}</th>' for one in heads)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return (
        f'<div class="table" role="region" tabindex="0" aria-label="{escape(name)}">'
        f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _with_unit(value: float, unit: str) -> str:
    if unit == "seconds":
        return _seconds(value)
    if unit == "bytes":
        return f"{value / 1e6:,.0f} MB"
    if unit == "0 or 1":
        return "yes" if value else "no"
    if unit.endswith("/s"):
        return f"{_rate(value)} {unit}"
    return f"{_count(value)} {unit}"


def _count(value: float) -> str:
    return f"{value:,.0f}"


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.2f}".rstrip("0").rstrip(".")


def _percent(basis_points: int) -> str:
    return f"{basis_points / 100:.2f} %"


def _seconds(value: float) -> str:
    if value < 1:
        return f"{value * 1000:.0f} ms"
    return f"{value:.1f} s" if value < 60 else _span(value)


def _span(seconds: float) -> str:
    """The two largest units."""
    days, rest = divmod(int(seconds), 86_400)
    hours, rest = divmod(rest, 3_600)
    minutes, rest = divmod(rest, 60)
    parts = [
        f"{number} {unit}" for number, unit in ((days, "d"), (hours, "h"), (minutes, "min"), (rest, "s")) if number
    ]
    return " ".join(parts[:2]) or "0 s"
