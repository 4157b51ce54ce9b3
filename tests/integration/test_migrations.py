"""Migrations on every PostgreSQL that is here."""

import asyncio
import os
import re
import sys
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path

import asyncpg
import pytest

from consumer import migrations
from consumer.errors import ConfigError
from tests.conftest import command
from tests.servers import REPOSITORY


@pytest.fixture
def released(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[migrations.Migration]]:
    """The released migrations, to be changed by a test."""
    found = migrations.released()
    monkeypatch.setattr(migrations, "released", lambda: found)
    return found  # type: ignore[return-value]


async def test_an_empty_database_becomes_complete_and_a_second_run_does_nothing(empty_database_url: str) -> None:
    applied = await migrations.migrate(empty_database_url, reference_schema=True)
    assert applied == [migration.name for migration in migrations.released()]
    assert await migrations.migrate(empty_database_url, reference_schema=True) == []
    connection = await asyncpg.connect(empty_database_url)
    assert await migrations.missing_columns(connection) == []
    assert await migrations.pending(connection) == []
    valid = await connection.fetch(
        "SELECT relname FROM pg_index JOIN pg_class ON oid = indexrelid WHERE indisvalid AND relname LIKE '%_by_con%'"
    )
    assert len(valid) == 1
    await connection.close()


async def test_missing_tables_and_columns_are_told_all_at_once(empty_database_url: str) -> None:
    with pytest.raises(ConfigError) as caught:
        await migrations.migrate(empty_database_url)
    assert len(caught.value.problems) == 4
    await migrations.migrate(empty_database_url, reference_schema=True)
    connection = await asyncpg.connect(empty_database_url)
    await connection.execute(
        "ALTER TABLE campaigns DROP COLUMN pause_reason; ALTER TABLE accounts DROP COLUMN daily_limit"
    )
    problems = await migrations.missing_columns(connection)
    assert [problem.split(":")[0] for problem in problems] == [
        "table public.campaigns lacks pause_reason",
        "table public.accounts lacks daily_limit",
    ]
    await connection.close()


async def test_several_processes_at_once_apply_each_file_once(empty_database_url: str) -> None:
    environment = {**os.environ, "DATABASE_URL": empty_database_url}
    results = await asyncio.gather(
        *(command(environment, "migrate", "--reference-schema", timeout_s=60) for _ in range(4))
    )
    assert [code for code, _, _ in results] == [0, 0, 0, 0], results
    lines = [line for _, out, _ in results for line in out.splitlines() if line.startswith("applied ")]
    assert sorted(lines) == [f"applied {migration.name}" for migration in migrations.released()]


async def test_a_changed_file_is_an_error_that_names_it(
    empty_database_url: str, released: list[migrations.Migration]
) -> None:
    await migrations.migrate(empty_database_url, reference_schema=True)
    old = released[1]
    released[1] = migrations.Migration(old.number, old.name, old.sql + "-- edited", "0" * 64)
    with pytest.raises(ConfigError, match=rf"{old.name} was changed after it was applied"):
        await migrations.migrate(empty_database_url)


async def test_a_database_newer_than_the_code_is_an_error(
    empty_database_url: str, released: list[migrations.Migration]
) -> None:
    await migrations.migrate(empty_database_url, reference_schema=True)
    newest = released.pop()
    with pytest.raises(ConfigError, match=rf"newer than this code \(it has {newest.name}\)"):
        await migrations.migrate(empty_database_url)


async def test_an_invalid_leftover_of_an_interrupted_index_build_is_replaced(
    empty_database_url: str, released: list[migrations.Migration]
) -> None:
    later = [migration for migration in released if migration.number > 3]
    del released[3:]
    await migrations.migrate(empty_database_url, reference_schema=True)
    connection = await asyncpg.connect(empty_database_url)
    name = "campaign_prospects_by_campaign_and_status"
    await connection.execute(f"CREATE INDEX {name} ON campaign_prospects (id)")
    await connection.execute(f"UPDATE pg_index SET indisvalid = false WHERE indexrelid = '{name}'::regclass")
    released.extend(later)
    await migrations.migrate(empty_database_url)
    definition = await connection.fetchval(f"SELECT pg_get_indexdef('{name}'::regclass)")
    assert "(campaign_id, status)" in definition
    assert await connection.fetchval(f"SELECT indisvalid FROM pg_index WHERE indexrelid = '{name}'::regclass")
    await connection.close()


