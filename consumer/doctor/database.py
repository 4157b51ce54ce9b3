"""Checks of the database, with the rights of the connected role; they change nothing."""

import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import resources
from typing import Final

import asyncpg

from consumer import migrations
from consumer.database import Connection, Database, override, statement
from consumer.doctor.findings import Finding, a_warning, an_error, not_checked, setting_finding
from consumer.errors import ConfigError, ServiceError, Unavailable
from consumer.guard import Limits, resolve
from consumer.settings import PREFIX

OLDEST_POSTGRESQL: Final = 15
CLOCK_TOLERANCE_S: Final = 5.0
SHARDS: Final = 32
DOOR_TABLES: Final = ("accounts", "campaign_sender_accounts")
MADE: Final = re.compile(
    r"""^CREATE\ TABLE\ campaign_stats\.(?P<table>\w+)\ \(.*?;$
      | ^INSERT\ INTO\ campaign_stats\.(?P<rows>\w+)\ .*?;$
      | ^CREATE\ (?:UNIQUE\ )?INDEX\ (?:CONCURRENTLY\ )?(?:IF\ NOT\ EXISTS\ )?(?P<index>\w+)
        \s+ON\ (?P<schema>\w+)\..*?;$
      | ^CREATE\ (?:OR\ REPLACE\ )?FUNCTION\ campaign_stats\.(?P<function>\w+)\(.*?
        \$(?P<quote>\w*)\$(?P<body>.*?)\$(?P=quote)\$[^;]*;
      | ^CREATE\ (?:OR\ REPLACE\ )?TRIGGER\ (?P<trigger>\w+)\s.*?;$
      | ^DROP\ (?P<kind>TABLE|INDEX|FUNCTION|TRIGGER)\ (?:CONCURRENTLY\ )?(?:IF\ EXISTS\ )?(?:(?P<where>\w+)\.)?
        (?P<dropped>\w+)""",
    re.MULTILINE | re.DOTALL | re.VERBOSE,
)


@dataclass(frozen=True, slots=True)
class Expected:
    """What the applied migrations made and did not drop again: name -> the statement that makes it.

    `tables` and `functions` are those of schema campaign_stats, a table's rows included; `bodies` are the functions'.
    `indexes` are keyed by (schema, name).
    """

    tables: dict[str, str]
    indexes: dict[tuple[str, str], str]
    functions: dict[str, str]
    bodies: dict[str, str]
    triggers: dict[str, str]


def expected_of(applied: Sequence[migrations.Migration]) -> Expected:
    """What these migrations leave behind, read from their text; the newest statement for a name counts."""
    expected = Expected({}, {}, {}, {}, {})
    for migration in applied:
        for found in MADE.finditer(migration.sql):
            text = found[0]
            if name := found["table"]:
                expected.tables[name] = text
            elif name := found["rows"]:
                expected.tables[name] += f"\n{text}"
            elif name := found["index"]:
                expected.indexes[found["schema"], name] = text
            elif name := found["function"]:
                expected.functions[name] = re.sub(r"^CREATE FUNCTION", "CREATE OR REPLACE FUNCTION", text)
                expected.bodies[name] = found["body"]
            elif name := found["trigger"]:
                expected.triggers[name] = re.sub(r"^CREATE TRIGGER", "CREATE OR REPLACE TRIGGER", text)
            else:
                _drop(expected, found["kind"], found["where"], found["dropped"])
    return expected


def _drop(expected: Expected, kind: str, schema: str | None, name: str) -> None:
    if kind == "TABLE":
        expected.tables.pop(name, None)
    elif kind == "INDEX":
        expected.indexes.pop((schema or "public", name), None)
    elif kind == "FUNCTION":
        expected.functions.pop(name, None)
        expected.bodies.pop(name, None)
    else:
        expected.triggers.pop(name, None)


async def examine_database(url: str, limits: Limits, api: bool) -> list[tuple[str, list[Finding]]]:
    database = Database(url, size=1)
    try:
        await database.open()
        await database.check_reachable()
        async with database.connection() as connection:
            return [("database", []), *await examine_connection(connection, limits, api=api)]
    except ConfigError as error:
        return [("database", [setting_finding(problem) for problem in error.problems])]
    except Unavailable as error:
        return [
            (
                "database",
                [
                    an_error(
                        f"cannot be asked ({error.detail})",
                        "`run` waits for it, alive but not ready: nothing is recounted, no campaign is paused",
                        "psql \"$DATABASE_URL\" -c 'SELECT 1'  # until it works: host, port, firewall, is it running?",
                    )
                ],
            )
        ]
    finally:
        await database.close(5.0)


