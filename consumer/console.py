"""What the commands share: settings, one event loop, tables for people and JSON for scripts, a database that fits."""

import asyncio
import json
import sys
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Final, TypeVar
from uuid import UUID

import orjson
import typer
from rich.console import Console
from rich.table import Table

from consumer import logs, migrations
from consumer.database import Connection, Database
from consumer.envelope import format_time
from consumer.errors import ConfigError
from consumer.settings import Settings, read_settings

T = TypeVar("T")

PIPED_WIDTH: Final = 250  # columns of a table that goes to a file or a pipe: nothing needs to be folded
UNITS_S: Final = {"s": 1, "m": 60, "h": 3_600, "d": 86_400}

JsonFlag = Annotated[bool, typer.Option("--json", help="One JSON document for scripts instead of a table.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only say what would be done.")]


def campaign_id(text: str) -> UUID:
    """An id from the command line. Raises BadParameter."""
    try:
        return UUID(text)
    except ValueError:
        raise typer.BadParameter("not a UUID: give a campaign's id, 8-4-4-4-12 hex") from None


CampaignId = Annotated[UUID, typer.Argument(parser=campaign_id, metavar="ID", help="A campaign's id.")]


def moment(text: str) -> datetime:
    """A time from the command line: ISO 8601 (UTC unless it says otherwise) or an age like 90s, 15m, 2h, 7d."""
    number, unit = text[:-1], text[-1:]
    try:
        if unit in UNITS_S and number.isdecimal():
            return datetime.now(UTC) - timedelta(seconds=int(number) * UNITS_S[unit])
        found = datetime.fromisoformat(text)
    except (ValueError, OverflowError):
        raise typer.BadParameter("no time: write 2026-01-31T08:00:00Z, or an age like 15m, 2h or 7d") from None
    return found if found.tzinfo is not None else found.replace(tzinfo=UTC)


def settings_without(*without: str) -> Settings:
    """The settings, `without` what the command has no use for; logs go to stderr. Raises ConfigError."""
    settings = read_settings(*without)
    logs.configure(sys.stderr, settings.log_level)
    return settings


def run_async(work: Coroutine[Any, Any, T]) -> T:
    """Run to the end."""
    return asyncio.run(work)


async def with_database(settings: Settings, ask: Callable[[Connection], Awaitable[T]]) -> T:
    """Ask one connection to a database that has everything we need. Raises ConfigError, Unavailable."""
    database = Database(settings.database_url.get_secret_value(), size=1)
    await database.open()
    try:
        await database.check_reachable()
        async with database.connection() as connection:
            if problems := await migrations.problems(connection):
                raise ConfigError(problems)
            return await ask(connection)
    finally:
        await database.close(5.0)


def print_json(document: object) -> None:
    """One line on stdout."""
    try:
        print(orjson.dumps(document, default=_plain).decode())
    except TypeError:  # a number that no double can hold, from a manual edit of stats
        print(json.dumps(document, default=_plain))


def _plain(value: object) -> str:
    return format_time(value) if isinstance(value, datetime) else str(value)


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """A table on stdout; None is shown as a dash."""
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*("-" if cell is None else _plain(cell) for cell in row))
    console = Console(markup=False, highlight=False)
    if not console.is_terminal:
        console.width = PIPED_WIDTH
    console.print(table)
