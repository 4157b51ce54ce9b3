"""What operators watch, on real servers: status page, panels, alerts, runbook."""

import asyncio
import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest

from consumer.panels import PANELS
from deploy.tools import rules
from deploy.tools.alerts import ALERTS
from deploy.tools.catalogue import catalogue, names
from tests.conftest import Bus, RunningService, StartService, eventually
from tests.prometheus import prometheus
from tests.servers import REPOSITORY
from tests.witnesses import ENVIRONMENT, PROGRAMS, SCRIPTS, node_modules
from tests.world import REFERENCE, add_campaign, add_prospects, hint, sync_request

TOKEN = "watching"
PAGES = [REPOSITORY / "deploy" / name for name in ("runbook.md", "operations.md")]
SCREENSHOTS = os.environ.get("CAMPAIGN_STATS_SCREENSHOTS")


MET = (
    'campaign_stats_event_delay_seconds_count{fact="news"}',
    'campaign_stats_event_delay_seconds_count{fact="pause"}',
    'campaign_stats_event_delay_seconds_count{fact="answer"}',
    'campaign_stats_dead_letters_total{reason="not_json"}',
    'campaign_stats_deferred_rows{reason="locked"}',
    "campaign_stats_sweep_campaigns_total",
)


@dataclass
class Loaded:
    """A service that has met everything it counts: news, a pause, an answer, a rejection, a dead letter, a deferral."""

    service: RunningService
    paused: UUID
    campaign: UUID
    locked: UUID
    bus: Bus
    db: asyncpg.Connection

    async def hint(self, campaign: UUID) -> None:
        """One hint for it."""
        await self.bus.publish(self.bus.topics.prefix + "prospect.status-changed", hint(campaign), key=str(campaign))


@pytest.fixture
async def loaded(service: StartService, bus: Bus, db: asyncpg.Connection, database_url: str) -> AsyncIterator[Loaded]:
    """Such a service; a row of it stays locked until the test ends."""
    campaign, locked, drifted = [await add_campaign(db, REFERENCE) for _ in range(3)]
    paused = await add_campaign(db, {"sent": 190, "bounced": 10})
    locker = await asyncpg.connect(database_url)
    await locker.execute("BEGIN")
    await locker.execute("SELECT 1 FROM campaigns WHERE id = $1 FOR UPDATE", locked)
    digest = hashlib.sha256(TOKEN.encode()).hexdigest()
    running = await service(sweep_interval_s=1, drift_grace_s=60, api_tokens=json.dumps({digest: "*"}), api_port=0)
    one = Loaded(running, paused, campaign, locked, bus, db)
    prefix = bus.topics.prefix
    for each in (campaign, paused, locked):
        await one.hint(each)
    await bus.publish(prefix + "campaign.sync-requested", sync_request(campaign), key=str(campaign))
    await bus.publish(prefix + "campaign.sync-requested", sync_request(uuid4()), key="x")
    await bus.publish(prefix + "prospect.status-changed", b"not JSON <script>alert(1)</script>", key="y")
    await add_prospects(db, drifted, "sent", 1)

    async def has_met_all() -> bool:
        series = await running.metrics()
        assert [name for name in MET if not series[name]] == []
        return True

    await eventually(has_met_all, "everything was met", running)
    yield one
    await locker.close()