async def examine_connection(
    connection: Connection, limits: Limits, *, api: bool = False
) -> list[tuple[str, list[Finding]]]:
    """Every check of a database, with the rights of the connected role; `limits` are the guard's defaults.

    `api`: the sync-stats door is open, so what it needs is needed.
    """
    checks: list[tuple[str, Callable[[Connection], Awaitable[list[Finding]]]]] = [
        ("postgresql version", _version),
        ("writable", _writable),
        ("product tables", _product_tables),
        ("schema version", _schema_version),
        ("rights", lambda connection: _rights(connection, api)),
        ("row security", _row_security),
        ("updated_at trigger", _updated_at_triggers),
        ("database clock", _clock),
    ]
    expected: Expected | None = None

    async def read_applied(connection: Connection) -> list[Finding]:
        nonlocal expected
        expected = await _expected(connection)
        return []

    failed = await _made(read_applied, connection)
    if expected is not None:
        known = expected
        checks += [
            ("service tables", lambda connection: _service_tables(connection, known)),
            ("indexes", lambda connection: _indexes(connection, known)),
            ("functions", lambda connection: _functions(connection, known)),
            ("contacted_at trigger", lambda connection: _contacted_at_triggers(connection, known)),
            ("campaign versions", _versions),
            ("guard limits", lambda connection: _guard_limits(connection, limits)),
        ]
    found = [(name, await _made(check, connection)) for name, check in checks]
    return [*found, ("service tables, indexes, functions, triggers", failed)] if failed else found


async def _made(check: Callable[[Connection], Awaitable[list[Finding]]], connection: Connection) -> list[Finding]:
    """What a check found, or that it could not be made; the next one can."""
    try:
        return await check(connection)
    except asyncpg.PostgresError as error:
        return [not_checked(f"{type(error).__name__} ({error.sqlstate})")]
    except (asyncpg.InterfaceError, OSError, TimeoutError, ServiceError) as error:
        return [not_checked(type(error).__name__)]


def version_finding(server_version_num: int) -> Finding | None:
    """What is wrong with this `server_version_num` (150004 is 15.4), if anything."""
    if server_version_num >= OLDEST_POSTGRESQL * 10_000:
        return None
    return an_error(
        f"PostgreSQL {server_version_num // 10_000} is older than {OLDEST_POSTGRESQL}",
        "nothing was tried there: statements may be refused or be slow",
        f"pg_upgrade --help  # to PostgreSQL {OLDEST_POSTGRESQL} or newer",
    )


async def _version(connection: Connection) -> list[Finding]:
    finding = version_finding(await connection.fetchval("SELECT current_setting('server_version_num')::int"))
    return [] if finding is None else [finding]


async def _writable(connection: Connection) -> list[Finding]:
    follows = "`run` waits, alive but not ready: every recount is a write"
    if await connection.fetchval("SELECT pg_is_in_recovery()"):
        return [
            an_error(
                "this server is a standby: it only reads",
                follows,
                "psql \"$DATABASE_URL\" -c 'SELECT pg_promote()'  # or let DATABASE_URL name the primary, or all hosts"
                " with target_session_attrs=read-write",
            )
        ]
    row = await connection.fetchrow(
        """SELECT current_setting('transaction_read_only')::bool AS is_read_only, s.source,
                  quote_ident(current_database()) AS database, quote_ident(current_user) AS role
             FROM pg_settings s WHERE s.name = 'default_transaction_read_only'"""
    )
    if row is None or not row["is_read_only"]:
        return []
    mends = {
        "database": f"ALTER DATABASE {row['database']} RESET default_transaction_read_only;",
        "user": f"ALTER ROLE {row['role']} RESET default_transaction_read_only;",
        "database user": f"ALTER ROLE {row['role']} IN DATABASE {row['database']} RESET default_transaction_read_only;",
    }
    everywhere = "ALTER SYSTEM SET default_transaction_read_only = off; SELECT pg_reload_conf();"
    return [
        an_error(
            "sessions may only read (default_transaction_read_only is on)",
            follows,
            mends.get(row["source"], everywhere),
        )
    ]


