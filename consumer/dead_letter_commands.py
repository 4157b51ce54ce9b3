"""Commands for dead letters: list, show, send back. Each may run twice, at once, or be killed in between."""

import heapq
import re
import sys
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import aclosing
from datetime import datetime
from typing import Annotated, NamedTuple

import typer

from consumer.broker import Publisher, Scan
from consumer.console import DryRun, JsonFlag, moment, print_json, run_async, settings_without, with_database
from consumer.database import Connection
from consumer.errors import ServiceError
from consumer.progress import progress
from consumer.redrive import Filter, Letter, Redrive, encoded, origin, plain, read_letter, redriven, words
from consumer.repairs import Everything, Limit, brokers, named, show_list
from consumer.settings import Settings
from schemas.events import DeadLetterReason
from schemas.topics import Topics

dead_letters = typer.Typer(
    name="dead-letters", help="Records that could not be read: list, show, send back.", no_args_is_help=True
)


class Place(NamedTuple):
    """Where a dead letter is, in the dead-letter topic."""

    partition: int
    offset: int

    def __str__(self) -> str:
        return f"{self.partition}:{self.offset}"


def place(text: str) -> Place:
    """A place from the command line. Raises BadParameter."""
    found = re.fullmatch(r"([0-9]{1,9}):([0-9]{1,18})", text)
    if found is None:
        raise typer.BadParameter(
            "no place in the dead-letter topic: write PARTITION:OFFSET as `dead-letters list` does, like 0:17"
        )
    return Place(int(found[1]), int(found[2]))


Reason = Annotated[DeadLetterReason | None, typer.Option(help="Only those with this reason.")]
Topic = Annotated[str | None, typer.Option(help="Only those that came from this topic (full name).")]
Since = Annotated[
    datetime | None, typer.Option(parser=moment, metavar="TIME", help="Only those written then or later (or: 15m, 2h).")
]
Until = Annotated[datetime | None, typer.Option(parser=moment, metavar="TIME", help="Only those written before.")]


@dead_letters.command(name="list", epilog="Example: campaign-stats dead-letters list --reason not_json --since 2h")
def list_dead_letters(
    reason: Reason = None,
    topic: Topic = None,
    since: Since = None,
    until: Until = None,
    limit: Limit = 100,
    as_json: JsonFlag = False,
) -> None:
    """What could not be read, the newest first; never what was in it."""
    settings = settings_without()
    wanted = Filter(reason, topic, since, until)

    async def work(db: Connection) -> tuple[list[dict[str, object]], int]:
        newest: list[tuple[tuple[datetime, int, int], Letter]] = []
        total = 0
        async for letters in _letters(settings, wanted):
            total += len(letters)
            for letter in letters:
                row = ((letter.time, letter.partition, letter.offset), letter.without_bytes())
                (heapq.heappush if len(newest) < limit else heapq.heappushpop)(newest, row)
        shown = [letter for _, letter in sorted(newest, reverse=True)]
        marks = await redriven(db, shown)
        return [letter.document(letter.origin and marks.get(letter.origin)) for letter in shown], total

    shown, total = run_async(with_database(settings, work))
    columns = {
        "place": "place", "time": "time", "reason": "reason", "from": "from", "error": "error",
        "redriven_at": "redriven at",
    }  # fmt: skip
    rows = [{**row, "from": origin(row)} for row in shown]
    show_list("dead letters", columns, rows, shown, total, as_json)


@dead_letters.command(epilog="Example: campaign-stats dead-letters show 0:17")
def show(
    where: Annotated[Place, typer.Argument(parser=place, metavar="PARTITION:OFFSET", help="As the list shows it.")],
    as_json: JsonFlag = False,
) -> None:
    """Everything about one dead letter, with what was in it. Exit 1 when there is none at this place."""
    settings = settings_without()

    async def work(db: Connection) -> tuple[Letter | None, datetime | None]:
        async with _scan(settings) as scan:
            record = await scan.at(*where)
        if record is None:
            return None, None
        letter = read_letter(record)
        return letter, next(iter((await redriven(db, [letter])).values()), None)

    letter, redriven_at = run_async(with_database(settings, work))
    if letter is None:
        raise ServiceError(_nothing_at([where]))
    document = letter.document(redriven_at)
    key, value = encoded(letter.key), encoded(letter.value)
    headers = [(name, encoded(content)) for name, content in letter.headers]
    if as_json:
        kept = [{"name": name, **(content or {"encoding": None, "content": None})} for name, content in headers]
        print_json({**document, "key": key, "value": value, "headers": kept})
        return
    lines = {**document, "from": origin(document)}
    for name in ("place", "time", "reason", "from", "error", "redriven_at"):
        print(f"{name.replace('_', ' ')}: {plain('-' if lines[name] is None else str(lines[name]))}")
    for name, content in headers:
        print(f"header {plain(name)}: {words(content)}")
    print(f"key: {words(key)}")
    print(f"value: {words(value)}" if letter.has_bytes else "value: was never kept, only where it stood")


