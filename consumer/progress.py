"""A progress bar on stderr for what takes longer than two seconds; nothing where stderr is no terminal."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

AFTER_S: Final = 2.0  # shorter work needs no bar


class Done(Protocol):
    """Takes how much is done so far, and of how much if that is known."""

    def __call__(self, completed: int, total: int | None = None) -> None: ...


@contextmanager
def progress(title: str) -> Iterator[Done]:
    """Inside a running event loop; the bar comes by the loop's clock, so also while one step takes long."""
    console = Console(stderr=True)
    bar = Progress(
        SpinnerColumn(),
        TextColumn(title, markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    task = bar.add_task(title, total=None)

    def done(completed: int, total: int | None = None) -> None:
        bar.update(task, completed=completed, total=total)

    timer = asyncio.get_running_loop().call_later(AFTER_S, bar.start)
    try:
        yield done
    finally:
        timer.cancel()
        bar.stop()
