"""deploy/postgres on real servers: with its roles `migrate` works, `doctor` finds nothing, nothing else may be done."""

from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import quote, urlsplit, urlunsplit

import asyncpg
import pytest

from consumer import migrations
from consumer.doctor.database import examine_database
from consumer.errors import ConfigError
from consumer.guard import Limits

POSTGRES = Path(__file__).parents[2] / "deploy" / "postgres"
REFERENCE = Path(migrations.__file__).parent / "reference" / "0001_product_tables.sql"
OWNER, MIGRATE, RUN = "product_owner", "campaign_stats_migrate", "campaign_stats_run"


def as_role(url: str, role: str) -> str:
    """The same database, logged in as another role; the servers of the tests trust whoever comes."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=f"{quote(role)}@{parts.netloc.rpartition('@')[2]}"))


async def administer(url: str, *statements: str) -> None:
    connection = await asyncpg.connect(url)
    try:
        for statement in statements:
            await connection.execute(statement)
    finally:
        await connection.close()


@pytest.fixture
async def product_url(empty_database_url: str) -> AsyncIterator[str]:
    """A database whose tables belong to a role that is no superuser, as in a product. Roles are the whole server's."""
    database = urlsplit(empty_database_url).path.lstrip("/")
    await administer(
        empty_database_url,
        f"CREATE ROLE {OWNER} LOGIN",
        f"GRANT CREATE ON DATABASE {database} TO {OWNER}",
        f"GRANT CREATE ON SCHEMA public TO {OWNER}",
    )
    await administer(as_role(empty_database_url, OWNER), REFERENCE.read_text())
    yield empty_database_url
    for role in (RUN, MIGRATE, OWNER):
        await administer(
            empty_database_url,
            f"DO $$ BEGIN IF to_regrole('{role}') IS NOT NULL THEN"
            f" DROP OWNED BY {role} CASCADE; DROP ROLE {role}; END IF; END $$",
        )


async def findings(url: str, *, api: bool = False) -> list[str]:
    checks = await examine_database(url, Limits(), api)
    return [f"{check}: {one.wrong}; {one.mend}" for check, found in checks for one in found]


async def test_with_these_roles_migrate_works_and_doctor_finds_nothing(product_url: str) -> None:
    roles = (POSTGRES / "roles.sql").read_text()
    await administer(product_url, roles)
    await migrations.migrate(as_role(product_url, MIGRATE))
    assert await findings(as_role(product_url, RUN)) == []

    await administer(product_url, roles, roles)  # again after migrate, as its comment says
    assert await findings(as_role(product_url, RUN)) == []
    assert await migrations.migrate(as_role(product_url, MIGRATE)) == []
    assert await findings(as_role(product_url, RUN), api=True) == []


async def test_without_its_last_statements_only_the_door_stays_closed(product_url: str) -> None:
    before, door, statements = (POSTGRES / "roles.sql").read_text().partition("-- Door:")
    assert door
    assert statements.count("GRANT") == 2
    await administer(product_url, f"{before}COMMIT;")
    await migrations.migrate(as_role(product_url, MIGRATE))
    found = await findings(as_role(product_url, RUN))
    assert ["accounts" in one for one in found] == [True, True], found


async def test_they_may_come_late_where_the_owner_has_migrated_already(product_url: str) -> None:
    await migrations.migrate(as_role(product_url, OWNER))
    await administer(product_url, (POSTGRES / "roles.sql").read_text())
    assert await findings(as_role(product_url, RUN)) == []
    assert await migrations.migrate(as_role(product_url, MIGRATE)) == []


async def test_the_service_may_do_nothing_else(product_url: str) -> None:
    roles = (POSTGRES / "roles.sql").read_text()
    await administer(product_url, roles)
    await migrations.migrate(as_role(product_url, MIGRATE))
    await administer(product_url, roles)
    service = await asyncpg.connect(as_role(product_url, RUN))
    try:
        for statement in (
            "SELECT email FROM public.campaign_prospects",
            "SELECT * FROM public.campaign_prospects",
            "UPDATE public.campaign_prospects SET status = 'sent'",
            "UPDATE public.campaigns SET name = ''",
            "DELETE FROM public.campaigns",
            "SELECT provider_account_id FROM public.accounts",
            "UPDATE campaign_stats.migrations SET checksum = ''",
            "UPDATE campaign_stats.guard_decisions SET paused = false",
            "DELETE FROM campaign_stats.guard_limits",
            "DELETE FROM campaign_stats.sweep",
            "CREATE TABLE public.mine ()",
            "CREATE TABLE campaign_stats.mine ()",
            "CREATE SCHEMA mine",
            "ALTER TABLE public.campaigns RESET (fillfactor)",
        ):
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                await service.execute(statement)
    finally:
        await service.close()
    await administer(product_url, "DROP SCHEMA campaign_stats CASCADE")
    with pytest.raises(ConfigError, match="run `migrate` as the owner"):
        await migrations.migrate(as_role(product_url, RUN))


async def test_the_settings_reach_the_table_and_each_partition(product_url: str) -> None:
    settings = (POSTGRES / "settings.sql").read_text()

    async def options(table: str) -> list[str]:
        connection = await asyncpg.connect(product_url)
        try:
            return list(await connection.fetchval("SELECT reloptions FROM pg_class WHERE relname = $1", table) or ())
        finally:
            await connection.close()

    await migrations.migrate(product_url)
    await administer(product_url, settings)
    assert "autovacuum_vacuum_scale_factor=0.005" in await options("campaign_prospects")
    assert "fillfactor=90" in await options("campaign_prospects")  # as migrated

    await administer(
        product_url,
        "ALTER TABLE campaign_prospects RENAME TO part",
        "CREATE TABLE campaign_prospects (LIKE part) PARTITION BY HASH (campaign_id)",
        "ALTER TABLE campaign_prospects ATTACH PARTITION part FOR VALUES WITH (MODULUS 1, REMAINDER 0)",
        "ALTER TABLE part RESET (autovacuum_vacuum_scale_factor)",
        settings,
    )
    assert "autovacuum_vacuum_scale_factor=0.005" in await options("part")
