"""A product with tables of its own takes the service in and lets it go again, as deploy/adopting.md says it."""

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from importlib import resources
from typing import Any
from uuid import UUID

import asyncpg
import pytest

from consumer import migrations
from consumer.errors import ConfigError, Unavailable
from tests.benchmarks.adopt import CATALOG, documented
from tests.conftest import Bus, StartService, command, eventually
from tests.servers import REPOSITORY
from tests.world import add_campaign, add_prospects

CAMPAIGN = UUID("8c2b2d4e-e29b-41d4-a716-446655440000")  # of the page's examples
MARGIN_S = 0.4  # a busy machine


@pytest.fixture
async def product(empty_database_url: str) -> AsyncIterator[asyncpg.Connection]:
    """A connection to a database that holds the product's tables and nothing of ours."""
    connection = await asyncpg.connect(empty_database_url)
    await connection.set_type_codec("jsonb", schema="pg_catalog", encoder=json.dumps, decoder=json.loads)
    await connection.execute(reference_schema())
    yield connection
    await connection.close()


def reference_schema() -> str:
    """The product's tables and functions."""
    return (resources.files(migrations) / "reference" / "0001_product_tables.sql").read_text("utf-8")


@dataclass
class Writer:
    """Somebody of the product who moves one prospect again and again."""

    latencies: list[float] = field(default_factory=list)
    begun: float | None = None

    @property
    def longest_s(self) -> float:
        """The longest any of its transactions took, the one that still runs included."""
        running = [] if self.begun is None else [time.monotonic() - self.begun]
        return max(self.latencies + running, default=0.0)


@asynccontextmanager
async def writing(url: str, prospect: UUID) -> AsyncIterator[Writer]:
    """A writer at work."""
    writer = Writer()
    connection = await asyncpg.connect(url)

    async def work() -> None:
        while True:
            writer.begun = time.monotonic()
            await connection.execute("UPDATE campaign_prospects SET company = 'x' WHERE id = $1", prospect)
            writer.latencies.append(time.monotonic() - writer.begun)
            writer.begun = None
            await asyncio.sleep(0.01)

    task = asyncio.create_task(work())
    try:
        yield writer
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        await connection.close()


@asynccontextmanager
async def transaction_of_somebody(url: str, statement: str, *arguments: object) -> AsyncIterator[None]:
    """A transaction that did `statement` and stays open."""
    connection = await asyncpg.connect(url)
    await connection.execute("BEGIN")
    await connection.execute(statement, *arguments)
    try:
        yield
        await connection.execute("COMMIT")
    finally:
        await connection.close()


async def two_prospects(product: asyncpg.Connection) -> list[UUID]:
    campaign_id = await add_campaign(product)
    return await add_prospects(product, campaign_id, "sent", 2)


async def waits_for_a_lock(connection: asyncpg.Connection) -> bool:
    """Whether `migrate` stands in a queue for a product's table now."""
    found: bool = await connection.fetchval(
        "SELECT EXISTS (SELECT 1 FROM pg_locks l JOIN pg_stat_activity a USING (pid)"
        " WHERE a.application_name = 'campaign-stats migrate' AND a.datname = current_database() AND NOT l.granted)"
    )
    return found


async def see_tries(connection: asyncpg.Connection, count: int) -> None:
    """Return when `migrate` has queued and let go again `count` times."""
    for _ in range(count):
        await eventually(lambda: waits_for_a_lock(connection), "migrate queues for the lock")

        async def let_go() -> bool:
            return not await waits_for_a_lock(connection)

        await eventually(let_go, "migrate lets go")


async def test_a_long_transaction_of_the_product_holds_up_migrate_but_no_writer(
    product: asyncpg.Connection, empty_database_url: str
) -> None:
    held, moved = await two_prospects(product)
    move = "UPDATE campaign_prospects SET company = 'y' WHERE id = $1"
    async with writing(empty_database_url, moved) as writer:
        async with transaction_of_somebody(empty_database_url, move, held):
            running = asyncio.create_task(migrations.migrate(empty_database_url))
            await see_tries(product, 2)
            assert not running.done()
            assert await migrations.pending(product) == [
                migration.name for migration in migrations.released() if migration.number > 1
            ]
        assert await running == [migration.name for migration in migrations.released()]
        assert len(writer.latencies) > 10
        assert writer.longest_s < migrations.LOCK_TIMEOUT_S + MARGIN_S


