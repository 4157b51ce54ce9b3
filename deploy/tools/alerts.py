"""What is promised and what wakes somebody: one list, from which the rules and their tests are written.

Burn rates and windows are those of the SRE workbook, chapter 5 (2 % of a month's budget in an hour, 5 % in six hours,
10 % in three days). An objective is only judged where enough happened in the long window: a single late event in a
quiet night wakes nobody.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

JOB: Final = 'job="campaign-stats"'

Severity = Literal["page", "ticket"]


@dataclass(frozen=True, slots=True)
class Objective:
    """`share` of events are to be good. `bad`, `all`: PromQL selectors of counters; their rates are summed over a job.

    `good` instead of `bad` where a histogram counts what was in time. `least`: events in the long window below which
    nothing is said. `pages`: whether somebody is woken; else it waits for the morning.
    """

    name: str
    title: str
    says: str
    share: float
    every: str
    good: str | None = None
    bad: str | None = None
    least: int = 100
    pages: bool = True

    def ratio(self, window: str) -> str:
        """The share of events that were bad, as PromQL."""
        every = f"sum by (job) (rate({self.every}[{window}]))"
        if self.good is not None:
            return f"1 - sum by (job) (rate({self.good}[{window}])) / {every}"
        return f"sum by (job) (rate({self.bad}[{window}])) / {every}"

    def recorded(self, window: str) -> str:
        """The name under which it is recorded."""
        return f"campaign_stats:{self.name}_errors:ratio_rate{window}"


@dataclass(frozen=True, slots=True)
class Case:
    """Series as promtool's tests write them, a value every `step` minutes, and the minute at which to look."""

    series: Mapping[str, str]
    at: int
    step: int = 1


@dataclass(frozen=True, slots=True)
class Alert:
    """`section`: the heading of its runbook. `labels`: what it carries beside alertname and severity when it fires."""

    name: str
    severity: Severity
    expr: str
    lasts: str
    summary: str
    section: str
    fires: Case
    silent: Case
    labels: Mapping[str, str]


WINDOWS: Final = ("5m", "30m", "1h", "6h", "3d")
DELAY: Final = "campaign_stats_event_delay_seconds"


def _in_time(fact: str, seconds: str) -> tuple[str, str]:
    return f'{DELAY}_bucket{{fact="{fact}",le="{seconds}"}}', f'{DELAY}_count{{fact="{fact}"}}'


_FRESH, _NEWS = _in_time("news", "5.0")
_SOON_STOPPED, _PAUSES = _in_time("pause", "10.0")
_SOON_ANSWERED, _ANSWERS = _in_time("answer", "5.0")

OBJECTIVES: Final = (
    Objective(
        "freshness", "Freshness", "99 % of news of stats are published within 5 s of the hint", 0.99, _NEWS, good=_FRESH
    ),
    Objective(
        "pause", "Pause delay", "99 % of pauses are published within 10 s of the hint that led to them", 0.99, _PAUSES,
        good=_SOON_STOPPED, least=5,
    ),
    Objective(
        "answer", "Answer time", "99 % of sync requests are answered within 5 s", 0.99, _ANSWERS,
        good=_SOON_ANSWERED, least=20,
    ),
    Objective(
        "drift", "Drift", "99.9 % of the campaigns that the sweep compares have right numbers", 0.999,
        "campaign_stats_sweep_campaigns_total", bad="campaign_stats_drift_found_total", least=1_000, pages=False,
    ),
    Objective(
        "dead_letter", "Dead letters", "99.9 % of records can be read", 0.999,
        "campaign_stats_records_total", bad="campaign_stats_dead_letters_total", least=1_000, pages=False,
    ),
)  # fmt: skip

# Windows (long, short), times the budget, how long it must last, and how many minutes of data its test needs.
BURNS: Final = (
    ("BurnsFast", "1h", "5m", 14.4, "2m", 75),
    ("BurnsSlowly", "6h", "30m", 6.0, "15m", 400),
    ("Leaks", "3d", "6h", 1.0, "1h", 4_500),
)


def _burn(objective: Objective, suffix: str, long: str, short: str, times: float, lasts: str, minutes: int) -> Alert:
    budget = 1 - objective.share
    limit = f"{times * budget:.4g}"
    bad = objective.recorded
    expr = (
        f"{bad(long)} > {limit} and {bad(short)} > {limit}"
        f" and sum by (job) (increase({objective.every}[{long}])) >= {objective.least}"
    )
    is_page = objective.pages and suffix != "Leaks"
    camel = objective.title.title().replace(" ", "")
    return Alert(
        f"CampaignStats{camel}{suffix}",
        "page" if is_page else "ticket",
        expr,
        lasts,
        f"{objective.says}: the budget of a month is used up {times:g} times too fast",
        objective.title,
        _events(objective, bad_share=min(1.0, 1.5 * times * budget), minutes=minutes),
        _events(objective, bad_share=0.5 * times * budget, minutes=minutes),
        {"job": "campaign-stats"},
    )


