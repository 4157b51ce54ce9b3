"""The commands: parse, call, print, exit code (0 clean, 1 failure or "no", 2 to be put right, 3 overran)."""

import asyncio
import json
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Any, Final, assert_never
from uuid import UUID, uuid4

import orjson
import structlog
import typer

from consumer import broker, dead_letter_commands, logs, migrations, questions, repairs
from consumer.broker import Outgoing, Publisher, Reader
from consumer.changes import decode_changes
from consumer.console import (
    CampaignId,
    JsonFlag,
    campaign_id,
    print_json,
    print_table,
    run_async,
    settings_without,
    with_database,
)
from consumer.database import Connection
from consumer.envelope import (
    CONTENT_TYPE,
    ChangeHint,
    DeadLetter,
    Ignored,
    StatusHint,
    SyncRequest,
    campaign_uuid,
    decode,
    encode,
)
from consumer.errors import ConfigError, ServiceError, stacks_of
from consumer.progress import progress
from consumer.settings import read_settings
from schemas import events
from schemas.topics import Topics

DEAD_LETTER_RETENTION_MS: Final = 7 * 24 * 3600 * 1000  # they repeat what upstream sent: short

log = structlog.get_logger(__name__)

app = typer.Typer(
    name="campaign-stats",
    help="Keeps campaigns.stats true and stops campaigns whose mail bounces.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.add_typer(dead_letter_commands.dead_letters)
app.add_typer(repairs.deferred)
app.add_typer(repairs.outbox)
app.command(epilog=repairs.REPLAY_EXAMPLE)(repairs.replay)


def main() -> None:
    """Run a command; errors that a person can mend are printed as sentences."""
    try:
        try:
            app(_separated(sys.argv[1:]), prog_name="campaign-stats")
        finally:
            sys.stdout.flush()
    except ConfigError as error:
        tell(error)
        sys.exit(2)
    except ServiceError as error:
        print(f"campaign-stats: {error}", file=sys.stderr)
        sys.exit(1)
    except BrokenPipeError:  # the reader went away, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        print(f"campaign-stats: the output cannot be written: {error.strerror}", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        print(f"campaign-stats: failed\n{stacks_of(error)}", file=sys.stderr, end="")
        sys.exit(1)


def tell(error: ConfigError) -> None:
    """Every problem on a line of its own."""
    for problem in error.problems:
        print(f"campaign-stats: {problem}", file=sys.stderr)


def _separated(arguments: list[str]) -> list[str]:
    """`sync --wait=5 ID` and `sync --wait 5 ID` as `sync --wait ID 5`: the option's value may be left out."""
    if arguments[:1] != ["sync"]:
        return arguments
    for place, argument in enumerate(arguments):
        option, _, value = argument.partition("=")
        if option == "--wait" and value:
            return [*arguments[:place], "--wait", *arguments[place + 1 :], value]
        if argument == "--wait" and re.fullmatch(r"[0-9.]+", "".join(arguments[place + 1 : place + 2])):
            return [*arguments[: place + 1], *arguments[place + 2 :], arguments[place + 1]]
    return arguments


@app.command(epilog="Example: campaign-stats run")
def run(
    until_caught_up: Annotated[
        bool, typer.Option("--until-caught-up", help="End with 0 once everything there was at the start is done.")
    ] = False,
) -> None:
    """Serve: read hints and sync requests, recount, pause, publish. Logs JSON lines on stdout."""
    from consumer.service import Service, end_process

    settings = read_settings()
    logs.configure(sys.stdout, settings.log_level)

    def failed(_: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """As asyncio's own, which would quote the error."""
        error = context.get("exception")
        if error is None:
            log.error("asyncio complains", why=context["message"])
        else:
            log.error("an error that nobody waited for", error=type(error).__name__, stack=stacks_of(error))

    async def serve() -> int:
        asyncio.get_running_loop().set_exception_handler(failed)
        try:
            code = await Service(settings).run(until_caught_up=until_caught_up)
        except ConfigError as error:
            tell(error)
            code = 2
        except Exception as error:
            log.critical("crashed", error=type(error).__name__, stack=stacks_of(error))
            code = 1
        await end_process(code)
        return code

    sys.exit(run_async(serve()))


@app.command(epilog="Example: campaign-stats migrate --reference-schema")
def migrate(
    reference_schema: Annotated[
        bool, typer.Option("--reference-schema", help="First create the product's tables, for trials and tests.")
    ] = False,
    back_to: Annotated[
        str | None,
        typer.Option(
            "--back-to", metavar="RELEASE", help="Instead: let this older release start on the database again."
        ),
    ] = None,
) -> None:
    """Apply the service's migrations to DATABASE_URL. Safe to run twice, at once, or again after a crash."""
    settings = settings_without("kafka_bootstrap_servers")
    url = settings.database_url.get_secret_value()
    if back_to is not None:
        for name in run_async(migrations.back_to(url, back_to)):
            print(f"{name} is not counted any more; what it added stays")
        print(f"release {back_to} can start on this database")
        return

    async def work() -> list[str]:
        with progress("applying migrations"):  # an index on a large table takes minutes
            return await migrations.migrate(url, reference_schema=reference_schema)

    applied = run_async(work())
    for name in applied:
        print(f"applied {name}")
    if not applied:
        print("nothing to do: the database is up to date")


@app.command(epilog="Example: campaign-stats topics --create --partitions 12 --replication 3")
def topics(
    create: Annotated[bool, typer.Option("--create", help="Create the topics that are missing.")] = False,
    partitions: Annotated[int, typer.Option(min=1, help="Partitions of each new topic.")] = 12,
    replication: Annotated[int, typer.Option(min=1, help="Replicas of each new topic.")] = 3,
    as_json: JsonFlag = False,
) -> None:
    """List the topics the service needs; with --create, create the missing ones. Exit 1 while some are missing."""
    settings = settings_without("database_url")
    names = Topics(settings.topic_prefix)
    from consumer.service import kafka_connection

    connection = kafka_connection(settings)
    created: list[str] = []

    async def work() -> list[str]:
        if create:
            wanted = {name: {"cleanup.policy": "delete"} for name in names.all}
            wanted[names.dead_letters]["retention.ms"] = str(DEAD_LETTER_RETENTION_MS)
            created.extend(
                await broker.create_topics(connection, wanted, partitions=partitions, replication=replication)
            )
        publisher = Publisher(connection, idempotence=False)
        try:
            return await publisher.check(names.all, patience_s=broker.NEW_TOPIC_S if created else 0)
        finally:
            await publisher.close(5.0)

    missing = run_async(work())
    if as_json:
        print_json([{"topic": name, "present": name not in missing, "created": name in created} for name in names.all])
    else:
        for name in created:
            print(f"created {name}")
        for name in names.all:
            print(f"{'missing' if name in missing else 'present'} {name}")
    sys.exit(1 if missing else 0)


@app.command(epilog="Example: campaign-stats sync 8c2b2d4e-e29b-41d4-a716-446655440000 --wait 10")
def sync(
    campaign_id: CampaignId,
    wait: Annotated[bool, typer.Option("--wait", help="Wait for the answer and print its data.")] = False,
    seconds: Annotated[
        float | None, typer.Argument(min=0.1, metavar="[SECONDS]", help="How long to wait; 30 if not given.")
    ] = None,
) -> None:
    """Publish a sync request and print its id; with --wait, exit 0 for counts, 1 if rejected or unanswered."""
    if campaign_uuid(str(campaign_id)) is None:
        raise typer.BadParameter("the service takes RFC 9562 UUIDs only, and this id is none")
    if seconds is not None and not wait:
        raise typer.BadParameter("seconds are for --wait: add it")
    settings = settings_without("database_url")
    from consumer.service import kafka_connection

    connection = kafka_connection(settings)
    names = Topics(settings.topic_prefix)
    request_id = str(uuid4())
    event = encode(
        type=events.SYNC_REQUESTED,
        id=request_id,
        time=datetime.now(UTC),
        subject=str(campaign_id),
        data={"campaign_id": str(campaign_id), "reason": "asked by an operator"},
    )

    async def publish() -> None:
        publisher = Publisher(connection, idempotence=settings.producer_idempotence)
        try:
            if await publisher.check([names.of(events.SYNC_REQUESTED)]):
                raise ConfigError([f"topic {names.of(events.SYNC_REQUESTED)} is missing: {broker.CREATE_TOPICS}"])
            row = Outgoing(names.of(events.SYNC_REQUESTED), str(campaign_id).encode(), event, CONTENT_TYPE)
            [sent] = await publisher.publish([row])
        finally:
            await publisher.close(5.0)
        if sent.error is not None:
            raise ServiceError(f"the request was not published: {sent.error}")

    async def ask(timeout_s: float) -> dict[str, Any] | None:
        answers = [names.of(events.STATS_UPDATED), names.of(events.SYNC_REJECTED)]
        async with Reader(connection, answers, fetch_max_wait_ms=settings.fetch_max_wait_ms) as reader:
            await publish()
            print(request_id, file=sys.stderr)
            deadline = asyncio.get_running_loop().time() + timeout_s
            while (left := deadline - asyncio.get_running_loop().time()) > 0:
                for record in await reader.read(min(left, 0.5)):
                    answer = _parsed(record.value)
                    if isinstance(answer, dict) and answer.get("causationid") == request_id:
                        return answer
        return None

    if not wait:
        run_async(publish())
        print(request_id)
        return
    patience_s = 30.0 if seconds is None else seconds
    answer = run_async(ask(patience_s))
    if answer is None:
        raise ServiceError(f"no answer to {request_id} within {patience_s:g} s: is the service running?")
    print_json(answer["data"])
    sys.exit(0 if answer["type"] == events.STATS_UPDATED else 1)


@app.command(epilog="Example: campaign-stats why 8c2b2d4e-e29b-41d4-a716-446655440000")
def why(campaign_id: CampaignId, as_json: JsonFlag = False) -> None:
    """Explain what the bounce guard thinks of a campaign, in words and numbers. Exit 1 for an unknown id."""
    settings = settings_without("kafka_bootstrap_servers")
    explanation = run_async(with_database(settings, lambda db: questions.why(db, campaign_id, settings.limits)))
    if explanation is None:
        raise ServiceError(f"no campaign has the id {campaign_id}")
    if as_json:
        print_json(explanation.document())
    else:
        print(explanation.words())


@app.command(epilog="Example: campaign-stats drift --json")
def drift(as_json: JsonFlag = False) -> None:
    """Campaigns whose stored stats differ from the truth now. Changes nothing; exit 1 if there are any."""
    settings = settings_without("kafka_bootstrap_servers")

    async def work(db: Connection) -> list[dict[str, Any]]:
        with progress("comparing campaigns") as done:
            return await questions.drift(db, done)

    found = run_async(with_database(settings, work))
    if as_json:
        print_json(found)
    elif found:
        changes = [", ".join(f"{key} {difference:+d}" for key, difference in row["drift"].items()) for row in found]
        print_table(
            f"{len(found)} campaigns with wrong stats (truth minus stored)",
            ("campaign", "type", "status", "last synced", "drift"),
            [
                (row["id"], row["type"], row["status"], row["last_synced_at"] or "never", change)
                for row, change in zip(found, changes, strict=True)
            ],
        )
    else:
        print("no drift: every campaign's stored stats are right")
    sys.exit(1 if found else 0)


@app.command(epilog="Example: campaign-stats reconcile --all --now")
def reconcile(
    campaign_ids: Annotated[
        list[UUID] | None, typer.Argument(parser=campaign_id, metavar="[ID]...", help="Campaigns to recount.")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Every campaign.")] = False,
    now: Annotated[bool, typer.Option("--now", help="At once instead of after the grace time.")] = False,
) -> None:
    """Defer campaigns for a recount by the running service and publish them anew. Prints how many."""
    if bool(campaign_ids) == everything:
        raise typer.BadParameter("give campaign ids, or --all")
    settings = settings_without("kafka_bootstrap_servers")
    delay_s = 0.0 if now else settings.drift_grace_s
    chosen = None if everything else campaign_ids

    async def work(db: Connection) -> int:
        with progress("deferring campaigns") as done:
            return await questions.reconcile(db, chosen, delay_s, done)

    count = run_async(with_database(settings, work))
    print(count)
    if chosen is not None and count < len(set(chosen)):
        print(f"campaign-stats: {len(set(chosen)) - count} of these ids are no campaign's", file=sys.stderr)
        sys.exit(1)


@app.command(epilog="Example: campaign-stats tail --json | head")
def tail(as_json: JsonFlag = False) -> None:
    """Follow what the service publishes, from now on, until Ctrl-C."""
    settings = settings_without("database_url")
    from consumer.service import kafka_connection

    connection = kafka_connection(settings)
    names = Topics(settings.topic_prefix)

    async def follow() -> None:
        topics = [*names.written, names.dead_letters]
        async with Reader(connection, topics, fetch_max_wait_ms=settings.fetch_max_wait_ms) as reader:
            print(f"following {', '.join(topics)}", file=sys.stderr, flush=True)
            while True:
                for record in await reader.read(0.5):
                    print(_line(record.topic, record.value, record.headers, as_json), flush=True)

    run_async(follow())


def _parsed(value: bytes | None) -> Any:
    """Whatever JSON it is; None for bytes that are none."""
    try:
        return orjson.loads(value or b"null")
    except orjson.JSONDecodeError:
        return None


def _line(topic: str, value: bytes | None, headers: Any, as_json: bool) -> str:
    event = _parsed(value)
    said = {name: (content or b"").decode("utf-8", "replace") for name, content in headers}
    if as_json:
        # As it came, however deep it is; line breaks are white space there, they cannot stand in a string.
        raw = None if event is None else orjson.Fragment((value or b"").replace(b"\n", b" ").replace(b"\r", b" "))
        letter = {name: content for name, content in said.items() if name.startswith("dead-letter-")}
        return orjson.dumps({"topic": topic, "event": raw, **letter}).decode()
    if topic.endswith("dead-letters"):
        return f"dead letter  {said.get('dead-letter-reason', '?')}: {said.get('dead-letter-error', '')}"
    try:
        return _told(event)
    except (TypeError, KeyError, AttributeError):
        return f"{topic}  (no event of this service)"


def _told(event: Any) -> str:
    """An event of ours in a line. Raises TypeError, KeyError or AttributeError for anything else."""
    data = event["data"]
    campaign = event.get("subject")
    if event.get("type") == events.PAUSED:
        return f"paused  {campaign}  {data['bounced']} of {data['sent']} bounced ({data['rate_bp'] / 100:.2f} %)"
    if event.get("type") == events.SYNC_REJECTED:
        return f"rejected  {campaign}  {data['reason']}"
    stats = json.dumps(data["campaign"]["stats"], separators=(",", ":"))
    return f"stats  {campaign}  {data['campaign']['status']}  {stats}  {data['trigger']}"


@app.command(epilog="Example: campaign-stats check-event event.json")
def check_event(
    file: Annotated[typer.FileBinaryRead, typer.Argument(metavar="FILE|-", help="The event's bytes; - reads stdin.")],
    header: Annotated[
        list[str] | None,
        typer.Option("--header", "-H", metavar="NAME=VALUE", help="A record header (binary mode: ce_id=..., ...)."),
    ] = None,
    change_record: Annotated[
        bool, typer.Option("--change-record", help="It is a connector's record, as on CAMPAIGN_STATS_CDC_TOPIC.")
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Say whether the service would accept an event and, if not, where and why. Exit 1 if it would not."""
    if malformed := [text for text in header or [] if "=" not in text]:
        raise typer.BadParameter(f"--header {malformed[0]}: write NAME=VALUE")
    pairs = [text.split("=", 1) for text in header or []]
    record = GivenRecord(file.read(), [(name, value.encode("utf-8", "surrogateescape")) for name, value in pairs])
    [found] = decode_changes([record]) if change_record else decode([record])
    match found:
        case DeadLetter():
            document: dict[str, object] = {"accepted": False, "reason": found.reason, "error": found.error}
            words = f"refused ({found.reason}): {found.error}"
            is_event = change_record or b'"specversion"' in (record.value or b"")
            if not is_event and isinstance(decode_changes([record])[0], ChangeHint):
                words += "\n(As a connector's record it would be accepted: --change-record)"
        case SyncRequest():
            document = {"accepted": True, "kind": "sync_request", "campaign_id": str(found.campaign_id)}
            words = f"accepted: a sync request for campaign {found.campaign_id}; it will be answered"
        case StatusHint():
            kind = "newer_version" if found.newer else "status_hint"
            document = {"accepted": True, "kind": kind, "campaign_id": str(found.campaign_id)}
            words = f"accepted: a hint for campaign {found.campaign_id}"
            words += "; of a newer version than this code knows" if found.newer else ""
        case ChangeHint():
            campaigns = [str(campaign) for campaign in found.campaign_ids]
            document = {"accepted": True, "kind": "change_record", "campaign_ids": campaigns}
            words = f"accepted: a hint for campaign {' and '.join(campaigns)}"
        case Ignored():
            document = {"accepted": True, "kind": "tombstone"}
            words = "ignored: it is about no prospect" if change_record else "ignored: a tombstone"
        case _:
            assert_never(found)
    print_json(document) if as_json else print(words)
    sys.exit(0 if document["accepted"] else 1)


@dataclass(frozen=True, slots=True)
class GivenRecord:
    """A record that never was in Kafka."""

    value: bytes | None
    headers: Sequence[tuple[str, bytes | None]]
    topic: str = ""
    partition: int = 0
    offset: int = 0
    key: bytes | None = None
    timestamp: int = 0


@app.command(epilog="Example: campaign-stats doctor --json")
def doctor(as_json: JsonFlag = False) -> None:
    """Check settings, database and topics: what is wrong, what follows, what mends it. Exit 2 if anything must be."""
    from consumer.doctor import examine

    logs.configure(sys.stderr, "CRITICAL")  # what the clients would log is said in the findings
    report = run_async(examine())
    if as_json:
        print_json(report.document())
    else:
        report.show()
    sys.exit(0 if report.ok else 2)


@app.command(epilog="Example: campaign-stats demo --seconds 20")
def demo(
    kafka: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="Use this Kafka, not the embedded broker.")
    ] = None,
    database: Annotated[
        str | None, typer.Option(metavar="URL", help="Use this PostgreSQL (a database of its own is made and dropped).")
    ] = None,
    seconds: Annotated[float, typer.Option(min=5, max=45, help="How long the upstream works.")] = 25.0,
) -> None:
    """Show the whole service at work on embedded servers, and prove from scratch that every number is right."""
    try:
        from consumer.demo.show import show
    except ImportError as error:
        raise ConfigError([f"the demo needs {error.name}: pip install 'campaign-stats[embedded]'"]) from error
    sys.exit(show(kafka=kafka, database_url=database, seconds=seconds))
