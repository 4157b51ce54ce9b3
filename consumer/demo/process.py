"""The service as an operator runs it: a process with an environment, log lines and a port."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections import Counter
from pathlib import Path
from typing import Final

import aiohttp

from consumer.demo.place import Place
from consumer.demo.servers import Server

SWEEP_INTERVAL_S: Final = 2.0
DRIFT_GRACE_S: Final = 1.0
_SAMPLE: Final = re.compile(r"campaign_stats_(\w+?)(?:\{[^}]*\})? ([0-9.e+-]+)")


class ServiceProcess(Server):
    """`campaign-stats run` as our child; its log is the one JSON object a line it prints."""

    name = "service"

    def __init__(self, place: Place) -> None:
        super().__init__(place.folder)
        self._place = place
        self.port: int | None = None
        self.exit_code: int | None = None

    def start(self) -> None:
        """Start and wait until /readyz says ready. Raises ServerFailed."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "consumer", "run"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.directory,
                env=environment(self._place),
                start_new_session=True,  # a Ctrl-C in the terminal must reach us only
            )
        self.wait_until_ready()

    def is_ready(self) -> bool:
        """Whether it has told its port and answers there that it is ready."""
        if self.port is None:
            self.port = listening_port(self.log)
            return False
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/readyz", timeout=1) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def stop(self, number: int = signal.SIGTERM) -> None:
        """SIGTERM, later SIGKILL; `exit_code` tells what it said."""
        process = self.process
        super().stop(number)
        if process is not None:
            self.exit_code = process.returncode

    def ended(self) -> int | None:
        """Its exit code if it ended by itself."""
        return self.process.poll() if self.process is not None else None

    def complaints(self, count: int = 10) -> list[str]:
        """The last log lines that are errors or no JSON at all (a traceback)."""
        lines = []
        with contextlib.suppress(OSError):
            for line in self.log.read_text("utf-8", "replace").splitlines():
                try:
                    level = json.loads(line).get("level")
                except (ValueError, AttributeError):
                    level = None
                if level not in ("debug", "info", "warning"):
                    lines.append(line)
        return lines[-count:]

    async def metrics(self, session: aiohttp.ClientSession) -> Counter[str]:
        """Its metrics now, by name, summed over labels; empty when it does not answer."""
        try:
            async with session.get(f"http://127.0.0.1:{self.port}/metrics") as answer:
                text = await answer.text()
        except (aiohttp.ClientError, TimeoutError):
            return Counter()
        sums: Counter[str] = Counter()
        for line in text.splitlines():
            if sample := _SAMPLE.fullmatch(line):
                sums[sample.group(1)] += int(float(sample.group(2)))
        return sums


def environment(place: Place) -> dict[str, str]:
    """Ours without any setting of the service, and the demo's settings."""
    outer = {
        name: value
        for name, value in os.environ.items()
        if not name.upper().startswith("CAMPAIGN_STATS_")
        and name.upper() not in ("DATABASE_URL", "KAFKA_BOOTSTRAP_SERVERS")
    }
    settings = {
        "DATABASE_URL": place.database_url,
        "KAFKA_BOOTSTRAP_SERVERS": place.bootstrap,
        "CAMPAIGN_STATS_TOPIC_PREFIX": place.topics.prefix,
        "CAMPAIGN_STATS_HTTP_PORT": "0",
        "CAMPAIGN_STATS_SWEEP_INTERVAL_S": str(SWEEP_INTERVAL_S),
        "CAMPAIGN_STATS_DRIFT_GRACE_S": str(DRIFT_GRACE_S),
    }
    if place.embedded_kafka:
        settings["CAMPAIGN_STATS_FETCH_MAX_WAIT_MS"] = "10"
        settings["CAMPAIGN_STATS_PRODUCER_IDEMPOTENCE"] = "false"
    return {**outer, **settings}


def listening_port(log: Path) -> int | None:
    """The operators' port, once the log tells it."""
    with contextlib.suppress(OSError):
        for line in log.read_text("utf-8", "replace").splitlines():
            with contextlib.suppress(ValueError, AttributeError):
                said = json.loads(line)
                if said.get("event") == "listening" and said.get("door") == "operators":
                    return int(said["port"])
    return None
