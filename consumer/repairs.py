"""Commands that repair: deferred work, events set aside, a replay. Each may run twice, at once, or be killed."""

import sys
from collections.abc import Iterable, Sequence
from datetime import datetime
from enum import StrEnum
from typing import Annotated, Any, Final
from uuid import UUID

import typer

from consumer.broker import Connection as Brokers
from consumer.broker import Group
from consumer.console import (
    DryRun,
    JsonFlag,
    campaign_id,
    moment,
    print_json,
    print_table,
    run_async,
    settings_without,
    with_database,
)
from consumer.database import Connection, statement
from consumer.envelope import format_time
from consumer.progress import progress
from consumer.redrive import plain
from consumer.replay import Move, planned
from consumer.replay import replay as replay_group
from consumer.settings import Settings
from schemas.topics import Topics

PAGE_ROWS: Final = 1_000  # of our tables that one statement changes
REPLAY_EXAMPLE: Final = "Example: campaign-stats replay --since 2026-01-31T08:00:00Z --dry-run"

deferred = typer.Typer(name="deferred", help="Recounts put off until later: list, try now.", no_args_is_help=True)
outbox = typer.Typer(name="outbox", help="Events on their way out: list, try again.", no_args_is_help=True)


class DeferredReason(StrEnum):
    """Why a recount was put off."""

    LOCKED = "locked"
    HUGE = "huge"
    ALONE = "alone"
    FAILING = "failing"
    GUARD = "guard"
    SWEEP = "sweep"


Limit = Annotated[int, typer.Option(min=1, max=1_000_000, help="Show at most this many.")]
CampaignIds = Annotated[
    list[UUID] | None, typer.Argument(parser=campaign_id, metavar="ID", help="Campaigns to try now.")
]
Everything = Annotated[bool, typer.Option("--all", help="All of them.")]


@deferred.command(name="list", epilog="Example: campaign-stats deferred list --reason failing")
def list_deferred(
    reason: Annotated[DeferredReason | None, typer.Option(help="Only those with this reason.")] = None,
    campaign: Annotated[
        UUID | None, typer.Option(parser=campaign_id, metavar="ID", help="Only those of this campaign.")
    ] = None,
    limit: Limit = 100,
    as_json: JsonFlag = False,
) -> None:
    """Recounts that were put off, in the order in which they are tried."""
    settings = settings_without("kafka_bootstrap_servers")
    found = run_async(with_database(settings, lambda db: db.fetch(statement("list_deferred"), reason, campaign, limit)))
    columns = {
        "id": "id", "campaign_id": "campaign", "reason": "reason", "due_at": "due at", "tries": "tries",
        "first_written": "first written", "trigger": "trigger", "requests": "requests", "failures": "failures",
        "retry_at": "retry at",
    }  # fmt: skip
    rows = [{name: row["not_before" if name == "due_at" else name] for name in columns} for row in found]
    show_list("deferred recounts", columns, rows, rows, found[0]["total"] if found else 0, as_json)


@deferred.command(epilog="Example: campaign-stats deferred retry --reason failing")
def retry(
    campaign_ids: CampaignIds = None,
    reason: Annotated[DeferredReason | None, typer.Option(help="Those with this reason.")] = None,
    everything: Everything = False,
    as_json: JsonFlag = False,
) -> None:
    """Have the running service try deferred campaigns at once. Prints how many; exit 1 for one that is not deferred."""
    if [bool(campaign_ids), reason is not None, everything].count(True) != 1:
        raise typer.BadParameter("give campaign ids, or --reason, or --all")
    settings = settings_without("kafka_bootstrap_servers")

    async def work(db: Connection) -> set[UUID]:
        campaigns, last = set[UUID](), 0
        until = await db.fetchval("SELECT coalesce(max(id), 0) FROM campaign_stats.deferred")
        with progress("making campaigns due") as done:
            while page := await db.fetch(statement("retry_deferred"), campaign_ids, reason, last, PAGE_ROWS):
                campaigns.update(row["campaign_id"] for row in page)
                done(len(campaigns))
                last = page[-1]["id"]
                if last >= until:  # rows that workers put back meanwhile are for the next time
                    break
        return campaigns

    campaigns = run_async(with_database(settings, work))
    print_json({"campaigns": len(campaigns)}) if as_json else print(len(campaigns))
    if idle := set(campaign_ids or ()) - campaigns:
        print(f"campaign-stats: not deferred: {named(idle)}", file=sys.stderr)
        sys.exit(1)