async def test_contacted_at_is_stamped_once_and_never_lies_in_the_future(db: asyncpg.Connection) -> None:
    campaign_id = await db.fetchval(
        "INSERT INTO campaigns (user_id, type, name, status)"
        " VALUES (gen_random_uuid(), 'email', 'x', 'active') RETURNING id"
    )
    insert = (
        "INSERT INTO campaign_prospects (campaign_id, user_id, status, contacted_at)"
        " VALUES ($1, gen_random_uuid(), $2, {}) RETURNING id, contacted_at"
    )

    async def contacted(prospect: object) -> object:
        return await db.fetchval("SELECT contacted_at FROM campaign_prospects WHERE id = $1", prospect)

    pending = await db.fetchrow(insert.format("NULL"), campaign_id, "pending")
    assert pending is not None
    assert pending["contacted_at"] is None
    await db.execute("SELECT update_prospect_with_stat($1, 'cancelled')", pending["id"])
    assert await contacted(pending["id"]) is None  # cancelled alone is no contact
    await db.execute("SELECT update_prospect_with_stat($1, 'sent')", pending["id"])
    first = await contacted(pending["id"])
    assert first is not None
    await db.execute("SELECT update_prospect_with_stat($1, 'bounced')", pending["id"])
    assert await contacted(pending["id"]) == first
    sent = await db.fetchrow(insert.format("NULL"), campaign_id, "sent")
    assert sent is not None
    assert sent["contacted_at"] is not None
    future = await db.fetchrow(insert.format("now() + interval '1 year'"), campaign_id, "sent")
    assert future is not None
    assert future["contacted_at"] <= await db.fetchval("SELECT clock_timestamp()")
    kept = await db.fetchrow(insert.format("'2020-01-01Z'"), campaign_id, "sent")
    assert kept is not None
    assert kept["contacted_at"].year == 2020
    # A row from before the trigger keeps null.
    await db.execute("ALTER TABLE campaign_prospects DISABLE TRIGGER USER")
    old = await db.fetchrow(insert.format("NULL"), campaign_id, "sent")
    await db.execute("ALTER TABLE campaign_prospects ENABLE TRIGGER USER")
    assert old is not None
    await db.execute("SELECT update_prospect_with_stat($1, 'bounced')", old["id"])
    assert await contacted(old["id"]) is None


async def test_the_products_role_needs_no_right_in_our_schema(db: asyncpg.Connection) -> None:
    role = f"product_{os.getpid()}"
    await db.execute(f"CREATE ROLE {role}")
    try:
        await db.execute(f"GRANT INSERT, SELECT, UPDATE ON campaigns, campaign_prospects TO {role}")
        await db.execute(f"SET ROLE {role}")
        campaign_id = await db.fetchval(
            "INSERT INTO campaigns (user_id, type, name, status)"
            " VALUES (gen_random_uuid(), 'email', 'x', 'active') RETURNING id"
        )
        stamped = await db.fetchval(
            "INSERT INTO campaign_prospects (campaign_id, user_id, status)"
            " VALUES ($1, gen_random_uuid(), 'sent') RETURNING contacted_at",
            campaign_id,
        )
        assert stamped is not None
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await db.execute("SELECT 1 FROM campaign_stats.outbox")
    finally:
        await db.execute("RESET ROLE")
        await db.execute(f"DROP OWNED BY {role}; DROP ROLE {role}")


async def test_the_wheel_works_alone_in_an_empty_environment(
    tmp_path: Path, environment: dict[str, str], database_url: str
) -> None:
    """Built, installed in a new virtual environment, run from an empty folder: migrate, then run until caught up."""

    async def call(*arguments: str) -> str:
        process = await asyncio.create_subprocess_exec(
            *arguments, cwd=tmp_path, env=environment,
            stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
        )  # fmt: skip
        out, _ = await process.communicate()
        assert process.returncode == 0, out.decode()
        return out.decode()

    environment.pop("PYTHONPATH", None)
    await call(
        sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", ".", str(REPOSITORY)
    )
    [wheel] = tmp_path.glob("campaign_stats-*.whl")
    await call(sys.executable, "-m", "venv", "empty")
    await call("empty/bin/pip", "install", "-q", "--disable-pip-version-check", str(wheel))
    assert "nothing to do" in await call("empty/bin/campaign-stats", "migrate")
    out = await call("empty/bin/campaign-stats", "run", "--until-caught-up")
    assert '"event": "caught up"' in out
    place = await call("empty/bin/python", "-c", "import consumer; print(consumer.__file__)")
    assert place.startswith(str(tmp_path))


