"""The grid of three brokers, started once; and a line per fault for `make faults`."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.stage import Grid
from tests.faults.strict import Strict, strict_broker


@pytest.fixture(scope="session")
def grid(servers_directory: Path) -> Iterator[Grid]:
    """Three brokers of Apache Kafka behind proxies."""
    servers = Grid(servers_directory / "grid")
    try:
        servers.start()
        yield servers
    finally:
        servers.stop()


@pytest.fixture(scope="session")
def strict(servers_directory: Path) -> Iterator[Strict]:
    """A broker with rights for users."""
    with strict_broker(servers_directory / "strict-kafka") as server:
        yield server