@dead_letters.command(epilog="Example: campaign-stats dead-letters redrive --reason unknown_type --dry-run")
def redrive(
    places: Annotated[
        list[Place] | None,
        typer.Argument(parser=place, metavar="PARTITION:OFFSET", help="Dead letters, as the list shows them."),
    ] = None,
    reason: Reason = None,
    topic: Topic = None,
    since: Since = None,
    until: Until = None,
    limit: Annotated[
        int | None, typer.Option(min=1, max=1_000_000, help="Send at most this many; more with the next run.")
    ] = None,
    everything: Everything = False,
    again: Annotated[bool, typer.Option("--again", help="Also those that were sent back before.")] = False,
    dry_run: DryRun = False,
    as_json: JsonFlag = False,
) -> None:
    """Send dead letters back to the topics they came from, each once. Exit 1 when some could not be sent."""
    wanted = Filter(reason, topic, since, until)
    if [bool(places), not wanted.is_empty, everything].count(True) != 1:
        raise typer.BadParameter("give places, or filters (--reason, --topic, --since, --until), or --all")
    settings = settings_without()

    async def work(db: Connection) -> tuple[Redrive, list[Place]]:
        publisher = Publisher(brokers(settings), idempotence=settings.producer_idempotence)
        allowed = [*Topics(settings.topic_prefix).read, *([settings.cdc_topic] if settings.cdc_topic else [])]
        job = Redrive(db, publisher, allowed, again=again, dry_run=dry_run, limit=limit)
        missing: list[Place] = []
        try:
            async with aclosing(_at(settings, places, missing) if places else _letters(settings, wanted)) as source:
                async for letters in source:
                    await job.take(letters)
                    if job.is_stopped:
                        break
        finally:
            await publisher.close(5.0)
        return job, missing

    job, missing = run_async(with_database(settings, work))
    failed = job.failures.total()
    counts = {"sent": job.sent, "skipped": job.skipped, "impossible": job.impossible, "failed": failed}
    if as_json:
        print_json({**counts, "missing": [str(one) for one in missing], "dry_run": dry_run})
    else:
        print(f"{'would send' if dry_run else 'sent'} {job.sent}")
        print(f"skipped {job.skipped}" + (" (sent back before: --again sends them once more)" if job.skipped else ""))
        print(f"impossible {job.impossible}" + (" (their bytes were never kept)" if job.impossible else ""))
        if failed:
            print(f"failed {failed}")
    for error, count in job.failures.items():
        print(f"campaign-stats: {count} could not be sent: {error}", file=sys.stderr)
    if missing:
        print(f"campaign-stats: {_nothing_at(missing)}", file=sys.stderr)
    sys.exit(1 if failed or missing else 0)


def _scan(settings: Settings) -> Scan:
    topic = Topics(settings.topic_prefix).dead_letters
    return Scan(brokers(settings), topic, fetch_max_wait_ms=settings.fetch_max_wait_ms)


async def _letters(settings: Settings, wanted: Filter) -> AsyncGenerator[list[Letter], None]:
    """Those that match, as they come; what is written meanwhile is for the next time."""
    async with _scan(settings) as scan:
        with progress("reading dead letters") as done:
            async for records in scan.records(wanted.since):
                yield [letter for letter in map(read_letter, records) if wanted.matches(letter)]
                done(scan.done, scan.total)


async def _at(settings: Settings, places: Sequence[Place], missing: list[Place]) -> AsyncGenerator[list[Letter], None]:
    """Those at these places, one by one; adds to `missing` where there is none."""
    async with _scan(settings) as scan:
        with progress("reading dead letters") as done:
            for count, where in enumerate(sorted(set(places)), 1):
                record = await scan.at(*where)
                if record is None:
                    missing.append(where)
                else:
                    yield [read_letter(record)]
                done(count, len(places))


def _nothing_at(places: Iterable[Place]) -> str:
    return f"there is no dead letter at {named(places)}: see `dead-letters list`"