async def test_the_reference_schema_leaves_the_products_own_functions_alone(empty_database_url: str) -> None:
    connection = await asyncpg.connect(empty_database_url)
    await connection.execute(
        "CREATE FUNCTION public.recalculate_campaign_stats(campaign uuid) RETURNS integer LANGUAGE sql AS 'SELECT 42'"
    )
    await migrations.migrate(empty_database_url, reference_schema=True)
    assert await connection.fetchval("SELECT public.recalculate_campaign_stats(gen_random_uuid())") == 42
    assert await connection.fetchval(
        "SELECT to_regprocedure('public.update_prospect_with_stat(uuid, text)') IS NOT NULL"
    )
    await connection.close()


SHAPE = """SELECT table_name, column_name, data_type, is_nullable, column_default FROM information_schema.columns
            WHERE table_schema = 'campaign_stats' AND table_name <> 'migrations' ORDER BY 1, 2"""


async def test_an_older_release_is_let_back_and_every_later_file_may_be_applied_again(empty_database_url: str) -> None:
    await migrations.migrate(empty_database_url, reference_schema=True)
    later = [one.name for one in migrations.released() if one.number > migrations.LAST_OF["0.1.0"]]
    connection = await asyncpg.connect(empty_database_url)
    try:
        shape = await connection.fetch(SHAPE)
        environment = {**os.environ, "DATABASE_URL": empty_database_url}
        code, out, _ = await command(environment, "migrate", "--back-to", "0.1.0")
        assert (code, out.splitlines()[-1]) == (0, "release 0.1.0 can start on this database")
        assert await migrations.back_to(empty_database_url, "0.1.0") == [], "there is nothing more to take back"
        assert await migrations.pending(connection) == later
        assert await connection.fetch(SHAPE) == shape, "what was added stays"
        assert await migrations.migrate(empty_database_url) == later
        assert await connection.fetch(SHAPE) == shape
        code, _, err = await command(environment, "migrate", "--back-to", "0.0.9")
        assert code == 2
        assert "there is no way back to 0.0.9: give one of 0.1.0" in err
    finally:
        await connection.close()


CONTRACTS = re.compile(
    r"\b(DROP (TABLE|COLUMN|SCHEMA|FUNCTION)|RENAME|ALTER COLUMN|SET NOT NULL|TRUNCATE)\b", re.IGNORECASE
)
MARKED = re.compile(r"-- contracts: last read by (\d+\.\d+\.\d+)\n")


def contracting(files: Sequence[migrations.Migration]) -> list[str]:
    """Files after the first release that take something away without saying who was the last to read it."""
    later = [file for file in files if file.number > min(migrations.LAST_OF.values())]
    bare = {file.name: re.sub(r"--.*", "", file.sql) for file in later}
    return [file.name for file in later if CONTRACTS.search(bare[file.name]) and not MARKED.match(file.sql)]


@pytest.mark.parametrize(
    "sql",
    [
        "ALTER TABLE t DROP COLUMN c;",
        "alter table t rename column a to b;",
        "ALTER TABLE t ALTER COLUMN c SET NOT NULL;",
    ],
)
def test_a_file_that_takes_something_away_says_which_release_read_it_last(sql: str) -> None:
    assert contracting(migrations.released()) == []
    invented = migrations.Migration(99, "0099_invented.sql", sql, "")
    assert contracting([*migrations.released(), invented]) == ["0099_invented.sql"]
    marked = migrations.Migration(99, "0099_invented.sql", f"-- contracts: last read by 0.1.0\n{sql}", "")
    assert contracting([marked]) == []


def test_a_version_with_more_migrations_than_a_release_is_not_called_like_it() -> None:
    version = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["version"]
    assert migrations.LAST_OF.get(version, 10**6) >= max(file.number for file in migrations.released())