async def _product_tables(connection: Connection) -> list[Finding]:
    reference = (resources.files("consumer.migrations") / "reference" / "0001_product_tables.sql").read_text("utf-8")
    findings = []
    for table, absent in (await migrations.absent_columns(connection)).items():
        made = re.search(rf"(?ms)^CREATE TABLE IF NOT EXISTS public\.{table} \(.*?^\);$", reference)
        if made is None:
            raise LookupError(f"{table} is no table of the reference schema")
        if absent is None:
            findings.append(
                an_error(
                    f"table public.{table} is missing", "`run` does not start; is this the product's database?", made[0]
                )
            )
            continue
        types = dict(re.findall(r"^    (\w+) +(\w+)", made[0], re.MULTILINE))
        adds = ", ".join(f"ADD COLUMN {column} {types[column]}" for column in absent)
        findings.append(
            an_error(
                f"table public.{table} lacks {', '.join(absent)}",
                "`run` does not start: it reads or writes these",
                f"ALTER TABLE public.{table} {adds};",
            )
        )
    return findings


async def _schema_version(connection: Connection) -> list[Finding]:
    try:
        pending = await migrations.pending(connection)
    except ConfigError as error:
        return [_version_problem(problem) for problem in error.problems]
    if not pending:
        return []
    return [
        an_error(
            f"the database is older than this code: it lacks {', '.join(pending)}",
            "`run` does not start",
            "campaign-stats migrate",
        )
    ]


def _version_problem(problem: str) -> Finding:
    wrong, _, fix = problem.rpartition(": ")
    if "newer" in fix:
        return an_error(
            wrong,
            "`run` does not start: it cannot know what the newer tables mean",
            "pip install --upgrade campaign-stats",
        )
    return an_error(
        wrong,
        f"`run` does not start: nobody can say what this database holds; {fix}",
        "pip install --force-reinstall --no-deps campaign-stats",
    )


async def _expected(connection: Connection) -> Expected | None:
    """What should be there; None before the first migration and in a database newer than this code."""
    if await connection.fetchval("SELECT to_regclass('campaign_stats.migrations') IS NULL"):
        return None
    numbers = {row["number"] for row in await connection.fetch("SELECT number FROM campaign_stats.migrations")}
    released = migrations.released()
    if not numbers or not numbers <= {migration.number for migration in released}:
        return None
    return expected_of([migration for migration in released if migration.number in numbers])


async def _service_tables(connection: Connection, expected: Expected) -> list[Finding]:
    rows = await connection.fetch(
        "SELECT relname FROM pg_class WHERE relnamespace = to_regnamespace('campaign_stats') AND relkind IN ('r', 'p')"
    )
    present = {row["relname"] for row in rows}
    findings = [
        an_error(
            f"table campaign_stats.{name} is missing",
            "`run` meets an error whenever it needs it and backs off for ever",
            text,
        )
        for name, text in expected.tables.items()
        if name not in present
    ]
    shards = "SELECT count(*) FROM campaign_stats.outbox_shards WHERE shard BETWEEN 0 AND $1"
    if "outbox_shards" in present and await connection.fetchval(shards, SHARDS - 1) < SHARDS:
        findings.append(
            an_error(
                f"campaign_stats.outbox_shards has lost some of its {SHARDS} rows",
                "the events of those shards are written but never published",
                f"INSERT INTO campaign_stats.outbox_shards SELECT generate_series(0, {SHARDS - 1})"
                " ON CONFLICT DO NOTHING;",
            )
        )
    if "sweep" in present and not await connection.fetchval("SELECT count(*) FROM campaign_stats.sweep"):
        findings.append(
            an_error(
                "campaign_stats.sweep has lost its row",
                "the sweep never runs: what was not hinted stays wrong",
                "INSERT INTO campaign_stats.sweep DEFAULT VALUES;",
            )
        )
    return findings


async def _indexes(connection: Connection, expected: Expected) -> list[Finding]:
    rows = await connection.fetch(
        """SELECT n.nspname AS schema, c.relname AS name, i.indisvalid AND i.indisready AS is_valid
             FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid JOIN pg_namespace n ON n.oid = c.relnamespace
            WHERE n.nspname IN ('public', 'campaign_stats')"""
    )
    present = {(row["schema"], row["name"]): row["is_valid"] for row in rows}
    slow = "recounts and the guard read whole tables: minutes instead of milliseconds, and the backlog grows"
    findings = []
    for (schema, name), text in expected.indexes.items():
        if (schema, name) not in present:
            findings.append(an_error(f"index {schema}.{name} is missing", slow, text))
        elif not present[schema, name]:
            findings.append(
                an_error(
                    f"index {schema}.{name} is INVALID: an interrupted build left it",
                    f"{slow}; writers keep it up for nothing",
                    f"REINDEX INDEX CONCURRENTLY {schema}.{name};",
                )
            )
    return findings