def _events(objective: Objective, *, bad_share: float, minutes: int) -> Case:
    """A steady stream of 10 000 events a step, this share of them bad."""
    step = 30 if minutes > 1_000 else 1
    bad = round(10_000 * bad_share)
    counted = {objective.every: 10_000}
    if objective.good is not None:
        counted[objective.good] = 10_000 - bad
    if objective.bad is not None:
        counted[objective.bad] = bad
    return Case({_with_job(name): f"0+{each}x{minutes // step}" for name, each in counted.items()}, minutes, step)


def _with_job(selector: str) -> str:
    name, brace, labels = selector.partition("{")
    return f"{name}{{{JOB},{labels}" if brace else f"{name}{{{JOB}}}"


def _series(**values: str) -> dict[str, str]:
    return {f"campaign_stats_{name}{{{JOB}}}": value for name, value in values.items()}


def _of(name: str, label: str) -> str:
    return f"campaign_stats_{name}{{{JOB},{label}}}"


UNLESS_DEGRADED: Final = " unless on (job) max by (job) (campaign_stats_degraded) == 1"  # one page for one outage
_AWAY: Final = _of("degraded", 'dependency="kafka"')
_JOB = {"job": "campaign-stats"}

CAUSES: Final = (
    Alert(
        "CampaignStatsDown", "page", f"absent(campaign_stats_ready{{{JOB}}} == 1)", "3m",
        "No replica is ready: nothing is counted and no campaign is paused", "Down",
        Case({_of("ready", 'instance="a"'): "0x10", f'up{{{JOB},instance="a"}}': "1x10"}, 5),
        Case({_of("ready", 'instance="a"'): "0x10", _of("ready", 'instance="b"'): "1x10"}, 5),
        {},
    ),
    Alert(
        "CampaignStatsReplicaNotReady", "ticket", "campaign_stats_ready == 0", "15m",
        "A replica has not been ready for a quarter of an hour; the others do its work", "Down",
        Case({_of("ready", 'instance="a"'): "0x30"}, 20),
        Case({_of("ready", 'instance="a"'): "0x10 1x20"}, 20),
        {**_JOB, "instance": "a"},
    ),
    Alert(
        "CampaignStatsDegraded", "page", "max by (job, dependency) (campaign_stats_degraded) == 1", "5m",
        "A server that the service needs has been away for five minutes; nothing is lost, everything waits", "Degraded",
        Case({_of("degraded", 'dependency="database"'): "1x20"}, 10),
        Case({_of("degraded", 'dependency="database"'): "1x3 0x17"}, 10),
        {**_JOB, "dependency": "database"},
    ),
    Alert(
        "CampaignStatsStalled", "page",
        "sum by (job) (campaign_stats_lag_records) > 0"
        " and sum by (job) (increase(campaign_stats_generations_total[10m])) == 0" + UNLESS_DEGRADED,
        "5m", "Records wait and for ten minutes no offset was committed", "Stalled",
        Case(_series(lag_records="5x30", generations_total="7x30"), 20),
        Case({**_series(lag_records="5x30", generations_total="7x30"), _AWAY: "1x30"}, 20),
        _JOB,
    ),
    Alert(
        "CampaignStatsBehind", "page",
        "sum by (job) (campaign_stats_lag_records) > 600 * sum by (job) (rate(campaign_stats_records_total[10m])) > 0"
        + UNLESS_DEGRADED,
        "10m", "What waits is more than ten minutes of work", "Behind",
        Case(_series(lag_records="70000+1000x40", records_total="0+6000x40"), 30),
        Case(_series(lag_records="50000x40", records_total="0+6000x40"), 30),
        _JOB,
    ),
    Alert(
        "CampaignStatsOutboxStuck", "page",
        "max by (job) (campaign_stats_outbox_oldest_seconds) > 60" + UNLESS_DEGRADED,
        "3m", "Events have waited for more than a minute to be published", "Outbox",
        Case(_series(outbox_oldest_seconds="0+60x20"), 8),
        Case({**_series(outbox_oldest_seconds="0+60x20"), _AWAY: "1x20"}, 8),
        _JOB,
    ),
    Alert(
        "CampaignStatsSetAside", "ticket", "max by (job) (campaign_stats_outbox_set_aside_rows) > 0", "5m",
        "Kafka will never take some events as they are: their subscribers miss them", "Outbox",
        Case(_series(outbox_set_aside_rows="1x20"), 10),
        Case(_series(outbox_set_aside_rows="0x20"), 10),
        _JOB,
    ),
    Alert(
        "CampaignStatsFailing", "ticket", "max by (job) (campaign_stats_failing_campaigns) > 0", "30m",
        "Some campaigns cannot be recounted; their numbers are old and no guard watches them", "Failing campaigns",
        Case(_series(failing_campaigns="2x60"), 40),
        Case(_series(failing_campaigns="2x10 0x50"), 40),
        _JOB,
    ),
    Alert(
        "CampaignStatsDeferredOld", "ticket",
        "max by (job) (campaign_stats_deferred_oldest_seconds) > 900"
        " unless max by (job) (campaign_stats_failing_campaigns) > 0",
        "5m", "A campaign has been put off for a quarter of an hour", "Deferred",
        Case(_series(deferred_oldest_seconds="0+60x40", failing_campaigns="0x40"), 30),
        Case(_series(deferred_oldest_seconds="0+60x40", failing_campaigns="1x40"), 30),
        _JOB,
    ),
    Alert(
        "CampaignStatsSweepStopped", "ticket", "sum by (job) (increase(campaign_stats_sweep_pages_total[1h])) == 0"
        " and on (job) 0 < max by (job) (campaign_stats_sweep_interval_seconds) < 3000",
        "15m", "The sweep has compared nothing for an hour: what was never hinted stays wrong", "Sweep",
        Case(_series(sweep_pages_total="9x120", sweep_interval_seconds="300x120"), 90),
        Case(_series(sweep_pages_total="9x120", sweep_interval_seconds="0x120"), 90),
        _JOB,
    ),
    Alert(
        "CampaignStatsRestarts", "ticket", f"changes(process_start_time_seconds{{{JOB}}}[1h]) > 3", "1m",
        "A replica ended and was started again more than three times in an hour", "Restarts",
        Case({f'process_start_time_seconds{{{JOB},instance="a"}}': "0+600x60"}, 30),
        Case({f'process_start_time_seconds{{{JOB},instance="a"}}': "100x20 200x40"}, 30),
        {**_JOB, "instance": "a"},
    ),
    Alert(
        "CampaignStatsRebalancing", "ticket",
        "max by (job) (increase(campaign_stats_rebalances_total[30m])) > 20", "10m",  # every replica counts each
        "The group keeps dealing out its partitions anew", "Rebalancing",
        Case(_series(rebalances_total="0+2x90"), 60),
        Case({_of("rebalances_total", f'instance="{name}"'): "0x30 8x60" for name in "abcd"}, 60),  # a deployment
        _JOB,
    ),
    Alert(
        "CampaignStatsManyPauses", "page", "sum by (job) (increase(campaign_stats_pauses_total[15m])) > 50", "1m",
        "More than fifty campaigns were paused in a quarter of an hour: is it their mail, or the data", "Many pauses",
        Case(_series(pauses_total="0+10x40"), 30),
        Case(_series(pauses_total="0+1x40"), 30),
        _JOB,
    ),
    Alert(
        "CampaignStatsDeadLetters", "ticket", "sum by (job) (increase(campaign_stats_dead_letters_total[1h])) > 10",
        "5m", "More than ten records of an hour could not be read; they are kept", "Dead letters",
        Case({_of("dead_letters_total", 'reason="not_json"'): "0x10 20x60"}, 30),
        Case({_of("dead_letters_total", 'reason="not_json"'): "20x60"}, 30),
        {**_JOB},
    ),
    Alert(
        "CampaignStatsDoorBroken", "ticket",
        'sum by (job) (increase(campaign_stats_api_calls_total{status="500"}[15m])) > 0', "1m",
        "The sync-stats door answered 500: a bug of ours", "Door",
        Case({_of("api_calls_total", 'status="500"'): "0x10 3x30"}, 15),
        Case({_of("api_calls_total", 'status="500"'): "3x40", _of("api_calls_total", 'status="503"'): "0+5x40"}, 15),
        _JOB,
    ),
)  # fmt: skip

ALERTS: Final[Sequence[Alert]] = (
    *CAUSES,
    *(_burn(objective, *burn) for objective in OBJECTIVES for burn in BURNS),
)
