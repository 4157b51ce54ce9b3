"""Numbered SQL, forward only: brings a database to the version this code needs.

A file runs in one transaction, together with its row in `campaign_stats.migrations`; one whose first line says
`-- concurrently: INDEX` builds an index on a product's table outside a transaction, so that writers go on, and drops an
invalid leftover of an interrupted build first. A file is never edited once it was released: its checksum is kept.

The product's tables may be partitioned: an index is then built partition by partition, and storage options are set on
the partitions.

Between two releases a file only expands: what an older release reads stays as it is, so both work on one database, and
`back_to` lets the older one start on it again. Such a file may be applied twice. Only the release after next may
contract; the first line of its file says `-- contracts: last read by VERSION` (a test holds both).

The product works on meanwhile: nobody who writes to its tables is held up by us for longer than about LOCK_TIMEOUT_S.
"""

import asyncio
import hashlib
import re
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from importlib import resources
from typing import Final

import asyncpg

from consumer.database import LOST, Connection, refusal
from consumer.errors import ConfigError, Unavailable

LOCK_KEY: Final = 0x63616D7073746174  # "campstat": any number that nobody else uses for an advisory lock here
LOCK_POLL_S: Final = 0.1
LOCK_DEADLINE_S: Final = 600.0  # building an index on 100 million rows takes minutes
LOCK_TIMEOUT_S: Final = 0.5  # one try for a lock on a product's table: whoever writes there queues behind our request
LOCK_PAUSE_S: Final = 1.0  # between two tries: those who queued get through
TABLES_DEADLINE_S: Final = 120.0  # for all tries of one file
SESSION: Final = {
    "application_name": "campaign-stats migrate",
    "lock_timeout": "10s",
    "statement_timeout": "0",  # a role's or database's own would end a long index build
    "idle_in_transaction_session_timeout": "0",
}
AWAY: Final = (
    *LOST,
    asyncpg.PostgresConnectionError,
    asyncpg.InsufficientResourcesError,
    asyncpg.OperatorInterventionError,
    asyncpg.LockNotAvailableError,
)
CONCURRENTLY: Final = re.compile(r"-- concurrently: (\w+)\n")
BUILD: Final = re.compile(
    r"CREATE INDEX CONCURRENTLY IF NOT EXISTS (?P<index>\w+)\s+ON (?P<table>public\.\w+)(?P<rest>[^;]*);"
)
STORAGE: Final = re.compile(r"ALTER TABLE (?P<table>public\.\w+) SET (?P<options>\([^;]*\));")
PART: Final = """SELECT h.inhrelid::regclass::text FROM pg_inherits h JOIN pg_index i ON i.indexrelid = h.inhrelid
                  WHERE h.inhparent = to_regclass($1) AND i.indrelid = $2"""
STUCK: Final = """SELECT NOT indisvalid AND (SELECT count(*) FROM pg_partition_tree(indrelid))
                                        = (SELECT count(*) FROM pg_partition_tree(indexrelid))
                    FROM pg_index WHERE indexrelid = to_regclass($1)"""

LAST_OF: Final = {"0.1.0": 7}
"""Release -> the number of its last migration."""

PRODUCT_COLUMNS: Final[dict[str, tuple[str, ...]]] = {
    "campaigns": (
        "id", "user_id", "type", "name", "status", "daily_limit", "stop_on_reply", "open_tracking", "signature",
        "skip_other_campaigns", "operating_hours", "stats", "last_synced_at", "pause_reason", "created_at",
        "updated_at",
    ),
    "campaign_prospects": ("id", "campaign_id", "status", "contacted_at"),
    "accounts": ("id", "type", "email_address", "display_name", "status", "daily_limit"),
    "campaign_sender_accounts": ("campaign_id", "account_id"),
}  # fmt: skip
"""What we read or write of the product's tables, all in schema `public`."""

CHANGED_TABLES: Final = ("public.campaigns", "public.campaign_prospects")
"""The product's tables that a migration may change."""