async def browsed(url: str, screenshots: Path) -> asyncio.subprocess.Process:
    """Chromium at the page; its first line on stdout is the report."""
    chromium = shutil.which("chromium")
    assert chromium is not None
    return await asyncio.create_subprocess_exec(
        PROGRAMS / "node", SCRIPTS / "status.cjs", url, screenshots, chromium,
        env={**ENVIRONMENT, "NODE_PATH": str(node_modules())}, limit=2**22,
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip


async def said(browser: asyncio.subprocess.Process) -> dict[str, Any]:
    assert browser.stdout is not None
    async with asyncio.timeout(90):
        found: dict[str, Any] = json.loads(await browser.stdout.readline())
        return found


@pytest.mark.chromium
async def test_the_status_page_is_true_live_and_good_for_everybody(loaded: Loaded, tmp_path: Path) -> None:
    _, html = await loaded.service.get("/")
    assert "<script>alert" not in html
    text = re.sub(r"<[^>]+>", " ", html)
    for words in ("ready", str(loaded.paused), "10 of 200", "5.00 %", "not_json", "locked"):
        assert words in text, words
    folder = Path(SCREENSHOTS) if SCREENSHOTS else tmp_path
    browser = await browsed(loaded.service.url + "/", folder)
    try:
        report = await said(browser)
        own = loaded.service.url + "/"
        assert {one for one in report["requests"] if one != own} == set(), "nothing is fetched from anywhere else"
        assert report["console"] == []
        assert [name for name, wider in report["overflow"].items() if wider] == []
        assert [found for found in report["axe"].values() if found] == []
        assert report["still"] == "ready", "the page without JavaScript"
        assert "Last pauses" in report["focus"], "the keyboard gets to every table that may scroll"
        assert report["focus"][-1] == "A", "and out of them again"
        assert sorted(one.name for one in folder.glob("status-*.png")) == [
            f"status-{size}-{scheme}.png" for size in ("desktop", "phone") for scheme in ("dark", "light")
        ]

        later = await add_campaign(loaded.db, {"sent": 90, "bounced": 30})
        await loaded.hint(later)
        assert browser.stdin is not None
        browser.stdin.write(json.dumps(["#pauses", str(later)]).encode() + b"\n")
        assert await said(browser) == {"seen": True}
    finally:
        if browser.stdin is not None:
            browser.stdin.close()
        await browser.wait()


async def test_the_page_says_what_is_away_and_answers_all_the_same(
    service: StartService, environment: dict[str, str]
) -> None:
    environment["DATABASE_URL"] = "postgresql://operator:planted-password@127.0.0.1:1/away"
    one = await service(ready=False)

    async def waits() -> bool:
        return one.port > 0 and "waiting for database and topics" in (await one.get("/"))[1]

    await eventually(waits, "the page says what it waits for", one)
    status, html = await one.get("/")
    assert status == 200
    assert 'class="wrong"' in html
    assert "planted-password" not in html
    assert "127.0.0.1" not in html


@pytest.mark.prometheus
async def test_every_panel_and_every_metric_has_data_under_load(loaded: Loaded, tmp_path: Path) -> None:
    calls = 3
    async with prometheus(tmp_path / "p", [f"127.0.0.1:{loaded.service.port}"]) as server:

        async def seen() -> bool:
            return len(await server.query("campaign_stats_ready")) == 1

        await eventually(seen, "a scrape")
        for _ in range(calls):
            await loaded.hint(loaded.campaign)
            await loaded.hint(await add_campaign(loaded.db, {"sent": 90, "bounced": 30}))
            await loaded.bus.publish(
                loaded.bus.topics.prefix + "campaign.sync-requested", sync_request(loaded.campaign), key="x"
            )
            await _call(loaded)
            await asyncio.sleep(1.0)

        async def empty() -> list[str]:
            found = {panel.title: await server.query(panel.query) for panel in PANELS}
            return [
                title
                for title, answer in found.items()
                if not answer or not any(value == value for _, value in answer)  # NaN: a quantile of nothing
            ]

        async def all_full() -> bool:
            return await empty() == []

        try:
            await eventually(all_full, "every panel has data")
        except AssertionError as error:
            raise AssertionError(f"panels without data: {await empty()}") from error
        exposed = {labels["__name__"] for labels, _ in await server.query('{__name__=~"campaign_stats_.+"}')}
        assert {name for entry in catalogue() for name in names(entry)} <= exposed
        assert exposed <= {
            name + suffix for entry in catalogue() for name in names(entry) for suffix in ("", "_created")
        } | {f"{entry.name}_created" for entry in catalogue()}
        [(_, series)] = await server.query('count({__name__=~"campaign_stats_.+"})')
        assert series < 1_000, "no label grows with campaigns"


async def _call(loaded: Loaded) -> None:
    process = await asyncio.create_subprocess_exec(
        "curl", "-sS", "-X", "POST", "-H", f"Authorization: Bearer {TOKEN}",
        f"http://127.0.0.1:{loaded.service.api_port}/api/campaigns/{loaded.campaign}/sync-stats",
        stdout=asyncio.subprocess.DEVNULL,
    )  # fmt: skip
    assert await process.wait() == 0


@pytest.mark.prometheus
async def test_drill_what_locks_our_table_raises_the_right_alerts_and_they_clear(
    loaded: Loaded, tmp_path: Path, database_url: str
) -> None:
    """The rules themselves, every window and wait a sixtieth as long."""
    target = [f"127.0.0.1:{loaded.service.port}"]
    late = [await add_campaign(loaded.db, {"sent": 1}) for _ in range(120)]
    async with prometheus(tmp_path / "p", target, rules.rules(faster=60)) as server:

        async def pages() -> set[str]:
            return {name for name, labels in (await server.firing()).items() if labels["severity"] == "page"}

        async def quiet() -> bool:
            return await server.query("campaign_stats_ready") != [] and await pages() == set()

        await eventually(quiet, "no page at first", loaded.service, timeout_s=60)
        locker = await asyncpg.connect(database_url)
        await locker.execute("BEGIN; LOCK TABLE campaign_stats.outbox IN ACCESS EXCLUSIVE MODE")
        for campaign in late:
            await loaded.hint(campaign)

        async def degraded() -> bool:
            return "CampaignStatsDegraded" in await pages()

        await eventually(degraded, "CampaignStatsDegraded", loaded.service, timeout_s=60)
        assert (await server.firing())["CampaignStatsDegraded"]["dependency"] == "database"
        await locker.close()

        async def burns() -> bool:
            return "CampaignStatsFreshnessBurnsFast" in await pages()

        await eventually(burns, "CampaignStatsFreshnessBurnsFast", loaded.service, timeout_s=60)
        await eventually(quiet, "the page clears", loaded.service, timeout_s=120)


def commands() -> list[tuple[str, str]]:
    """Section and command of every line of a `sh` block in the runbook and in operations.md."""
    found, section, in_block = [], "", False
    for line in "\n".join(page.read_text() for page in PAGES).splitlines():
        if line.startswith("## "):
            section = line[3:]
        elif line == "```sh":
            in_block = True
        elif line.startswith("```"):
            in_block = False
        elif in_block:
            found.append((section, line))
    return found


async def test_every_command_of_runbook_and_operations_does_what_it_says(
    loaded: Loaded, environment: dict[str, str]
) -> None:
    assert len(commands()) > 30
    assert {section for section, _ in commands()} >= {alert.section for alert in ALERTS}
    variables = {
        **environment,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}",
        "OPERATORS": loaded.service.url,
        "CAMPAIGN": str(loaded.paused),
    }
    gate = asyncio.Semaphore(2)

    async def run(section: str, line: str) -> str | None:
        async with gate:
            process = await asyncio.create_subprocess_exec(
                "bash", "-o", "pipefail", "-c", line.removesuffix(" || true"),
                env=variables, stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
            )  # fmt: skip
            async with asyncio.timeout(60):
                output, _ = await process.communicate()
        allowed = (0, 1) if line.endswith(" || true") else (0,)  # 1 is an answer: there is drift, or nothing to send
        if process.returncode not in allowed or not output.strip() or b"Traceback" in output:
            return f"{section}: {line}: exit {process.returncode}\n{output.decode()[-1500:]}"
        return None

    different = dict.fromkeys((line, section) for section, line in commands())
    results = await asyncio.gather(*(run(section, line) for line, section in different))
    assert [result for result in results if result is not None] == []
