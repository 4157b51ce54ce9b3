"""Failovers that lost something: what the other server still knows stays true, and one command tells the rest anew.

deploy/operations.md, "After a failover that lost something", is written from these tests.
"""

import shutil
import signal
import subprocess
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import asyncpg
import pytest

from consumer import migrations
from consumer.demo.servers import Postgres
from tests.conftest import NO_FSYNC, RunningService, eventually
from tests.faults.checker import PAUSED, STATS_UPDATED, Findings, Told
from tests.faults.stage import Grid, Stage, is_still, stage
from tests.servers import kafka_jars

pytestmark = pytest.mark.apache_kafka

BOUNCING: Final = {"pending": 5, "sent": 200, "bounced": 20}
HEALTHY: Final = {"pending": 5, "sent": 220}


class Restorable(Postgres):
    """A PostgreSQL that can be put back to how it was."""

    @property
    def _copy(self) -> Path:
        return self.directory / "data.copy"

    def remember(self) -> None:
        """A copy of the data folder, taken while it is stopped."""
        self.stop()
        subprocess.run(["cp", "-a", self.directory / "data", self._copy], check=True)  # owners too, if we are root
        self.start()

    def restore(self) -> None:
        """Killed, put back, started at the same port."""
        self.kill()
        shutil.rmtree(self.directory / "data")
        self._copy.rename(self.directory / "data")
        self.start()


@contextmanager
def own_postgres(directory: Path) -> Iterator[Restorable]:
    server = Restorable(directory, options=NO_FSYNC, tcp=True)
    try:
        server.start()
        yield server
    finally:
        server.stop()


async def well(running: RunningService) -> None:
    """Wait until nothing is degraded any more."""

    async def is_well() -> bool:
        return await running.get("/readyz") == (200, '{"ready":true,"degraded":[]}')

    await eventually(is_well, "nothing is degraded", running, timeout_s=60)


async def stands_still(running: RunningService) -> None:
    """Wait until a signal has stopped the process."""
    await eventually(lambda: is_still(running), "the process stands still", timeout_s=30)


async def told_anew(one: Stage) -> None:
    """What the runbook says, in its order; exit codes and all."""
    assert (await one.command("migrate"))[:2] == (0, "nothing to do: the database is up to date\n")
    assert (await one.command("doctor"))[0] == 0
    code, out, _ = await one.command("reconcile", "--all", "--now")
    assert code == 0
    assert int(out) > 0
    await one.settled()
    for arguments, nothing in (
        (("deferred", "list"), "no deferred recounts\n"),
        (("outbox", "list"), "no events in the outbox\n"),
    ):
        assert (await one.command(*arguments))[:2] == (0, nothing)
    assert (await one.command("drift"))[0] == 0


def latest(told: Iterable[Told]) -> dict[str, int]:
    """Campaign -> the highest version that a follower of news and pauses has seen."""
    found: dict[str, int] = {}
    for event in told:
        if event.type in (STATS_UPDATED, PAUSED):
            found[event.subject] = max(found.get(event.subject, 0), event.data["version"])
    return found