async def test_control_a_patient_wait_for_the_lock_would_hold_up_every_writer(
    product: asyncpg.Connection, empty_database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(migrations, "LOCK_TIMEOUT_S", 10.0)
    held, moved = await two_prospects(product)
    move = "UPDATE campaign_prospects SET company = 'y' WHERE id = $1"
    async with writing(empty_database_url, moved) as writer:
        async with transaction_of_somebody(empty_database_url, move, held):
            running = asyncio.create_task(migrations.migrate(empty_database_url))
            await eventually(lambda: writer.longest_s > 0.5 + MARGIN_S, "the writer is held up")
        assert await running == [migration.name for migration in migrations.released()]


async def test_no_writer_waits_while_migrate_waits_for_a_vacuum(
    product: asyncpg.Connection, empty_database_url: str
) -> None:
    """A vacuum's lock lets writers pass; queueing for the trigger's lock behind it would not."""
    _, moved = await two_prospects(product)
    as_vacuum = "LOCK TABLE campaign_prospects IN SHARE UPDATE EXCLUSIVE MODE"
    async with writing(empty_database_url, moved) as writer:
        async with transaction_of_somebody(empty_database_url, as_vacuum):
            running = asyncio.create_task(migrations.migrate(empty_database_url))
            await eventually(lambda: waits_for_a_lock(product), "migrate waits for the vacuum")
            seen = len(writer.latencies)
            await eventually(lambda: len(writer.latencies) > seen + 50, "the writer goes on")
            assert await waits_for_a_lock(product)
        await running
        assert writer.longest_s < migrations.LOCK_TIMEOUT_S


async def test_migrate_gives_up_in_the_end_names_who_is_in_the_way_and_goes_on_when_called_again(
    product: asyncpg.Connection, empty_database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(migrations, "TABLES_DEADLINE_S", 0.1)
    monkeypatch.setattr(migrations, "LOCK_TIMEOUT_S", 0.2)
    held, _ = await two_prospects(product)
    wrong = r"0002_contacted_at\.sql could not lock .* process \d+ \(role postgres, application importer\) holds one"
    move = "UPDATE campaign_prospects SET company = set_config('application_name', 'importer', false) WHERE id = $1"
    async with transaction_of_somebody(empty_database_url, move, held):
        with pytest.raises(Unavailable, match=wrong):
            await migrations.migrate(empty_database_url)
    applied = await migrations.migrate(empty_database_url)
    assert applied == [migration.name for migration in migrations.released() if migration.number > 1]


async def test_a_statement_timeout_of_the_database_does_not_end_an_index_build(
    product: asyncpg.Connection, empty_database_url: str
) -> None:
    name = await product.fetchval("SELECT current_database()")
    await product.execute(f"ALTER DATABASE {name} SET statement_timeout = '1ms'")
    assert await migrations.migrate(empty_database_url) == [migration.name for migration in migrations.released()]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("ALTER TABLE campaign_prospects DROP COLUMN campaign_id, ADD COLUMN campaign_id bigint", "bigint = uuid"),
        (
            "ALTER TABLE campaign_prospects RENAME TO old; CREATE VIEW campaign_prospects AS SELECT * FROM old",
            "is a view",
        ),
    ],
)
async def test_a_schema_that_does_not_fit_is_told_in_a_sentence(
    product: asyncpg.Connection, empty_database_url: str, change: str, said: str
) -> None:
    await product.execute(change)
    with pytest.raises(ConfigError, match=rf"the product's schema does not fit: .*{said}"):
        await migrations.migrate(empty_database_url)


@pytest.fixture
async def named(product: asyncpg.Connection) -> AsyncIterator[Callable[[str], str]]:
    """Puts this test's names of database and roles into a text of the page; the roles are gone afterwards."""
    database = await product.fetchval("SELECT current_database()")
    roles = {name: f"{name}_{database}" for name in ("product_owner", "campaign_stats_migrate", "campaign_stats_run")}
    owner = roles["product_owner"]
    await product.execute(f"CREATE ROLE {owner}; GRANT CREATE ON SCHEMA public TO {owner}")
    for table in migrations.PRODUCT_COLUMNS:
        await product.execute(f"ALTER TABLE {table} OWNER TO {owner}")

    def name(text: str) -> str:
        text = re.sub(r"\bDATABASE product\b", f"DATABASE {database}", text)
        return re.sub(rf"\b(?:{'|'.join(roles)})\b", lambda found: roles[found.group()], text)

    yield name
    for role in roles.values():
        if await product.fetchval("SELECT 1 FROM pg_roles WHERE rolname = $1", role):
            await product.execute(f"DROP OWNED BY {role} CASCADE; DROP ROLE {role}")