RUN_RIGHTS: Final = (
    ("public.campaigns", "SELECT", PRODUCT_COLUMNS["campaigns"]),
    ("public.campaigns", "UPDATE", ("stats", "last_synced_at", "updated_at", "status", "pause_reason")),
    ("public.campaign_prospects", "SELECT", PRODUCT_COLUMNS["campaign_prospects"]),
)
"""Table, right, columns: all that `run` does to the product's tables."""

API_RIGHTS: Final = (
    ("public.accounts", "SELECT", PRODUCT_COLUMNS["accounts"]),
    ("public.campaign_sender_accounts", "SELECT", PRODUCT_COLUMNS["campaign_sender_accounts"]),
)
"""The same, only needed where the sync-stats door is open."""

OWN_RIGHTS: Final = {
    "campaign_state": ("SELECT", "INSERT", "UPDATE", "DELETE"),
    "deferred": ("SELECT", "INSERT", "UPDATE", "DELETE"),
    "guard_decisions": ("SELECT", "INSERT", "DELETE"),
    "guard_limits": ("SELECT",),
    "migrations": ("SELECT",),
    "outbox": ("SELECT", "INSERT", "UPDATE", "DELETE"),
    "outbox_shards": ("SELECT", "UPDATE"),
    "redriven": ("SELECT", "INSERT", "UPDATE", "DELETE"),
    "sweep": ("SELECT", "UPDATE"),
}
"""Table of schema campaign_stats -> all that `run` and the commands do to it; besides USAGE on the schema, and EXECUTE
on its functions, which everybody has by default."""


@dataclass(frozen=True, slots=True)
class Migration:
    """One file: `number` and `name` from its file name, `checksum` = SHA-256 hex of its bytes."""

    number: int
    name: str
    sql: str
    checksum: str


def released() -> list[Migration]:
    """The migrations of this code, in order."""
    found = [
        Migration(int(file.name[:4]), file.name, file.read_text("utf-8"), hashlib.sha256(file.read_bytes()).hexdigest())
        for file in resources.files(__name__).iterdir()
        if re.fullmatch(r"\d{4}_\w+\.sql", file.name)
    ]
    return sorted(found, key=lambda migration: migration.number)


async def migrate(database_url: str, *, reference_schema: bool = False) -> list[str]:
    """Apply what is missing and return the names of the files applied; several processes at once are safe.

    `reference_schema` first creates the product's tables and functions where they do not exist yet.
    Raises ConfigError for a changed file, a database newer than this code, missing tables or columns, missing rights, a
    product's schema that a file does not fit; Unavailable when the database is away, a product's table cannot be had
    within TABLES_DEADLINE_S, or another process holds the migration lock for longer than ten minutes. What was applied
    by then stays; a later call goes on from there.
    """
    async with _session(database_url) as connection, _alone(connection):
        if reference_schema:
            reference = resources.files(__name__) / "reference" / "0001_product_tables.sql"
            async with connection.transaction():
                await connection.execute(reference.read_text("utf-8"))
        return await _apply(connection)


async def back_to(database_url: str, release: str) -> list[str]:
    """Let an older release start on this database again; returns the names of the migrations it does not know.

    What they added stays and is not read; `migrate` of a newer version applies them again. Raises ConfigError for a
    release that is none of LAST_OF, or without the right; Unavailable when the database is away.
    """
    if release not in LAST_OF:
        raise ConfigError([f"there is no way back to {release}: give one of {', '.join(LAST_OF)}"])
    async with _session(database_url) as connection, _alone(connection):
        at = 0
        if await connection.fetchval("SELECT to_regclass('campaign_stats.migrations') IS NOT NULL"):
            at = await connection.fetchval("SELECT coalesce(max(number), 0) FROM campaign_stats.migrations")
        if at < LAST_OF[release]:
            raise ConfigError(
                [f"the database is older than release {release}: run `campaign-stats migrate` of that release"]
            )
        rows = await connection.fetch(
            "WITH gone AS (DELETE FROM campaign_stats.migrations WHERE number > $1 RETURNING number, name)"
            " SELECT name FROM gone ORDER BY number",
            LAST_OF[release],
        )
        return [row["name"] for row in rows]