async def restored(grid: Grid, directory: Path, breakage: str = "") -> list[str]:
    """What does not hold after PostgreSQL went back to an older state while Kafka and the service went on."""
    with own_postgres(directory) as server:
        admin = await asyncpg.connect(server.url())
        await admin.execute("CREATE DATABASE template_cs")
        await admin.close()
        await migrations.migrate(server.url("template_cs"), reference_schema=True)
        async with stage(grid, server) as one:
            upstream = one.upstream
            plain = await upstream.campaigns(12, {"pending": 50, "sent": 5})
            early = await upstream.campaigns(1, BOUNCING)  # paused before the copy
            again = await upstream.campaigns(2, BOUNCING)  # paused after it, for bounces from before it
            undone = await upstream.campaigns(2, HEALTHY)  # bounced and paused after it: neither is left
            running = await one.replica(point="after acknowledgement", number=signal.SIGSTOP, breakage=breakage)
            await upstream.change(early, "sent")  # alone, so that all of it is done
            await stands_still(running)  # so that the copy holds outbox rows that are published already
            server.remember()
            running.process.send_signal(signal.SIGCONT)
            await upstream.close()  # its session is gone

            await upstream.change(plain, "sent")
            await upstream.change([*early, *plain[:8]], "replied", of="sent")
            await upstream.change(again, "sent")
            await upstream.change(undone, "bounced", of="sent", prospects=20)
            await upstream.request(plain[:2])
            await upstream.babble(2)
            late = await upstream.campaigns(2, {"sent": 1})  # the restored database does not know them
            await upstream.change(late, "replied", of="sent")
            before = await one.settled_and_checked(paused=[*early, *again, *undone])
            before.must(
                max(Counter(event.id for event in before.told).values()) > 1, "the copy held nothing that was published"
            )

            server.restore()
            await upstream.close()
            await well(running)
            await upstream.change(plain[6:10], "bounced", of="pending")
            await told_anew(one)
            findings = await one.check()
            findings.problems += before.problems
            _nothing_was_told_twice_in_other_words(findings, before)
            pauses = {event.subject for event in before.pauses.values()}
            findings.must(pauses == {str(one) for one in (*early, *again, *undone)}, "not all were paused before")
            new = [event.subject for key, event in findings.pauses.items() if key not in before.pauses]
            findings.must(sorted(new) == sorted(map(str, again)), f"paused anew: {new}, not the bouncing {again}")
            status = {event.subject: event.data["campaign"]["status"] for event in _last_news(findings)}
            findings.must(
                [status.get(str(one)) for one in (*early, *again, *undone)] == ["paused"] * 3 + ["active"] * 2,
                "followers end with another status",
            )
            # The audit went back too. What was told meanwhile stands in the topic alone, and is nothing to repair.
            for told in before.pauses.values():
                if told.subject in map(str, (*again, *undone)):
                    lost = f"pauses: {told.subject} version {told.data['version']} is told but not in the audit"
                    findings.must(lost in findings.problems, f"not found: {lost}")
                    findings.problems = [problem for problem in findings.problems if problem != lost]
            return findings.problems


def _nothing_was_told_twice_in_other_words(findings: Findings, before: Findings) -> None:
    """What was told after a failover is newer than all before, but for repeats of it, word for word."""
    seen, known = latest(before.told), {(event.type, event.id, event.data["version"]) for event in before.told}
    anew = [event for event in findings.told if (event.type, event.id, event.data.get("version")) not in known]
    findings.must(anew, "nothing was told anew")
    for event in anew:
        newer = event.data["version"] > seen.get(event.subject, 0)
        findings.must(newer, f"versions: {event.subject} went back to {event.data['version']}")


def _last_news(findings: Findings) -> list[Told]:
    """What a follower ends with, one of each campaign."""
    last: dict[str, Told] = {}
    for event in findings.told:
        if event.type == STATS_UPDATED and (
            event.subject not in last or event.data["version"] > last[event.subject].data["version"]
        ):
            last[event.subject] = event
    return list(last.values())


async def test_a_restored_postgres_repeats_no_version_and_followers_end_at_the_truth(
    grid: Grid, servers_directory: Path
) -> None:
    """PostgreSQL put back to an older state while Kafka is ahead; `reconcile --all --now`."""
    assert await restored(grid, servers_directory / "restored") == []


@pytest.mark.faults
async def test_versions_that_only_count_are_found_by_a_restore(grid: Grid, servers_directory: Path) -> None:
    """A version that is a plain counter repeats itself after a restore, and is found."""
    problems = await restored(grid, servers_directory / "counted", "version_is_a_plain_counter")
    assert any("says two things" in problem for problem in problems), problems
    assert any(problem.startswith("follower: ends with") for problem in problems), problems


def elect_uncleanly(bootstrap: str) -> None:
    """What an operator does whose last complete replica is gone for good."""
    subprocess.run(
        ["java", "-cp", f"{kafka_jars()}/*", "org.apache.kafka.tools.LeaderElectionCommand", "--bootstrap-server",
         bootstrap, "--election-type", "unclean", "--all-topic-partitions"],
        check=True, capture_output=True, stdin=subprocess.DEVNULL,
    )  # fmt: skip


