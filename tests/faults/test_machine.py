"""Random histories find nothing in the service as it is, and every deliberate mistake in a service that is not."""

import asyncio
import os
import re
from collections.abc import Iterator
from uuid import uuid4

import asyncpg
import pytest

from consumer.demo.servers import Postgres
from tests.faults.arena import Arena
from tests.faults.breakages import BREAKAGES, Breakage
from tests.faults.machine import EXAMPLES, play, small_and_impatient
from tests.faults.model import Violation
from tests.servers import REPOSITORY

IS_WHOLE = os.environ.get("CAMPAIGN_STATS_FAULTS") == "all"
SEED = int(os.environ["CAMPAIGN_STATS_FAULT_SEED"]) if IS_WHOLE else 1  # `make faults` looks for what is new
HEALTHY_EXAMPLES = 150 if IS_WHOLE else 40


@pytest.fixture(scope="module")
def arena(postgres: Postgres) -> Iterator[Arena]:
    """A database of this file's own."""
    name = f"t{uuid4().hex[:12]}"

    async def administrate(statement: str) -> None:
        connection = await asyncpg.connect(postgres.url())
        try:
            await connection.execute(statement)
        finally:
            await connection.close()

    asyncio.run(administrate(f"CREATE DATABASE {name} TEMPLATE template_cs"))
    one = Arena(postgres.url(name))
    with small_and_impatient():
        yield one
    one.close()
    asyncio.run(administrate(f"DROP DATABASE {name} WITH (FORCE)"))


def test_the_service_as_it_is_keeps_every_promise(arena: Arena) -> None:
    """Random histories of crashes, lost sessions, rebalances, failing sends and jumping clocks find nothing"""
    assert play(arena, SEED, HEALTHY_EXAMPLES, shrink=True) >= HEALTHY_EXAMPLES


@pytest.mark.parametrize("breakage", BREAKAGES, ids=[breakage.name for breakage in BREAKAGES])
def test_a_deliberate_mistake_is_found(arena: Arena, breakage: Breakage) -> None:
    """Breakage found by random histories"""
    with breakage.applied(arena), pytest.raises(Violation, match=breakage.finding):
        play(arena, breakage.seed, EXAMPLES)


def test_every_breakage_is_listed_with_its_seed() -> None:
    """The list of breakages and seeds in tests/service/README.md"""
    listed = re.findall(
        r"^\| `(\w+)` \| .* \| (\d+) \|$", (REPOSITORY / "tests/service/README.md").read_text(), re.MULTILINE
    )
    assert listed == [(breakage.name, str(breakage.seed)) for breakage in BREAKAGES]