@asynccontextmanager
async def _session(database_url: str) -> AsyncIterator[asyncpg.Connection]:
    """Raises ConfigError and Unavailable, as `migrate` says."""
    try:
        connection = await asyncpg.connect(database_url, server_settings=SESSION)
    except (asyncpg.PostgresError, ValueError, OverflowError, *LOST) as error:
        if problem := refusal(error):
            raise ConfigError([problem]) from error
        raise Unavailable("database", f"cannot connect: {type(error).__name__}") from error
    try:
        yield connection
    except asyncpg.InsufficientPrivilegeError as error:
        raise ConfigError([f"the role may not migrate: {error}; run `migrate` as the owner of the tables"]) from error
    except AWAY as error:
        raise Unavailable("database", f"{type(error).__name__} while migrating; run `migrate` again") from error
    except asyncpg.PostgresError as error:
        raise ConfigError(
            [f"the product's schema does not fit: {error.args[0]}; deploy/adopting.md says what it must be"]
        ) from error
    finally:
        with suppress(*LOST):
            await connection.close(timeout=5)


async def problems(connection: Connection, *, api: bool = False) -> list[str]:
    """Everything that keeps `run` and the commands from working on this database, a sentence each with its fix.

    `api`: also what the sync-stats door needs.
    """
    found = [*await missing_columns(connection), *await missing_rights(connection, api=api)]
    try:
        missing = await pending(connection)
    except ConfigError as error:
        return [*found, *error.problems]
    except asyncpg.InsufficientPrivilegeError:  # said above
        return found
    if missing or await connection.fetchval("SELECT to_regnamespace('campaign_stats') IS NULL"):
        found.append(f"the database lacks {len(missing) or 'all'} of our migrations: run `campaign-stats migrate`")
    return found


async def missing_columns(connection: Connection) -> list[str]:
    """One sentence per product table or column that is not there, each with what to do."""
    return [
        f"table public.{table} is missing: create it, or use `migrate --reference-schema` for a trial"
        if absent is None
        else f"table public.{table} lacks {', '.join(absent)}: add the column(s) to the product's schema"
        for table, absent in (await absent_columns(connection)).items()
    ]


async def absent_columns(connection: Connection) -> dict[str, tuple[str, ...] | None]:
    """The product's tables that lack something: the absent columns, None when the table itself is not there."""
    rows = await connection.fetch(
        """SELECT c.relname AS name, array_agg(a.attname) AS columns
             FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
            WHERE c.relnamespace = 'public'::regnamespace AND c.relname = ANY ($1) GROUP BY c.relname""",
        list(PRODUCT_COLUMNS),
    )
    present = {row["name"]: set(row["columns"]) for row in rows}
    found: dict[str, tuple[str, ...] | None] = {}
    for table, columns in PRODUCT_COLUMNS.items():
        if table not in present:
            found[table] = None
        elif absent := tuple(column for column in columns if column not in present[table]):
            found[table] = absent
    return found


async def missing_rights(connection: Connection, *, api: bool = False) -> list[str]:
    """One sentence per right the connected role lacks for `run`, each with the statement that grants it."""
    lacking = [
        *await lacking_rights(connection, (*RUN_RIGHTS, *API_RIGHTS) if api else RUN_RIGHTS),
        *await lacking_own_rights(connection),
        *await hidden_rows(connection, ("campaigns", "campaign_prospects")),
    ]
    return [f"{problem}: {statement}" for problem, statement in lacking]