async def cut_off(directory: Path, postgres: Postgres, breakage: str = "") -> list[str]:
    """What is written lost its end by an unclean election; AssertionError for what does not hold.

    Returns what was not brought back but pauses and answers, which nobody can.
    """
    impatient = {"broker.session.timeout.ms": "3000", "broker.heartbeat.interval.ms": "500"}
    grid = Grid(directory, impatient, controllers=(1,))
    try:
        grid.start()
        leader, follower = grid.cluster.nodes[2], grid.cluster.nodes[3]
        async with stage(grid, postgres, brokers=(2, 3)) as one:
            one.patience_s = 20.0 if breakage else one.patience_s
            upstream = one.upstream
            told, unheard, later = [await upstream.campaigns(6, {"pending": 50, "sent": 5}) for _ in range(3)]
            bouncing = await upstream.campaigns(2, HEALTHY)
            running = await one.replica(sweep_interval_s=1, breakage=breakage)
            await upstream.change([*told, *unheard, *later, *bouncing], "sent")
            await upstream.babble(2)
            assert (await one.settled_and_checked()).problems == []

            follower.stop()
            await upstream.change(told, "replied", of="sent")  # the service hears and tells it: that is lost
            await upstream.change(bouncing, "bounced", of="sent", prospects=20)  # and so are these pauses
            await upstream.request(told[:1])  # and this answer
            before = await one.settled_and_checked(paused=bouncing)
            assert before.problems == []
            running.process.send_signal(signal.SIGSTOP)
            await stands_still(running)
            await upstream.change(unheard, "replied", of="sent")  # nobody has read it yet
            await upstream.close()
            leader.kill()
            shutil.rmtree(leader.directory / "log")
            running.process.send_signal(signal.SIGCONT)
            grid.cluster.start([3])
            elect_uncleanly(grid.cluster.nodes[1].bootstrap)
            await well(running)
            await upstream.change(later, "replied", of="sent")
            await one.settled()

            findings = await one.check()
            lost = {event.id for event in before.told} - {event.id for event in findings.told}
            assert lost, "the election cut off nothing"
            # Nobody has run a command: the sweep alone found what was never heard, the rest is still untold.
            untold = {problem.split()[5] for problem in findings.problems if problem.startswith("follower: ends with")}
            assert not untold & {str(campaign_id) for campaign_id in (*unheard, *later)}
            assert "follower: " in " ".join(findings.problems)
            await told_anew(one)
            findings = await one.check()
            assert sorted(findings.problems) == sorted(
                [
                    *(
                        f"pauses: {event.subject} version {event.data['version']} is in the audit but never told"
                        for event in before.pauses.values()
                    ),
                    *(f"request {request} was never answered" for _, request in upstream.requested),
                ]
            )
            status = {event.subject: event.data["campaign"]["status"] for event in _last_news(findings)}
            assert [status[str(campaign_id)] for campaign_id in bouncing] == ["paused"] * len(bouncing)
            upstream.requested.clear()
            await upstream.request(told[:1])  # whoever asked asks again
            await eventually(lambda: _answered(one), "the second request is answered", timeout_s=60)
            assert running.process.returncode is None
            return [problem for problem in findings.problems if not problem.startswith(("pauses: ", "request "))]
    finally:
        grid.stop()


@pytest.mark.faults
async def test_an_unclean_election_costs_nothing_that_a_sweep_and_a_reconcile_do_not_bring_back(
    servers_directory: Path, postgres: Postgres
) -> None:
    """An unclean leader election cuts off hints, news and pauses; sweep, then `reconcile --all --now`."""
    assert await cut_off(servers_directory / "unclean", postgres) == []


@pytest.mark.faults
async def test_a_position_behind_the_end_is_found_by_an_unclean_election(
    servers_directory: Path, postgres: Postgres
) -> None:
    """Breakage found by an unclean election [a_position_that_moved_back_is_kept]"""
    with pytest.raises(AssertionError, match="all is quiet"):
        await cut_off(servers_directory / "unclean-broken", postgres, "a_position_that_moved_back_is_kept")


async def _answered(one: Stage) -> bool:
    return not [problem for problem in (await one.check()).problems if problem.startswith("request ")]