async def _functions(connection: Connection, expected: Expected) -> list[Finding]:
    rows = await connection.fetch(
        """SELECT proname, array_agg(prosrc) AS bodies FROM pg_proc
            WHERE pronamespace = to_regnamespace('campaign_stats') GROUP BY proname"""
    )
    present = {row["proname"]: row["bodies"] for row in rows}
    findings = []
    for name, body in expected.bodies.items():
        if name not in present:
            wrong = f"function campaign_stats.{name} is missing"
            follows = "`run` meets an error whenever it needs it and backs off for ever"
        elif body not in present[name]:
            wrong = f"function campaign_stats.{name} is not the one that our migrations made"
            follows = "numbers, locks and pauses are no longer what this version promises"
        else:
            continue
        findings.append(an_error(wrong, follows, expected.functions[name]))
    return findings


async def _rights(connection: Connection, api: bool) -> list[Finding]:
    needed = [
        *await migrations.lacking_rights(connection, migrations.RUN_RIGHTS),
        *await migrations.lacking_own_rights(connection),
    ]
    at_the_door = await migrations.lacking_rights(connection, migrations.API_RIGHTS)
    if api:
        needed, at_the_door = [*needed, *at_the_door], []
    return [
        *(an_error(problem, "`run` does not start", f"{grant};") for problem, grant in needed),
        *(
            a_warning(
                problem,
                f"`run` does not start once {PREFIX}API_TOKENS opens the sync-stats door; without it, it does",
                f"{grant};",
            )
            for problem, grant in at_the_door
        ),
    ]


async def _row_security(connection: Connection) -> list[Finding]:
    counted = await migrations.hidden_rows(connection, ("campaigns", "campaign_prospects"))
    shown = await migrations.hidden_rows(connection, DOOR_TABLES)
    return [
        *(
            an_error(problem, "`run` does not start: it would count too few prospects", f"{mend};")
            for problem, mend in counted
        ),
        *(a_warning(problem, "calls of sync-stats are answered 503", f"{mend};") for problem, mend in shown),
    ]


async def _contacted_at_triggers(connection: Connection, expected: Expected) -> list[Finding]:
    rows = await connection.fetch(statement("doctor_triggers"), "campaign_prospects")
    present = {row["name"]: row for row in rows}
    follows = (
        "prospects that are mailed now get no time or a wrong one: the guard's window misses them, and after a resume"
        " it does not pause"
    )
    findings = []
    for name, text in expected.triggers.items():
        row = present.get(name)
        wrong, mend = "", text
        if row is None:
            wrong = f"trigger {name} on public.campaign_prospects is missing"
        elif not _is_ours(text, row["definition"]):
            wrong = f"trigger {name} on public.campaign_prospects is not the one that our migrations made"
        elif not row["fires"]:
            wrong = f"trigger {name} on public.campaign_prospects is disabled"
            mend = f"ALTER TABLE public.campaign_prospects ENABLE TRIGGER {name};"
        if wrong:
            findings.append(an_error(wrong, follows, mend))
    return findings + [
        a_warning(
            f"trigger {row['name']} ({row['function']}) on public.campaign_prospects sets contacted_at too",
            "the guard's window is ordered by its times: wrong ones pause too early, too late or not at all",
            f"ALTER TABLE public.campaign_prospects DISABLE TRIGGER {row['quoted']};",
        )
        for row in rows
        if row["name"] not in expected.triggers and row["fires"] and "contacted_at" in row["assigns"]
    ]


def _is_ours(text: str, definition: str) -> bool:
    """Whether a trigger as PostgreSQL writes it fires when ours does, with our function; conditions it writes anew."""
    event = re.search(r"BEFORE .*? ON [\w.]+", text)
    function = re.search(r"EXECUTE FUNCTION ([\w.]+)\(\)", text)
    return (
        event is not None
        and function is not None
        and f" {event[0]} " in definition
        and definition.endswith(f" EXECUTE FUNCTION {function[1]}()")
        and ("WHEN (" in text) == ("WHEN (" in definition)
    )