async def lacking_rights(
    connection: Connection, rights: Sequence[tuple[str, str, Sequence[str]]]
) -> list[tuple[str, str]]:
    """What the connected role may not do of `rights` (table, right, columns), and the statement that grants it.

    Tables and columns that do not exist are left out.
    """
    found = []
    for table, right, columns in rights:
        row = await connection.fetchrow(
            """SELECT string_agg(wanted.name, ', ' ORDER BY wanted.place) AS names, quote_ident(current_user) AS role
                 FROM unnest($2::text[]) WITH ORDINALITY AS wanted (name, place)
                 JOIN pg_attribute a ON a.attname = wanted.name AND a.attnum > 0 AND NOT a.attisdropped
                 JOIN pg_class c ON c.oid = a.attrelid
                WHERE c.relnamespace::regnamespace::text || '.' || c.relname = $1
                  AND NOT has_column_privilege(c.oid, a.attnum, $3)""",
            table,
            columns,
            right,
        )
        if row is not None and row["names"]:
            what = f"the role may not {right} {row['names']} of {table}"
            found.append((what, f"GRANT {right} ({row['names']}) ON {table} TO {row['role']}"))
    return found


async def lacking_own_rights(connection: Connection) -> list[tuple[str, str]]:
    """The same for using both schemas, and for our own tables (OWN_RIGHTS) and functions."""
    rows = await connection.fetch(
        """SELECT format('the role may not use schema %I', n.nspname) AS problem,
                  format('GRANT USAGE ON SCHEMA %I TO %I', n.nspname, current_user) AS statement
             FROM pg_namespace n
            WHERE n.nspname IN ('public', 'campaign_stats') AND NOT has_schema_privilege(n.oid, 'USAGE')
           UNION ALL
           SELECT format('the role may not %s %s', r, c.oid::regclass),
                  format('GRANT %s ON %s TO %I', r, c.oid::regclass, current_user)
             FROM unnest($1::text[], $2::text[]) AS wanted (name, r) JOIN pg_class c ON c.relname = wanted.name
            WHERE c.relnamespace = to_regnamespace('campaign_stats') AND NOT has_table_privilege(c.oid, r)
           UNION ALL
           SELECT format('the role may not EXECUTE %s', p.oid::regprocedure),
                  format('GRANT EXECUTE ON FUNCTION %s TO %I', p.oid::regprocedure, current_user)
             FROM pg_proc p
            WHERE p.pronamespace = to_regnamespace('campaign_stats') AND NOT has_function_privilege(p.oid, 'EXECUTE')
              AND p.prorettype <> 'trigger'::regtype  -- asked for only when the trigger is made
           ORDER BY 2""",
        [table for table, rights in OWN_RIGHTS.items() for _ in rights],
        [right for rights in OWN_RIGHTS.values() for right in rights],
    )
    return [(row["problem"], row["statement"]) for row in rows]


async def hidden_rows(connection: Connection, tables: Sequence[str]) -> list[tuple[str, str]]:
    """Which of the product's `tables` row security hides from the connected role, and the statement that shows them."""
    rows = await connection.fetch(
        """SELECT format('row security hides rows of %s from the role', c.oid::regclass) AS problem,
                  format('ALTER ROLE %I BYPASSRLS', current_user) AS statement
             FROM pg_class c, pg_roles r
            WHERE c.relnamespace = 'public'::regnamespace AND c.relname = ANY ($1)
              AND r.rolname = current_user AND c.relrowsecurity AND NOT r.rolbypassrls AND NOT r.rolsuper
              AND (c.relforcerowsecurity OR NOT pg_has_role(c.relowner, 'USAGE'))
            ORDER BY 1""",
        tables,
    )
    return [(row["problem"], row["statement"]) for row in rows]


async def pending(connection: Connection) -> list[str]:
    """Names of the migrations that the database still lacks, in order; all of them when it has none.

    Raises ConfigError when an applied file was changed since or when the database is newer than this code.
    """
    if await connection.fetchval("SELECT to_regclass('campaign_stats.migrations') IS NULL"):
        return [migration.name for migration in released()]
    known = {migration.number: migration for migration in released()}
    problems = []
    done = set()
    for row in await connection.fetch("SELECT number, name, checksum FROM campaign_stats.migrations ORDER BY number"):
        migration = known.get(row["number"])
        if migration is None:
            problems.append(
                f"the database is newer than this code (it has {row['name']}): install a newer campaign-stats"
            )
        elif migration.checksum != row["checksum"]:
            problems.append(
                f"migration {migration.name} was changed after it was applied: restore the file and put the change into"
                " a new one"
            )
        done.add(row["number"])
    if problems:
        raise ConfigError(problems)
    return [migration.name for migration in released() if migration.number not in done]