async def test_the_page_leads_in_and_out_with_no_more_rights_than_it_gives(
    product: asyncpg.Connection, empty_database_url: str, named: Callable[[str], str],
    environment: dict[str, str], service: StartService, bus: Bus,
) -> None:  # fmt: skip
    await add_campaign(product, {"sent": 114, "bounced": 3, "pending": 9}, id=CAMPAIGN, stats={"total": 1, "mine": 5})
    tripped = await add_campaign(product, {"sent": 110, "bounced": 9})
    before = set(await product.fetch(CATALOG))

    def as_role(role: str) -> str:
        return re.sub(r"//postgres@", f"//{named(role)}@", empty_database_url)

    [own_keys, options] = documented("1.")
    assert [row["key"] for row in await product.fetch(own_keys)] == ["mine"]
    assert [row["reloptions"] for row in await product.fetch(options)] == [None, None]
    for statement in documented("2."):
        await product.execute(named(statement))

    environment["DATABASE_URL"] = as_role("campaign_stats_migrate")
    assert (await command(environment, "migrate"))[0] == 0
    [blockers, *rights] = documented("3.")
    await product.fetch(blockers)
    migrate_role = await asyncpg.connect(as_role("campaign_stats_migrate"))
    for statement in rights:
        await migrate_role.execute(named(statement))

    environment["DATABASE_URL"] = as_role("campaign_stats_run")
    assert (await command(environment, "drift"))[0] == 1
    run_role = await asyncpg.connect(as_role("campaign_stats_run"))
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        await run_role.fetch("SELECT email FROM campaign_prospects")
    await run_role.fetch("SELECT email_address FROM accounts JOIN campaign_sender_accounts s ON s.account_id = id")
    await run_role.close()

    running = await service(guard_mode="observe", sweep_interval_s=300)

    async def told() -> set[str]:
        return {event["subject"] for event in await bus.events(bus.topics.prefix + "campaign.stats-updated")}

    await eventually(lambda: _equal(told, {str(CAMPAIGN), str(tripped)}), "the first sweep publishes each campaign")
    [audit] = documented("6.")
    [found] = await product.fetch(audit)
    assert (found["campaign_id"], found["sent"], found["bounced"]) == (tripped, 119, 9)
    assert await product.fetchval("SELECT status FROM campaigns WHERE id = $1", tripped) == "active"
    running.terminate()
    assert await running.wait() == 0

    await product.execute("UPDATE campaign_stats.sweep SET due_at = '-infinity'")  # not in five minutes, but now
    running = await service(guard_mode="enforce", sweep_interval_s=300)
    pause_reason = "SELECT pause_reason FROM campaigns WHERE id = $1"
    await eventually(lambda: product.fetchval(pause_reason, tripped), "the sweep pauses what is still on the list")
    assert await product.fetchval(pause_reason, CAMPAIGN) is None
    running.terminate()
    assert await running.wait() == 0

    leaving, roles = documented("8.")[:-2], documented("8.")[-2:]
    for statement in leaving:
        await migrate_role.execute(statement)
    await migrate_role.close()
    for statement in roles:
        await product.execute(named(statement))
    assert set(await product.fetch(CATALOG)) == before
    assert await product.fetchval("SELECT count(*) FROM pg_roles WHERE rolname = $1", named("campaign_stats_run")) == 0
    move = "SELECT update_prospect_with_stat(id, 'replied') FROM campaign_prospects WHERE campaign_id = $1"
    await product.execute(move, CAMPAIGN)
    assert len(await migrations.migrate(empty_database_url)) == len(migrations.released())


async def _equal(read: Callable[[], Any], wanted: object) -> bool:
    return bool(await read() == wanted)


async def test_leaving_holds_up_no_writer_for_longer_than_a_try(
    product: asyncpg.Connection, empty_database_url: str
) -> None:
    _, moved = await two_prospects(product)
    await migrations.migrate(empty_database_url)
    # `see_tries` looks for this name.
    leaving = await asyncpg.connect(empty_database_url, server_settings={"application_name": "campaign-stats migrate"})
    async with writing(empty_database_url, moved) as writer:
        async with transaction_of_somebody(empty_database_url, "SELECT 1 FROM campaign_prospects"):
            running = asyncio.create_task(leaving.execute(documented("8.")[0]))
            await see_tries(product, 2)
            assert not running.done()
        await running
        assert writer.longest_s < 0.5 + MARGIN_S
    await leaving.close()
    assert await product.fetchval("SELECT count(*) FROM pg_trigger WHERE NOT tgisinternal") == 0


@pytest.mark.kcat
async def test_both_examples_of_the_page_are_served(
    service: StartService, environment: dict[str, str], bus: Bus, db: asyncpg.Connection
) -> None:
    await add_campaign(db, {"sent": 3}, id=CAMPAIGN)
    running = await service()
    process = await asyncio.create_subprocess_exec(
        "bash", "-ec", "\n".join(documented("5.", "bash")), env=environment, cwd=REPOSITORY
    )
    assert await process.wait() == 0

    async def served() -> bool:
        samples = await running.metrics()
        return samples['campaign_stats_records_total{kind="status_hint"}'] == 2

    await eventually(served, "both are read as hints", running)
    await eventually(lambda: bus.events(bus.topics.prefix + "campaign.stats-updated"), "the campaign is published")
    assert await bus.read(bus.topics.prefix + "campaign-stats.dead-letters") == []