@outbox.command(name="list", epilog="Example: campaign-stats outbox list --set-aside")
def list_outbox(
    set_aside: Annotated[bool, typer.Option("--set-aside", help="Only events that could never be sent.")] = False,
    limit: Limit = 100,
    as_json: JsonFlag = False,
) -> None:
    """Events that are not published yet, and those set aside because no broker takes them."""
    settings = settings_without("kafka_bootstrap_servers")
    found = run_async(with_database(settings, lambda db: db.fetch(statement("list_outbox"), set_aside, limit)))
    columns = {
        "id": "id", "campaign_id": "campaign", "type": "type", "bytes": "bytes", "written_at": "written at",
        "set_aside_at": "set aside at", "error": "error",
    }  # fmt: skip
    rows = [{name: row[name] for name in columns} for row in found]
    what = "events set aside" if set_aside else "events in the outbox"
    show_list(what, columns, rows, rows, found[0]["total"] if found else 0, as_json)


@outbox.command(epilog="Example: campaign-stats outbox requeue 4711")
def requeue(
    ids: Annotated[
        list[int] | None,
        typer.Argument(min=1, max=2**63 - 1, metavar="OUTBOX_ID", help="Events, as the list shows them."),
    ] = None,
    everything: Everything = False,
    as_json: JsonFlag = False,
) -> None:
    """Have the relay send events again that were set aside. Prints how many; exit 1 for an id that is none of them."""
    if bool(ids) == everything:
        raise typer.BadParameter("give ids from `outbox list --set-aside`, or --all")
    settings = settings_without("kafka_bootstrap_servers")

    async def work(db: Connection) -> set[int]:
        requeued, last = set[int](), 0
        with progress("requeueing events") as done:
            while page := await db.fetch(statement("requeue_outbox"), ids, last, PAGE_ROWS):
                requeued.update(row["id"] for row in page)
                last = max(row["id"] for row in page)  # one that is set aside again meanwhile is not tried for ever
                done(len(requeued))
        return requeued

    requeued = run_async(with_database(settings, work))
    print_json({"requeued": len(requeued)}) if as_json else print(len(requeued))
    if wrong := set(ids or ()) - requeued:
        print(f"campaign-stats: not set aside: {named(wrong)}; see `outbox list --set-aside`", file=sys.stderr)
        sys.exit(1)


def replay(
    since: Annotated[
        datetime, typer.Option(parser=moment, metavar="TIME", help="Read again from here on (or: 15m, 2h, 7d).")
    ],
    dry_run: DryRun = False,
    as_json: JsonFlag = False,
) -> None:
    """Move the service's place in its topics back to a time. Only while no service runs; never moves forward."""
    settings = settings_without()
    names = Topics(settings.topic_prefix)

    async def work(db: Connection) -> list[Move]:
        with progress("looking up offsets"):
            async with Group(brokers(settings), settings.group, names.read) as group:
                return await (planned(group, since) if dry_run else replay_group(group, db, settings.group, since))

    rows = [move.document() for move in run_async(with_database(settings, work))]
    if as_json:
        print_json(rows)
        return
    columns = ("topic", "partition", "from", "to", "records")
    title = f"group {settings.group} {'would go' if dry_run else 'went'} back"
    print_table(title, columns, [[row[column] for column in columns] for row in rows])


def brokers(settings: Settings) -> Brokers:
    """How to reach Kafka. Raises ConfigError."""
    from consumer.service import kafka_connection

    return kafka_connection(settings)


def show_list(
    what: str,
    columns: dict[str, str],
    rows: Sequence[dict[str, Any]],
    documents: Sequence[dict[str, Any]],
    total: int,
    as_json: bool,
) -> None:
    """A list as a table or as JSON; says on stderr when the limit left some out."""
    if as_json:
        print_json(
            [
                {name: format_time(cell) if isinstance(cell, datetime) else cell for name, cell in document.items()}
                for document in documents
            ]
        )
    elif rows:
        cells = ((row[name] for name in columns) for row in rows)
        shown = [[plain(cell) if isinstance(cell, str) else cell for cell in row] for row in cells]
        print_table(f"{total} {what}", list(columns.values()), shown)
    else:
        print(f"no {what}")
    if total > len(rows):
        print(f"campaign-stats: {total - len(rows)} more are not shown: give a larger --limit", file=sys.stderr)


def named(things: Iterable[object]) -> str:
    """The first ten of them, in words."""
    names = [str(thing) for thing in sorted(things, key=str)]
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