@asynccontextmanager
async def _alone(connection: Connection) -> AsyncIterator[None]:
    # Polled: a session that waits inside pg_advisory_lock holds a snapshot, and CREATE INDEX CONCURRENTLY waits for it.
    deadline = asyncio.get_running_loop().time() + LOCK_DEADLINE_S
    while not await connection.fetchval("SELECT pg_try_advisory_lock($1)", LOCK_KEY):
        if asyncio.get_running_loop().time() > deadline:
            raise Unavailable("database", "another process has been migrating for ten minutes")
        await asyncio.sleep(LOCK_POLL_S)
    try:
        yield
    finally:
        if not connection.is_closed():
            await connection.execute("SELECT pg_advisory_unlock($1)", LOCK_KEY)


async def _apply(connection: Connection) -> list[str]:
    if problems := await missing_columns(connection):
        raise ConfigError(problems)
    await connection.execute("CREATE SCHEMA IF NOT EXISTS campaign_stats")
    await connection.execute(
        """CREATE TABLE IF NOT EXISTS campaign_stats.migrations (
               number integer PRIMARY KEY, name text NOT NULL, checksum text NOT NULL,
               applied_at timestamptz NOT NULL DEFAULT clock_timestamp())"""
    )
    missing = await pending(connection)
    for migration in released():
        if migration.name not in missing:
            continue
        if CONCURRENTLY.match(migration.sql):
            await _build_index(connection, migration)
            await _record(connection, migration)
        else:
            sql = await _for_partitions(connection, migration.sql)
            await _in_transaction(connection, migration.name, sql, migration)
    return missing


async def _build_index(connection: Connection, migration: Migration) -> None:
    """Build the index of a file whose first line says so; on a partitioned table that cannot be done in one go.

    There comes an index of no rows on the table alone first, then that of each partition, which is made a part of it.
    With the last one the whole is valid. What an interrupted call left is used, or dropped if it is half an index or
    the partition that it still lacked is gone: it has all its parts then, and nothing would ever make it valid.
    """
    build = BUILD.search(migration.sql)
    if build is None:
        raise LookupError(f"{migration.name} does not build its index in the form that is known here")
    whole: dict[int, str] = {}  # a table -> its index
    for table in await _tree(connection, build["table"]):
        parent = table["parent"]
        name = build["index"] if parent is None else f"{build['index']}_{table['oid']}"
        if parent is not None and (part := await connection.fetchval(PART, whole[parent], table["oid"])):
            whole[table["oid"]] = part
            continue
        if table["is_partitioned"]:
            whole[table["oid"]] = f"{table['schema']}.{name}"
            if parent is None and await connection.fetchval(STUCK, whole[table["oid"]]):
                await _in_transaction(connection, migration.name, f"DROP INDEX {whole[table['oid']]}")
            create = f"CREATE INDEX IF NOT EXISTS {name} ON ONLY {table['name']}{build['rest']}"
            await _in_transaction(connection, migration.name, create)
        else:
            await connection.execute("SET lock_timeout = 0")  # waits for old transactions, but holds nobody up
            await _drop_invalid(connection, f"{table['schema']}.{name}")
            create = f"CREATE INDEX CONCURRENTLY IF NOT EXISTS {name} ON {table['name']}{build['rest']}"
            await connection.execute(create)
            await connection.execute("RESET lock_timeout")
        if parent is not None:
            attach = f"ALTER INDEX {whole[parent]} ATTACH PARTITION {table['schema']}.{name}"
            await _in_transaction(connection, migration.name, attach)
    valid = "SELECT indisvalid FROM pg_index WHERE indexrelid = to_regclass($1)"
    if not await connection.fetchval(valid, f"public.{build['index']}"):
        raise Unavailable(
            "database",
            f"{build['table']} got a partition while {migration.name} built its index: run `migrate` again (what was"
            " built stays)",
        )


