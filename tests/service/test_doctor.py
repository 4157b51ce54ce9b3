"""`campaign-stats doctor`: every fault is put into a real server, found, and mended with what doctor says."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from importlib import resources
from pathlib import Path
from typing import Any
from uuid import uuid4

import asyncpg
import pytest

from consumer import broker, doctor, migrations
from consumer.broker import Cluster, TopicShape
from consumer.database import Connection, Database
from consumer.demo.servers import Postgres
from consumer.guard import Limits
from schemas.topics import Topics
from tests.conftest import Kafka, command
from tests.world import add_campaign

ONE_BROKER = ("replicas", "warning")  # the tests' broker stands alone, and doctor says so
SECRET = "s3cr3t-pw"


async def examined(environment: dict[str, str]) -> tuple[int, list[dict[str, Any]]]:
    """Exit code and what `doctor --json` found, but that the broker stands alone."""
    code, out, error = await command(environment, "doctor", "--json")
    assert error == ""
    assert environment.get("DATABASE_URL", SECRET) not in out
    document = json.loads(out)
    assert document["ok"] is (code == 0)
    found = [line for line in document["checks"] if line["level"] != "ok"]
    for line in found:
        assert list(line) == ["check", "level", "wrong", "follows", "mend"]
        assert all(line.values())
    assert all(
        line["wrong"] is line["follows"] is line["mend"] is None for line in document["checks"] if line["level"] == "ok"
    )
    return code, [line for line in found if (line["check"], line["level"]) != ONE_BROKER]


@asynccontextmanager
async def session(url: str) -> AsyncIterator[Connection]:
    """A session as doctor has it."""
    database = Database(url, size=1)
    await database.open()
    try:
        async with database.connection() as connection:
            yield connection
    finally:
        await database.close(5.0)


async def still_wrong(url: str) -> list[str]:
    """What is wrong with a database now, asked in this process."""
    async with session(url) as connection:
        checks = await doctor.database.examine_connection(connection, Limits())
        return [finding.wrong for _, findings in checks for finding in findings]


async def mend(db: asyncpg.Connection, finding: dict[str, Any]) -> None:
    """Do as doctor says, statement by statement where one may not run inside a transaction."""
    if "CONCURRENTLY" in finding["mend"]:
        await db.execute("SET lock_timeout = 0")
    await db.execute(finding["mend"])


@pytest.fixture
async def role(db: asyncpg.Connection) -> AsyncIterator[str]:
    """A role that may do exactly what the documentation asks for, column by column."""
    name = f'"svc {uuid4().hex[:8]}"'  # as a name that has to be quoted
    await db.execute(
        f"""CREATE ROLE {name} LOGIN;
            GRANT USAGE ON SCHEMA campaign_stats TO {name}"""
    )
    for table, rights in migrations.OWN_RIGHTS.items():
        await db.execute(f"GRANT {', '.join(rights)} ON campaign_stats.{table} TO {name}")
    for table, right, columns in (*migrations.RUN_RIGHTS, *migrations.API_RIGHTS):
        await db.execute(f"GRANT {right} ({', '.join(columns)}) ON {table} TO {name}")
    yield name
    await db.execute(f"DROP OWNED BY {name}; DROP ROLE {name}")


def url_of(role: str, url: str) -> str:
    return url.replace("postgres@", role.strip('"').replace(" ", "%20") + "@", 1)


async def test_a_healthy_installation_is_told_line_by_line(
    environment: dict[str, str], db: asyncpg.Connection, role: str
) -> None:
    await add_campaign(db, {"sent": 3})
    environment["DATABASE_URL"] = url_of(role, environment["DATABASE_URL"])
    assert await examined(environment) == (0, [])
    code, out, error = await command(environment, "doctor")
    assert (code, error) == (0, "")
    assert [line.split()[1:] for line in out.splitlines() if line.startswith("ok ")] == [
        ["settings"], ["database"], ["postgresql", "version"], ["writable"], ["product", "tables"],
        ["schema", "version"], ["rights"], ["row", "security"], ["updated_at", "trigger"], ["database", "clock"],
        ["service", "tables"], ["indexes"], ["functions"], ["contacted_at", "trigger"], ["campaign", "versions"],
        ["guard", "limits"], ["kafka"], ["kafka", "rights"], ["topics"], ["partitions"], ["cleanup", "policy"],
    ]  # fmt: skip
    assert "follows: when that broker is away" in out
    assert out.splitlines()[-1].startswith("0 errors, 1 warnings.")


async def test_doctor_says_in_its_help_how_it_is_called(environment: dict[str, str]) -> None:
    code, out, _ = await command(environment, "doctor", "--help")
    assert code == 0
    assert "campaign-stats doctor --json" in out


async def test_wrong_and_missing_settings_are_told_and_hide_nothing_else(
    environment: dict[str, str], db: asyncpg.Connection
) -> None:
    await db.execute("ALTER TABLE accounts DROP COLUMN display_name")
    environment |= {
        "CAMPAIGN_STATS_GUARD_MIN_SENT": "1000",
        "CAMPAIGN_STATS_HTTP_PORT": "99999",
        "CAMPAIGN_STATS_LOG_LEVEL": "LOUD",
    }
    code, found = await examined(environment)
    assert code == 2
    assert [(line["check"], line["mend"].split()[:2]) for line in found] == [
        ("settings", ["unset", "CAMPAIGN_STATS_HTTP_PORT"]),
        ("settings", ["unset", "CAMPAIGN_STATS_LOG_LEVEL"]),
        ("settings", ["unset", "CAMPAIGN_STATS_GUARD_THRESHOLD_BP"]),
        ("product tables", ["ALTER", "TABLE"]),
    ]
    del environment["KAFKA_BOOTSTRAP_SERVERS"]
    _, found = await examined(environment)
    assert (found[-1]["check"], found[-2]["check"]) == ("kafka", "product tables")
    assert "KAFKA_BOOTSTRAP_SERVERS: is required" in found[0]["wrong"]
    assert found[0]["mend"] == "export KAFKA_BOOTSTRAP_SERVERS='host:9092'"


async def test_a_missing_database_url_does_not_keep_it_from_the_topics(environment: dict[str, str]) -> None:
    del environment["DATABASE_URL"]
    environment["CAMPAIGN_STATS_TOPIC_PREFIX"] = "nowhere."
    code, found = await examined(environment)
    assert code == 2
    assert [line["check"] for line in found] == ["settings", "database", *["topics"] * 6]
    assert found[0]["mend"].startswith("export DATABASE_URL=")


@pytest.mark.parametrize(
    ("url", "mends"),
    [
        (f"postgresql://svc:{SECRET}@127.0.0.1:1/db", 'psql "$DATABASE_URL"'),
        (f"postgresql://svc:{SECRET}/x@h/db", "export DATABASE_URL="),
        (f"postgresql://svc:{SECRET}@127.0.0.1:1/db?ssl_min_protocol_version=7", "export DATABASE_URL="),
    ],
)
async def test_a_database_out_of_reach_is_told_without_its_password_and_topics_are_still_checked(
    environment: dict[str, str], url: str, mends: str
) -> None:
    environment |= {"DATABASE_URL": url, "CAMPAIGN_STATS_TOPIC_PREFIX": "nowhere."}
    code, out, error = await command(environment, "doctor")
    assert code == 2
    assert SECRET not in out + error
    assert "Traceback" not in error
    assert mends in out
    assert out.count("topic nowhere.") == 6


async def test_a_broker_out_of_reach_does_not_keep_it_from_the_database(
    environment: dict[str, str], db: asyncpg.Connection
) -> None:
    await db.execute("DROP TABLE campaign_sender_accounts")
    environment["KAFKA_BOOTSTRAP_SERVERS"] = "127.0.0.1:1"
    code, found = await examined(environment)
    assert code == 2
    assert [line["check"] for line in found] == ["product tables", "kafka"]
    assert "--bootstrap-server 127.0.0.1:1" in found[1]["mend"]


async def test_a_database_that_is_none_of_ours_is_told_from_one_that_is_away(
    environment: dict[str, str], database_url: str
) -> None:
    name = database_url.split("@/")[1].split("?")[0]
    empty = {**environment, "DATABASE_URL": database_url.replace(name, "postgres")}
    code, found = await examined(empty)
    assert code == 2
    assert [line["check"] for line in found] == [*["product tables"] * 4, "schema version"]
    assert found[-1]["mend"] == "campaign-stats migrate"
    code, found = await examined({**environment, "DATABASE_URL": database_url.replace(name, "no_such_database")})
    assert code == 2
    assert "the server refuses it (3D000)" in found[0]["wrong"]


MOVE = "CREATE FUNCTION {0}() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN NEW.{1} := now(); RETURN NEW; END $$;"
FAULTS: list[tuple[str, str, str, str]] = [  # fault, check, level, what is wrong
    ("DROP TABLE campaign_sender_accounts", "product tables", "error", "campaign_sender_accounts is missing"),
    ("DROP TABLE accounts CASCADE", "product tables", "error", "table public.accounts is missing"),
    (
        "ALTER TABLE campaigns DROP COLUMN pause_reason",
        "product tables",
        "error",
        "public.campaigns lacks pause_reason",
    ),
    ("ALTER TABLE accounts DROP COLUMN status, DROP COLUMN type", "product tables", "error", "lacks type, status"),
    ("DROP TABLE campaign_stats.redriven", "service tables", "error", "campaign_stats.redriven is missing"),
    ("DROP TABLE campaign_stats.sweep", "service tables", "error", "table campaign_stats.sweep is missing"),
    ("DELETE FROM campaign_stats.sweep", "service tables", "error", "sweep has lost its row"),
    ("DELETE FROM campaign_stats.outbox_shards WHERE shard = 7", "service tables", "error", "outbox_shards has lost"),
    *[
        (f"DROP INDEX {schema}{index}", "indexes", "error", f"{index} is missing")
        for schema, index in (
            ("", "campaign_prospects_by_campaign_and_status"),
            ("", "campaign_prospects_by_contact"),
            ("campaign_stats.", "outbox_pending"),
        )
    ],
    *[
        (
            f"UPDATE pg_index SET indisvalid = false WHERE indexrelid = '{index}'::regclass",
            "indexes",
            "error",
            f"{index} is INVALID",
        )
        for index in ("campaign_prospects_by_campaign_and_status", "campaign_prospects_by_contact")
    ],
    (
        "CREATE OR REPLACE FUNCTION campaign_stats.drift(stored jsonb, truth jsonb) RETURNS jsonb LANGUAGE sql AS $$"
        " SELECT '{}'::jsonb $$",
        "functions",
        "error",
        "campaign_stats.drift is not the one",
    ),
    (
        "CREATE OR REPLACE FUNCTION campaign_stats.stamp_contacted_at() RETURNS trigger LANGUAGE plpgsql AS $$"
        " BEGIN RETURN NEW; END $$",
        "functions",
        "error",
        "campaign_stats.stamp_contacted_at is not the one",
    ),
    (
        "DROP FUNCTION campaign_stats.recalculate_campaign_stats",
        "functions",
        "error",
        "campaign_stats.recalculate_campaign_stats is missing",
    ),
    *[
        (f"DROP TRIGGER {name} ON campaign_prospects", "contacted_at trigger", "error", f"{name} on public.")
        for name in ("campaign_stats_contacted_at_insert", "campaign_stats_contacted_at_update")
    ],
    (
        "ALTER TABLE campaign_prospects DISABLE TRIGGER campaign_stats_contacted_at_update",
        "contacted_at trigger",
        "error",
        "campaign_stats_contacted_at_update on public.campaign_prospects is disabled",
    ),
    (
        MOVE.format("theirs", "email")
        + "CREATE OR REPLACE TRIGGER campaign_stats_contacted_at_insert BEFORE INSERT ON campaign_prospects"
        " FOR EACH ROW EXECUTE FUNCTION theirs()",
        "contacted_at trigger",
        "error",
        "campaign_stats_contacted_at_insert on public.campaign_prospects is not the one",
    ),
    (
        "CREATE OR REPLACE TRIGGER campaign_stats_contacted_at_update BEFORE UPDATE OF email ON campaign_prospects"
        " FOR EACH ROW WHEN (true) EXECUTE FUNCTION campaign_stats.stamp_contacted_at()",
        "contacted_at trigger",
        "error",
        "campaign_stats_contacted_at_update on public.campaign_prospects is not the one",
    ),
    (
        MOVE.format("theirs", "contacted_at")
        + 'CREATE TRIGGER "Their Stamp" BEFORE UPDATE ON campaign_prospects FOR EACH ROW EXECUTE FUNCTION theirs()',
        "contacted_at trigger",
        "warning",
        "trigger Their Stamp (theirs()) on public.campaign_prospects sets contacted_at too",
    ),
    *[
        (
            MOVE.format("touch", "updated_at")
            + f'CREATE TRIGGER "Touch It" BEFORE {event} ON campaigns FOR EACH ROW {when} EXECUTE FUNCTION touch()',
            "updated_at trigger",
            "warning",
            "trigger Touch It (touch()) on public.campaigns sets updated_at itself",
        )
        for event, when in (
            ("UPDATE", ""),
            ("INSERT OR UPDATE", ""),
            ("UPDATE OF name, stats", "WHEN (OLD.* IS DISTINCT FROM NEW.*)"),
        )
    ],
    (
        "INSERT INTO campaign_stats.guard_limits (scope, id, threshold_bp)"
        " VALUES ('campaign', '8c2b2d4e-e29b-41d4-a716-446655440000', 0)",
        "guard limits",
        "warning",
        "campaign 8c2b2d4e-e29b-41d4-a716-446655440000: campaign limits: threshold_bp is 0",
    ),
    (
        "INSERT INTO campaign_stats.guard_limits (scope, id, mode)"
        " VALUES ('user', '11111111-1111-1111-1111-111111111111', 'maybe')",
        "guard limits",
        "warning",
        "user limits: mode is not one of enforce, observe, off",
    ),
]


@pytest.mark.parametrize(("fault", "check", "level", "wrong"), FAULTS, ids=[fault[:70] for fault, *_ in FAULTS])
async def test_a_fault_in_the_database_is_found_and_mended_as_told(
    environment: dict[str, str],
    db: asyncpg.Connection,
    database_url: str,
    fault: str,
    check: str,
    level: str,
    wrong: str,
) -> None:
    await db.execute(fault)
    code, [found, *further] = await examined(environment)
    assert (code, found["check"], found["level"]) == (2 if level == "error" else 0, check, level)
    assert wrong in found["wrong"]
    for finding in (found, *further):  # what hangs on it
        await mend(db, finding)
    assert await still_wrong(database_url) == []


@pytest.mark.parametrize("table", list(migrations.PRODUCT_COLUMNS))
async def test_every_missing_table_of_the_product_is_named_with_a_statement_that_makes_it(
    environment: dict[str, str], db: asyncpg.Connection, table: str
) -> None:
    await db.execute(f"DROP TABLE {table} CASCADE")
    code, found = await examined(environment)
    assert code == 2
    assert found[0]["wrong"] == f"table public.{table} is missing"
    await db.execute(found[0]["mend"])
    assert await migrations.missing_columns(db) == []


async def test_every_missing_column_of_the_product_is_named_with_a_statement_that_adds_it(
    db: asyncpg.Connection, database_url: str
) -> None:
    async with session(database_url) as connection:
        for table, columns in migrations.PRODUCT_COLUMNS.items():
            for column in columns:
                await db.execute(f"ALTER TABLE {table} DROP COLUMN {column} CASCADE")
                checks = dict(await doctor.database.examine_connection(connection, Limits()))
                [finding] = checks["product tables"]
                assert (finding.level, finding.wrong) == ("error", f"table public.{table} lacks {column}")
                await db.execute(finding.mend)
                assert await migrations.missing_columns(db) == []


async def test_triggers_and_limits_that_do_no_harm_are_not_reported(
    environment: dict[str, str], db: asyncpg.Connection
) -> None:
    user, campaign_id = uuid4(), await add_campaign(db)
    await db.execute(
        MOVE.format("touch", "updated_at")
        + """CREATE TRIGGER renamed BEFORE UPDATE OF name ON campaigns FOR EACH ROW EXECUTE FUNCTION touch();
             CREATE TRIGGER disabled BEFORE UPDATE ON campaigns FOR EACH ROW EXECUTE FUNCTION touch();
             ALTER TABLE campaigns DISABLE TRIGGER disabled;
             CREATE TRIGGER other BEFORE UPDATE ON campaign_prospects FOR EACH ROW EXECUTE FUNCTION touch()"""
    )
    await db.execute(
        "INSERT INTO campaign_stats.guard_limits (scope, id, threshold_bp)"
        " VALUES ('user', $1, 300), ('campaign', $2, 700)",
        user,
        campaign_id,
    )
    assert await examined(environment) == (0, [])


async def test_only_the_level_at_fault_is_blamed_for_wrong_limits(
    environment: dict[str, str], db: asyncpg.Connection
) -> None:
    user = uuid4()
    good, bad = await add_campaign(db, user_id=user), await add_campaign(db, user_id=user)
    await db.execute(
        "INSERT INTO campaign_stats.guard_limits (scope, id, threshold_bp, min_sent)"
        " VALUES ('user', $1, NULL, 0), ('campaign', $2, 700, NULL), ('campaign', $3, NULL, 600)",
        user,
        good,
        bad,
    )
    code, found = await examined(environment)
    assert code == 0
    assert [line["wrong"].split(": ")[0].split(", ")[1] for line in found] == [f"user {user}", f"campaign {bad}"]


async def test_every_single_right_that_is_revoked_is_named_with_the_grant_that_gives_it_back(
    db: asyncpg.Connection, database_url: str, role: str
) -> None:
    rights = [
        (level, f"{right} ({column}) ON {table}")
        for level, needed in (("error", migrations.RUN_RIGHTS), ("warning", migrations.API_RIGHTS))
        for table, right, columns in needed
        for column in columns
    ]
    rights += [
        ("error", f"{right} ON campaign_stats.{table}")
        for table, needed in migrations.OWN_RIGHTS.items()
        for right in needed
    ]
    functions = await db.fetch(
        "SELECT oid::regprocedure::text AS name FROM pg_proc"
        " WHERE pronamespace = 'campaign_stats'::regnamespace AND prorettype <> 'trigger'::regtype"
    )
    await db.execute("REVOKE EXECUTE ON ALL FUNCTIONS IN SCHEMA campaign_stats FROM PUBLIC")
    await db.execute(f"GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA campaign_stats TO {role}")
    rights += [("error", f"EXECUTE ON FUNCTION {row['name']}") for row in functions]
    rights.append(("error", "USAGE ON SCHEMA campaign_stats"))
    assert len(rights) > 50

    async with session(url_of(role, database_url)) as connection:
        for level, right in rights:
            await db.execute(f"REVOKE {right} FROM {role}")
            checks = dict(await doctor.database.examine_connection(connection, Limits()))
            assert [(finding.level, finding.mend) for finding in checks["rights"]] == [
                (level, f"GRANT {right} TO {role};")
            ]
            sentence = f"{checks['rights'][0].wrong}: GRANT {right} TO {role}"
            assert await migrations.problems(connection, api=True) == [sentence]  # what `run` ends with
            assert await migrations.problems(connection) == ([sentence] if level == "error" else [])
            await db.execute(checks["rights"][0].mend)
        checks = dict(await doctor.database.examine_connection(connection, Limits()))
        assert not any(checks.values()), checks


async def test_every_right_on_our_own_tables_is_used_and_no_table_is_forgotten(
    db: asyncpg.Connection, database_url: str, role: str
) -> None:
    tables = await db.fetch(
        "SELECT relname FROM pg_class WHERE relnamespace = 'campaign_stats'::regnamespace AND relkind = 'r'"
    )
    assert {row["relname"] for row in tables} == set(migrations.OWN_RIGHTS)
    statements = [file.read_text("utf-8") for file in (resources.files("consumer") / "sql").iterdir()]
    connection = await asyncpg.connect(url_of(role, database_url))

    async def refused() -> bool:
        count = 0
        for text in statements:
            try:
                await connection.execute(f"EXPLAIN (GENERIC_PLAN) {text}")
            except asyncpg.InsufficientPrivilegeError:
                count += 1
        return count > 0

    try:
        assert not await refused()
        for table, rights in migrations.OWN_RIGHTS.items():
            for right in rights if table != "migrations" else ():
                await db.execute(f"REVOKE {right} ON campaign_stats.{table} FROM {role}")
                assert await refused(), f"{right} on {table} is granted for nothing"
                await db.execute(f"GRANT {right} ON campaign_stats.{table} TO {role}")
    finally:
        await connection.close()


async def test_all_rights_that_are_missing_are_told_at_once_and_run_agrees(
    environment: dict[str, str], db: asyncpg.Connection, role: str
) -> None:
    await db.execute(
        f"""REVOKE UPDATE (pause_reason, stats) ON campaigns FROM {role};
            REVOKE DELETE ON campaign_stats.outbox FROM {role};
            REVOKE SELECT (email_address) ON accounts FROM {role};
            REVOKE EXECUTE ON FUNCTION campaign_stats.stat FROM PUBLIC"""
    )
    environment["DATABASE_URL"] = url_of(role, environment["DATABASE_URL"])
    code, found = await examined(environment)
    assert code == 2
    grants = [
        f"GRANT UPDATE (stats, pause_reason) ON public.campaigns TO {role}",
        f"GRANT DELETE ON campaign_stats.outbox TO {role}",
        f"GRANT EXECUTE ON FUNCTION campaign_stats.stat(jsonb,text) TO {role}",
    ]
    last = f"GRANT SELECT (email_address) ON public.accounts TO {role}"
    assert [line["mend"] for line in found] == [f"{grant};" for grant in (*grants, last)]
    assert [line["level"] for line in found] == ["error", "error", "error", "warning"]
    open_door = {**environment, "CAMPAIGN_STATS_API_TOKENS": json.dumps({"a" * 64: "*"})}
    assert {line["level"] for line in (await examined(open_door))[1]} == {"error"}
    code, _, error = await command(environment, "run")
    assert code == 2
    assert [line.rpartition(": ")[2] for line in error.splitlines()] == grants


async def test_without_any_right_everything_that_cannot_be_checked_is_said(
    environment: dict[str, str], db: asyncpg.Connection
) -> None:
    name = f"svc_{uuid4().hex[:8]}"
    await db.execute(f"CREATE ROLE {name} LOGIN")
    try:
        environment["DATABASE_URL"] = url_of(name, environment["DATABASE_URL"])
        code, found = await examined(environment)
    finally:
        await db.execute(f"DROP ROLE {name}")
    assert code == 2
    assert f"GRANT USAGE ON SCHEMA campaign_stats TO {name};" in [line["mend"] for line in found]
    assert "not checked: InsufficientPrivilegeError (42501)" in [line["wrong"] for line in found]


async def test_row_security_that_hides_rows_is_found_and_mended_as_told(
    environment: dict[str, str], db: asyncpg.Connection, role: str
) -> None:
    await db.execute("ALTER TABLE campaign_prospects ENABLE ROW LEVEL SECURITY")
    await db.execute("ALTER TABLE accounts ENABLE ROW LEVEL SECURITY")
    environment["DATABASE_URL"] = url_of(role, environment["DATABASE_URL"])
    code, found = await examined(environment)
    assert code == 2
    assert [(line["check"], line["level"], line["wrong"].split()[5]) for line in found] == [
        ("row security", "error", "campaign_prospects"),
        ("row security", "warning", "accounts"),
    ]
    await mend(db, found[0])
    assert await examined(environment) == (0, [])


async def test_a_version_from_the_future_shows_that_the_databases_clock_went_backwards(
    environment: dict[str, str], db: asyncpg.Connection
) -> None:
    await db.execute(
        "INSERT INTO campaign_stats.campaign_state (campaign_id, version) SELECT gen_random_uuid(),"
        " extract(epoch FROM clock_timestamp() + ahead) * 1e6 FROM unnest('{1 hour, 2 s, -1 day}'::interval[]) AS ahead"
    )
    code, [found] = await examined(environment)
    assert (code, found["check"], found["level"]) == (0, "campaign versions", "warning")
    assert found["wrong"].startswith("1 campaigns have a version from the future, up to 3")


@pytest.mark.parametrize(
    ("change", "wrong", "mends"),
    [
        ("DELETE FROM campaign_stats.migrations WHERE number = $1", "lacks {last}", "campaign-stats migrate"),
        (
            "UPDATE campaign_stats.migrations SET number = 9999, name = '9999_later.sql' WHERE number = $1",
            "newer than this code (it has 9999_later.sql)",
            "pip install --upgrade campaign-stats",
        ),
        (
            "UPDATE campaign_stats.migrations SET checksum = 'other' WHERE number = $1",
            "{last} was changed after it was applied",
            "pip install --force-reinstall",
        ),
    ],
)
async def test_a_schema_of_another_version_is_told(
    environment: dict[str, str], db: asyncpg.Connection, change: str, wrong: str, mends: str
) -> None:
    last = migrations.released()[-1]
    await db.execute(change, last.number)
    code, [found] = await examined(environment)
    assert (code, found["check"], found["level"]) == (2, "schema version", "error")
    assert wrong.format(last=last.name) in found["wrong"]
    assert found["mend"].startswith(mends)


async def test_a_database_switched_to_read_only_is_found_and_mended_as_told(
    environment: dict[str, str], db: asyncpg.Connection, database_url: str
) -> None:
    name = await db.fetchval("SELECT current_database()")
    await db.execute(f"ALTER DATABASE {name} SET default_transaction_read_only = on")
    code, [found] = await examined(environment)
    assert (code, found["check"], found["level"]) == (2, "writable", "error")
    await mend(db, found)
    assert await still_wrong(database_url) == []


class Standby(Postgres):
    """Ready as soon as it can be read."""

    def is_ready(self) -> bool:
        """Its pid file says so."""
        file = self.directory / "data" / "postmaster.pid"
        lines = file.read_text().splitlines() if file.exists() else []
        return super().is_ready() or (len(lines) >= 8 and lines[7].strip() == "standby")


async def test_a_standby_is_told(environment: dict[str, str], servers_directory: Path) -> None:
    server = Standby(servers_directory / "standby", options={"fsync": "off"})
    try:
        server.start()
        await migrations.migrate(server.url(), reference_schema=True)
        server.stop()
        (server.directory / "data" / "standby.signal").touch()
        server.start()
        code, found = await examined({**environment, "DATABASE_URL": server.url()})
    finally:
        server.stop()
    assert code == 2
    assert [(line["check"], line["wrong"]) for line in found] == [
        ("writable", "this server is a standby: it only reads")
    ]


@pytest.mark.parametrize(("number", "is_old"), [(140_011, True), (150_000, False), (180_001, False)])
def test_a_postgresql_older_than_15_is_told(number: int, is_old: bool) -> None:
    finding = doctor.database.version_finding(number)
    assert (finding is not None and finding.level == "error" and "PostgreSQL 14 is older" in finding.wrong) is is_old


@pytest.mark.parametrize(
    ("before", "server", "after", "offset_s"),
    [(0, 0.5, 1, 0), (0, -7, 1, -7), (0, 7, 1, 6), (0, 0, 0, 0), (0, 30, 40, 0)],
)
def test_a_clock_read_meanwhile_is_off_only_by_what_lies_outside(
    before: float, server: float, after: float, offset_s: float
) -> None:
    moments = [datetime(2026, 4, 18, tzinfo=UTC) + timedelta(seconds=seconds) for seconds in (before, server, after)]
    assert doctor.database.clock_offset_s(*moments) == offset_s


@pytest.mark.parametrize(
    ("offset_s", "words"), [(0, None), (5, None), (-5, None), (5.1, "5 s ahead of"), (-3600, "3600 s behind")]
)
def test_a_clock_that_is_more_than_five_seconds_off_is_a_warning(offset_s: float, words: str | None) -> None:
    finding = doctor.database.clock_finding(offset_s)
    if words is None:
        assert finding is None
    else:
        assert finding is not None
        assert finding.level == "warning"
        assert words in finding.wrong


async def test_missing_topics_are_named_with_a_command_that_makes_them(
    environment: dict[str, str], kafka: Kafka, topics: Topics
) -> None:
    connection = broker.Connection(kafka.bootstrap, {})
    gone = [topics.read[0], topics.dead_letters]
    await broker.delete_topics(connection, gone)
    code, found = await examined(environment)
    assert code == 2
    assert [(line["check"], line["level"]) for line in found] == [("topics", "error")] * 2
    assert [line["wrong"].split()[1] for line in found] == gone
    program, *arguments = found[0]["mend"].split()
    assert program == "campaign-stats"
    assert (await command(environment, *arguments))[0] == 0
    assert await examined(environment) == (0, [])


async def test_a_topic_with_one_partition_or_compaction_is_told_but_only_where_it_matters(
    environment: dict[str, str], kafka: Kafka
) -> None:
    names = Topics(f"t{uuid4().hex[:8]}.")
    await broker.create_topics(
        broker.Connection(kafka.bootstrap, {}),
        {name: {"cleanup.policy": "compact"} if name == names.written[0] else {} for name in names.all},
        partitions=1,
        replication=1,
    )
    environment["CAMPAIGN_STATS_TOPIC_PREFIX"] = names.prefix
    code, found = await examined(environment)
    assert code == 2
    tool = f"--bootstrap-server {kafka.bootstrap} --alter"
    assert [(line["check"], line["level"], line["mend"]) for line in found] == [
        *[("partitions", "warning", f"kafka-topics.sh {tool} --topic {name} --partitions 12") for name in names.read],
        (
            "cleanup policy",
            "error",
            f"kafka-configs.sh {tool} --entity-type topics --entity-name {names.written[0]}"
            " --add-config cleanup.policy=delete",
        ),
    ]


async def test_one_replica_is_a_warning(environment: dict[str, str], topics: Topics) -> None:
    code, out, _ = await command(environment, "doctor", "--json")
    [found] = [line for line in json.loads(out)["checks"] if line["check"] == "replicas"]
    assert (code, found["level"]) == (0, "warning")
    assert all(name in found["wrong"] for name in topics.all)


def test_too_few_replicas_come_with_a_plan_that_keeps_what_is_there_and_spreads_the_rest() -> None:
    names = Topics("")
    good, lonely = TopicShape({0: (1, 2), 1: (2, 3)}, "delete"), TopicShape({0: (4,), 1: (1,)}, "delete")
    shapes = {name: lonely if name == names.read[0] else good for name in names.all}
    checks = dict(doctor.kafka.topic_findings(Cluster((1, 2, 3, 4), shapes), names, "--bootstrap-server h:1"))
    [found] = checks["replicas"]
    echo, execute = found.mend.splitlines()
    plan = json.loads(echo.removeprefix("echo '").removesuffix("' > replicas.json"))
    assert plan == {
        "version": 1,
        "partitions": [
            {"topic": names.read[0], "partition": 0, "replicas": [4, 1, 2]},
            {"topic": names.read[0], "partition": 1, "replicas": [1, 2, 3]},
        ],
    }
    assert execute.startswith("kafka-reassign-partitions.sh --bootstrap-server h:1 ")


def test_a_cleanup_policy_that_may_not_be_read_is_a_warning() -> None:
    names = Topics("")
    shapes = {name: TopicShape({0: (1, 2), 1: (2, 1)}, None) for name in names.all}
    checks = dict(doctor.kafka.topic_findings(Cluster((1, 2), shapes), names, ""))
    assert [finding.level for finding in checks["cleanup policy"]] == ["warning"] * 6
