"""A real Prometheus that scrapes what a test runs."""

import asyncio
import json
import shutil
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlencode
from urllib.request import urlopen

import yaml

from consumer.demo.servers import free_port

READY_S = 20.0


@dataclass(frozen=True)
class Prometheus:
    """Asked through its HTTP API."""

    port: int

    async def ask(self, path: str, **parameters: str) -> Any:
        """`data` of an answer. AssertionError when it says that the question is wrong."""

        def fetch() -> Any:
            with urlopen(f"http://127.0.0.1:{self.port}{path}?{urlencode(parameters)}", timeout=10) as response:
                return json.load(response)

        answer = await asyncio.to_thread(fetch)
        assert answer["status"] == "success", answer
        return answer["data"]

    async def query(self, expression: str) -> list[tuple[dict[str, str], float]]:
        """Labels and value of each series in the answer, now."""
        found = (await self.ask("/api/v1/query", query=expression))["result"]
        return [(one["metric"], float(one["value"][1])) for one in found]

    async def firing(self) -> dict[str, Mapping[str, str]]:
        """Alert -> labels, of those that fire."""
        alerts = (await self.ask("/api/v1/alerts"))["alerts"]
        return {one["labels"]["alertname"]: one["labels"] for one in alerts if one["state"] == "firing"}


@asynccontextmanager
async def prometheus(directory: Path, targets: Sequence[str], rules: object = None) -> AsyncIterator[Prometheus]:
    """Scrapes `targets` (host:port) every second as job campaign-stats, judges `rules` as often; ended afterwards."""
    program = shutil.which("prometheus")
    assert program is not None, "Prometheus is missing (Debian: prometheus)"
    directory.mkdir()
    (directory / "rules.yaml").write_text(yaml.safe_dump(rules or {"groups": []}))
    configuration = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": ["rules.yaml"],
        "scrape_configs": [{"job_name": "campaign-stats", "static_configs": [{"targets": list(targets)}]}],
    }
    (directory / "prometheus.yml").write_text(yaml.safe_dump(configuration))
    port = free_port()
    with (directory / "log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            program,
            f"--config.file={directory / 'prometheus.yml'}",
            f"--storage.tsdb.path={directory / 'data'}",
            f"--web.listen-address=127.0.0.1:{port}",
            stdin=asyncio.subprocess.DEVNULL, stdout=log, stderr=log,
        )  # fmt: skip
    server = Prometheus(port)
    try:
        deadline = time.monotonic() + READY_S
        while True:
            try:
                await server.query("vector(1)")
                break
            except OSError as error:
                if time.monotonic() > deadline or process.returncode is not None:
                    raise AssertionError((directory / "log").read_text()[-2000:]) from error
                await asyncio.sleep(0.1)
        yield server
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()
