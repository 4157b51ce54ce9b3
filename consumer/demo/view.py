"""What a person sees: a live view in a terminal, plain lines elsewhere; and at the end one table of what was proven."""

import asyncio
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Final
from uuid import UUID

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from consumer.demo.evidence import Check
from consumer.demo.subscriber import Subscriber
from schemas.events import PAUSED, STATS_UPDATED, SYNC_REJECTED

PLAIN_WIDTH: Final = 120
LINE_EVERY_S: Final = 1.0
REDRAWS_PER_SECOND: Final = 8
SHOWN_CAMPAIGNS: Final = 6
SHOWN_PROBLEMS: Final = 5


class View:
    """Looks at the tallies of all the others; changes nothing."""

    def __init__(
        self,
        console: Console,
        upstream: Counter[str],
        subscriber: Subscriber,
        names: Mapping[UUID, str],
        seconds: float,
    ) -> None:
        self.metrics: Counter[str] = Counter()  # of the service, by name
        self.phase = "the upstream works"
        self._console = console
        self._upstream = upstream
        self._subscriber = subscriber
        self._names = names
        self._seconds = seconds
        self._begun = time.monotonic()
        self._said: set[str] = set()

    async def run(self) -> None:
        """Show, until cancelled."""
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            with Live(
                get_renderable=self._screen,
                console=self._console,
                refresh_per_second=REDRAWS_PER_SECOND,
                transient=True,
            ):
                await asyncio.Event().wait()
        while True:
            self.lines()
            await asyncio.sleep(LINE_EVERY_S)

    def lines(self) -> None:
        """One line of numbers, and one for each pause not told yet."""
        u, m = self._upstream, self.metrics
        for event_id, pause in self._subscriber.pauses.items():
            if event_id not in self._said:
                self._said.add(event_id)
                print(f"        PAUSED  {self._why(pause)}", flush=True)
        print(
            f"{time.monotonic() - self._begun:4.0f} s  changed {_grouped(u['moves'])} · hints {_grouped(u['hints'])}"
            f" ({u['late']} late, {u['doubled']} twice, {u['misleading']} misleading, {u['never hinted']} never)"
            f" · recounted {_grouped(m['recounts_total'])} · published {_grouped(m['published_total'])}"
            f" · lag {m['lag_records']}",
            flush=True,
        )

    def _why(self, pause: Mapping[str, Any]) -> str:
        name = self._names.get(UUID(pause["campaign_id"]), pause["campaign_id"])
        return (
            f"{name}: {pause['bounced']} of the last {pause['sent']} mails bounced"
            f" ({pause['rate_bp'] / 100:.2f} %, limit {pause['threshold_bp'] / 100:.2f} %),"
            f" {pause['pending']} will not be mailed"
        )

    def _screen(self) -> RenderableType:
        passed = min(time.monotonic() - self._begun, self._seconds)
        head = Text(f"campaign-stats demo · {self.phase} · {passed:.0f} of {self._seconds:.0f} s", style="bold")
        return Group(head, self._numbers(), self._campaigns(), self._pauses())

    def _numbers(self) -> RenderableType:
        u, m, s = self._upstream, self.metrics, self._subscriber.tally
        columns = {
            "comes in": [
                ("statuses changed", u["moves"]),
                ("hints", u["hints"]),
                ("late", u["late"]),
                ("twice", u["doubled"]),
                ("misleading", u["misleading"]),
                ("never sent", u["never hinted"]),
                ("sync requests", u["sync requests"]),
            ],
            "the service": [
                ("records read", m["records_total"]),
                ("campaigns recounted", m["recounts_total"]),
                ("drift healed", m["drift_found_total"]),
                ("found by the sweep", m["sweep_deferred_total"]),
                ("put off", m["deferred_rows"]),
                ("events waiting", m["outbox_rows"]),
                ("lag (records)", m["lag_records"]),
            ],
            "the subscriber hears": [
                ("stats updated", s[STATS_UPDATED]),
                ("paused", s[PAUSED]),
                ("sync rejected", s[SYNC_REJECTED]),
                ("dead letters", s["dead letters"]),
            ],
        }
        grid = Table.grid(expand=True)
        panels = []
        for title, rows in columns.items():
            table = Table.grid(padding=(0, 1), expand=True)
            table.add_column()
            table.add_column(justify="right")
            for label, number in rows:
                table.add_row(label, f"[bold]{_grouped(number)}")
            panels.append(Panel(table, title=title, height=9))
            grid.add_column(ratio=1)
        grid.add_row(*panels)
        return grid

    def _campaigns(self) -> RenderableType:
        table = Table(expand=True, title="latest news", title_justify="left")
        for title, width in (("campaign", 22), ("status", 9), ("stats", None)):
            table.add_column(title, no_wrap=True, min_width=width)
        newest = sorted(self._subscriber.latest.values(), key=lambda data: -int(data["version"]))
        for data in newest[:SHOWN_CAMPAIGNS]:
            campaign = data["campaign"]
            stats = " ".join(f"{key} {number}" for key, number in campaign["stats"].items())
            table.add_row(Text(campaign["name"]), campaign["status"], stats)
        return table

    def _pauses(self) -> RenderableType:
        lines = [Text(self._why(pause), style="yellow") for pause in list(self._subscriber.pauses.values())[-7:]]
        return Panel(Group(*(lines or [Text("nobody yet")])), title="paused, and why", title_align="left")


def _grouped(number: int) -> str:
    return f"{number:,}".replace(",", " ")


def show_proof(console: Console, checks: Sequence[Check], reference: str, seconds: float) -> None:
    """The reference case, the table, and where to look next."""
    console.print(f"\nQ2 Enterprise Outreach: {reference}", highlight=False, markup=False, soft_wrap=True)
    table = Table(title=f"What was proven from scratch, {seconds:.0f} s after set-up", title_justify="left")
    table.add_column("check")
    table.add_column("how many", justify="right")
    table.add_column("result")
    for check in checks:
        result = "[green]true" if check.holds else "[bold red]FALSE" if check.problems else "[bold red]NOTHING CHECKED"
        table.add_row(check.claim, str(check.count), result)
    console.print(table)
    for check in checks:
        for problem in check.problems[:SHOWN_PROBLEMS]:
            console.print(f"FALSE  {problem}", style="red", highlight=False, markup=False, soft_wrap=True)
    console.print(
        "Where to look next: README.md, `make test`; what you just saw in numbers: GET /metrics on the operators' port"
        " of `campaign-stats run`;\nwhy a campaign was paused: `campaign-stats why ID`.",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
