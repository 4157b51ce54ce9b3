"""The grid of three brokers, started once; and a line per fault for `make faults`."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.stage import Grid


@pytest.fixture(scope="session")
def grid(servers_directory: Path) -> Iterator[Grid]:
    """Three brokers of Apache Kafka behind proxies."""
    servers = Grid(servers_directory / "grid")
    try:
        servers.start()
        yield servers
    finally:
        servers.stop()