async def _for_partitions(connection: Connection, sql: str) -> str:
    """A partitioned table takes no storage options: they are set on the partitions that there are."""
    for found in list(STORAGE.finditer(sql)):
        tables = [table["name"] for table in await _tree(connection, found["table"]) if not table["is_partitioned"]]
        sql = sql.replace(found[0], "\n".join(f"ALTER TABLE {table} SET {found['options']};" for table in tables))
    return sql


async def _tree(connection: Connection, table: str) -> list[asyncpg.Record]:
    """A table and, if it is partitioned, all its partitions, each after its `parent` (an oid). Names as in SQL."""
    return await connection.fetch(
        """SELECT c.oid, t.parentrelid::oid AS parent, c.relkind = 'p' AS is_partitioned,
                  quote_ident(n.nspname) AS schema, format('%I.%I', n.nspname, c.relname) AS name
             FROM (SELECT $1::text::regclass AS relid, NULL::regclass AS parentrelid, 0 AS level
                    UNION ALL
                   SELECT relid, parentrelid, level FROM pg_partition_tree($1::text::regclass) WHERE level > 0) AS t
             JOIN pg_class c ON c.oid = t.relid JOIN pg_namespace n ON n.oid = c.relnamespace
            ORDER BY t.level, c.oid""",
        table,
    )


async def _in_transaction(connection: Connection, name: str, sql: str, migration: Migration | None = None) -> None:
    """Run SQL of the file `name`, with the record of `migration` if it is given, in one transaction, a short try after
    the other while somebody holds a product's table.

    First a lock that no reader or writer notices, but a running autovacuum gives way to and a later one waits for: then
    only writers can be in the way of the file's own locks, and a short try is long enough for those that are quick.
    Raises Unavailable, which names the oldest holder, after TABLES_DEADLINE_S.
    """
    deadline = asyncio.get_running_loop().time() + TABLES_DEADLINE_S
    while True:
        try:
            async with connection.transaction():
                await connection.execute(f"LOCK TABLE {', '.join(CHANGED_TABLES)} IN SHARE UPDATE EXCLUSIVE MODE")
                await connection.execute(f"SET LOCAL lock_timeout = '{LOCK_TIMEOUT_S * 1_000:.0f}ms'")
                await connection.execute(sql)
                if migration is not None:
                    await _record(connection, migration)
            return
        except (asyncpg.LockNotAvailableError, asyncpg.DeadlockDetectedError) as error:
            if asyncio.get_running_loop().time() > deadline:
                holder = await _holder(connection)
                raise Unavailable(
                    "database",
                    f"{name} could not lock a table of the product within {TABLES_DEADLINE_S:g} s, because"
                    f" {holder}: let it end, then run `migrate` again (what was applied stays)",
                ) from error
        await asyncio.sleep(LOCK_PAUSE_S)


async def _holder(connection: Connection) -> str:
    row = await connection.fetchrow(
        """SELECT l.pid, a.usename, a.application_name
             FROM pg_locks l JOIN pg_stat_activity a ON a.pid = l.pid
            WHERE l.relation = ANY ($1::text[]::regclass[]) AND l.granted AND l.pid <> pg_backend_pid()
              AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
              AND l.mode NOT IN ('AccessShareLock', 'RowShareLock')
            ORDER BY a.xact_start NULLS LAST LIMIT 1""",
        list(CHANGED_TABLES),
    )
    if row is None:
        return "others held it each time"
    return f"process {row['pid']} (role {row['usename']}, application {row['application_name'] or 'unknown'}) holds one"


async def _record(connection: Connection, migration: Migration) -> None:
    await connection.execute(
        "INSERT INTO campaign_stats.migrations (number, name, checksum) VALUES ($1, $2, $3)",
        migration.number,
        migration.name,
        migration.checksum,
    )


async def _drop_invalid(connection: Connection, index: str) -> None:
    invalid = await connection.fetchval(
        "SELECT 1 FROM pg_index WHERE indexrelid = to_regclass($1) AND NOT indisvalid", index
    )
    if invalid:
        await connection.execute(f"DROP INDEX CONCURRENTLY {index}")