async def _updated_at_triggers(connection: Connection) -> list[Finding]:
    return [
        a_warning(
            f"trigger {row['name']} ({row['function']}) on public.campaigns sets updated_at itself",
            "updated_at moves with every recount, also with those that change nothing",
            without_recounts(row["definition"], row["quoted_for_update"]),
        )
        for row in await connection.fetch(statement("doctor_triggers"), "campaigns")
        if row["fires"] and row["fires_on_recount"] and "updated_at" in row["assigns"]
    ]


def without_recounts(definition: str, second_name: str) -> str:
    """SQL that makes an update trigger leave recounts alone: only those move last_synced_at.

    A condition on OLD is refused for inserts: a trigger for both becomes two, the one for updates is `second_name`.
    """
    condition = "NEW.last_synced_at IS NOT DISTINCT FROM OLD.last_synced_at"
    replacing = re.sub(r"^CREATE TRIGGER", "CREATE OR REPLACE TRIGGER", definition)
    both = re.match(r"(CREATE OR REPLACE TRIGGER )(.*?)( BEFORE )INSERT OR (UPDATE.*)", replacing, re.DOTALL)
    insert = ""
    if both is not None:
        on = re.sub(r"^UPDATE(?: OF .*?)? ON ", "INSERT ON ", both[4])
        insert = f"{both[1]}{both[2]}{both[3]}{on};\n"
        replacing = f"{both[1]}{second_name}{both[3]}{both[4]}"
    if " WHEN (" in replacing:
        return insert + re.sub(r" WHEN (\(.*\)) EXECUTE ", rf" WHEN (\1 AND {condition}) EXECUTE ", replacing) + ";"
    return insert + replacing.replace(" EXECUTE ", f" WHEN ({condition}) EXECUTE ", 1) + ";"


def clock_offset_s(before: datetime, server: datetime, after: datetime) -> float:
    """How far a clock is ahead (> 0) or behind, if it was read between these two moments here; 0 when it fits."""
    if server > after:
        return (server - after).total_seconds()
    return min(0.0, (server - before).total_seconds())


def clock_finding(offset_s: float) -> Finding | None:
    """What a database clock that is this far from ours means."""
    if abs(offset_s) <= CLOCK_TOLERANCE_S:
        return None
    side = "ahead of" if offset_s > 0 else "behind"
    return a_warning(
        f"the database's clock is {abs(offset_s):.0f} s {side} this machine's",
        "one of them is wrong: times in events, retries and pauses lie beside what people and other services see",
        "timedatectl set-ntp true  # on both machines",
    )


async def _clock(connection: Connection) -> list[Finding]:
    before = datetime.now(UTC)
    server = await connection.fetchval("SELECT clock_timestamp()")
    finding = clock_finding(clock_offset_s(before, server, datetime.now(UTC)))
    return [] if finding is None else [finding]


async def _versions(connection: Connection) -> list[Finding]:
    row = await connection.fetchrow(statement("doctor_versions"), CLOCK_TOLERANCE_S)
    if row is None or not row["campaigns"]:
        return []
    return [
        a_warning(
            f"{row['campaigns']} campaigns have a version from the future, up to {row['ahead_s']:.0f} s ahead of"
            " the database's clock: it went backwards, or runs behind now",
            "versions go on rising by one; but what was to be tried again, or was paused, waits for that time to come"
            " again: the guard sees no contact made before it",
            "timedatectl set-ntp true  # on the database's machine",
        )
    ]


async def _guard_limits(connection: Connection, default: Limits) -> list[Finding]:
    findings = []
    for row in await connection.fetch(statement("doctor_limits")):
        own, owner = override(row["own"]), override(row["owner"])
        if row["scope"] == "user":
            ignored = resolve(default, own, None).ignored
        else:  # what is wrong with its owner's is said there
            usable = owner if owner is not None and not resolve(default, owner, None).ignored else None
            ignored = resolve(default, usable, own).ignored
        if ignored:
            wrong = f"campaign_stats.guard_limits, {row['scope']} {row['id']}: {'; '.join(ignored)}"
            mend = f"{row['without']};  -- or UPDATE it with values that can be used"
            findings.append(a_warning(wrong, "the guard ignores it: the next level decides", mend))
    return findings
