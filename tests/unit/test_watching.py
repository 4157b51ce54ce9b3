"""Catalogue, rules, panels, status page: what is written follows from the code, and a mistake in it is noticed."""

import math
import re
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from consumer.health import Health
from consumer.metrics import Metrics
from consumer.panels import PANELS, Panel
from consumer.status import Numbers, Status
from deploy.tools import catalogue, check, dashboard, programs, rules
from deploy.tools.alerts import ALERTS, OBJECTIVES
from deploy.tools.check import CHECKS, Check, problems_of
from deploy.tools.programs import MissingProgram

LABELS = {"kind", "reason", "caller", "mode", "verdict", "status", "type", "fact", "dependency", "topic", "partition"}


@pytest.mark.parametrize("one", [one for one in CHECKS if one.is_quick], ids=lambda one: one.name)
def test_the_quick_checks_find_nothing(one: Check) -> None:
    assert problems_of(one) == []


def test_the_catalogue_has_every_metric_with_meaning_unit_and_when_to_look() -> None:
    metrics = Metrics(CollectorRegistry())
    families = {family.name for family in metrics.registry.collect()}
    assert {entry.name for entry in metrics.catalogue} == families
    assert all(entry.meaning.endswith(".") and entry.unit and entry.look for entry in metrics.catalogue)
    assert {label for entry in metrics.catalogue for label in entry.labels} == LABELS, (
        "none of them grows with campaigns"
    )


def test_a_stale_catalogue_and_too_many_series_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stale = programs.ROOT / "build" / "stale.md"
    stale.parent.mkdir(exist_ok=True)
    stale.write_text(catalogue.text().replace("campaign_stats_pauses_total", "campaign_stats_stops_total"))
    try:
        monkeypatch.setattr(catalogue, "DOCUMENT", stale)
        monkeypatch.setattr(catalogue, "MOST_SERIES", 10)
        first, second = catalogue.problems()
        assert first == "build/stale.md is not what consumer/metrics.py says: make deploy-files"
        assert second.endswith("more than 10: take a label away")
    finally:
        stale.unlink()


def test_an_alert_on_a_metric_that_does_not_exist_or_without_a_runbook_is_noticed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wrong = replace(ALERTS[0], name="Wrong", expr="campaign_stats_sorrow_total > 0", section="Sorrow")
    monkeypatch.setattr(rules, "ALERTS", (*ALERTS, wrong))
    found = rules.problems()
    assert "Wrong: the service has no metric campaign_stats_sorrow_total" in found
    assert "deploy/runbook.md has no section `## Sorrow`: write it" in found
    assert any(one.startswith("deploy/prometheus/rules.yaml is not what") for one in found)


@pytest.mark.parametrize(
    ("right", "wrong"), [('fact="pause"', 'fact="pauses"'), ('le="10.0"', 'le="12.0"'), ('le="10.0"', 'le="10"')]
)
def test_an_objective_on_a_series_that_does_not_exist_is_noticed(
    monkeypatch: pytest.MonkeyPatch, right: str, wrong: str
) -> None:
    [pause] = [one for one in OBJECTIVES if one.name == "pause"]
    assert pause.good is not None
    broken = replace(pause, good=pause.good.replace(right, wrong))
    monkeypatch.setattr(rules, "OBJECTIVES", (broken,))
    series = f"campaign_stats_event_delay_seconds_bucket{{{wrong}}}"
    said = f"campaign_stats:pause_errors:ratio_rate5m: the service has no series {series}"
    assert said in rules.problems()


def test_an_alert_whose_cases_ask_for_another_label_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    [degraded] = [one for one in ALERTS if one.name == "CampaignStatsDegraded"]
    case = replace(degraded.fires, series={'campaign_stats_degraded{dependency="moon"}': "1x20"})
    monkeypatch.setattr(rules, "ALERTS", (replace(degraded, fires=case),))
    said = 'CampaignStatsDegraded, its cases: the service has no series campaign_stats_degraded{dependency="moon"}'
    assert said in rules.problems()


def test_rates_before_the_first_note_are_no_fantasy(monkeypatch: pytest.MonkeyPatch) -> None:
    made: dict[str, Any] = {}

    def fill(registry: CollectorRegistry) -> None:
        made["calls"] = Counter("calls", "Calls.", registry=registry)

    seen, _, _ = numbers(monkeypatch, fill)
    made["calls"].inc(100)
    assert dict(seen.values([rate := Panel("g", "rate", "rows", "calls", "rate")], seen.read()))[rate] == {"": 100.0}


def test_every_objective_has_three_alerts_and_every_alert_both_cases() -> None:
    names = [alert.name for alert in ALERTS]
    assert len(names) == len(set(names))
    for objective in OBJECTIVES:
        burning = [one for one in ALERTS if one.section == objective.title and re.search("Burns|Leaks", one.name)]
        assert len(burning) == 3
        assert {alert.severity for alert in burning} == ({"page", "ticket"} if objective.pages else {"ticket"})
    assert all(alert.fires.series and alert.silent.series and alert.fires != alert.silent for alert in ALERTS)


@pytest.mark.prometheus
def test_promtool_notices_an_alert_that_does_not_fire(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deaf = replace(ALERTS[0], expr=ALERTS[0].expr.replace("absent(", "absent(0 * "))
    monkeypatch.setattr(rules, "ALERTS", (deaf,))
    monkeypatch.setattr(rules, "RULES", tmp_path / "rules.yaml")
    monkeypatch.setattr(rules, "RESOURCE", tmp_path / "prometheusrule.yaml")
    monkeypatch.setattr(rules, "TESTS", {1: tmp_path / "rules_test.yaml"})
    for path, text in rules.files().items():
        path.write_text(text)
    assert any("CampaignStatsDown" in one for one in rules.promtool_problems()), "it fires where it should not"


def test_windows_and_waits_of_a_drill_are_shorter() -> None:
    [alert] = [
        rule
        for group in rules.rules(faster=60)["groups"]
        for rule in group["rules"]
        if rule.get("alert") == "CampaignStatsStalled"
    ]
    assert alert["for"] == "5s"
    assert "[10s]" in alert["expr"]


def test_every_panel_asks_for_a_metric_in_a_way_its_kind_allows() -> None:
    kinds = {entry.name: entry for entry in catalogue.catalogue()}
    for panel in PANELS:
        if panel.metric.startswith("process_"):
            continue
        entry = kinds[panel.metric]
        allowed = {"counter": {"rate"}, "histogram": {"p50", "p99"}, "gauge": {"sum", "max"}}[entry.kind]
        assert panel.fold in allowed, panel.title
        assert panel.by is None or panel.by in entry.labels
    assert len({(panel.group, panel.title) for panel in PANELS}) == len(PANELS)


def test_a_panel_of_no_metric_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = replace(PANELS[0], title="Wrong", metric="campaign_stats_sorrow")
    monkeypatch.setattr(dashboard, "PANELS", (*PANELS, wrong))
    first, second = dashboard.problems()
    assert first == "panel Wrong: the service has no metric campaign_stats_sorrow_total"
    assert second.startswith("deploy/grafana/dashboard.json is not what")


def test_a_check_that_fails_itself_or_lacks_its_program_is_a_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def lacks() -> list[str]:
        raise MissingProgram("promtool is missing: apt-get install prometheus (as root)")

    def breaks() -> list[str]:
        raise ValueError("no such line")

    monkeypatch.setattr(
        check, "CHECKS", (Check("good", "is good", list), Check("lacks", "a", lacks), Check("breaks", "b", breaks))
    )
    assert check.main([]) == 1
    said = capsys.readouterr().out
    assert "ok    good" in said
    assert "promtool is missing: apt-get install prometheus" in said
    assert "the check itself failed: ValueError: no such line" in said
    assert check.main(["good"]) == 0
    assert check.main(["other"]) == 2


def numbers(monkeypatch: pytest.MonkeyPatch, fill: Any) -> tuple[Numbers, CollectorRegistry, SimpleNamespace]:
    clock = SimpleNamespace(now=1_000.0)
    monkeypatch.setattr(time, "monotonic", lambda: clock.now)
    registry = CollectorRegistry()
    fill(registry)
    return Numbers(registry), registry, clock


def test_rates_and_quantiles_are_those_of_the_last_five_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    made: dict[str, Any] = {}

    def fill(registry: CollectorRegistry) -> None:
        made["calls"] = Counter("calls", "Calls.", ["kind"], registry=registry)
        made["wait"] = Histogram("wait", "Wait.", buckets=(1.0, 2.0, 4.0), registry=registry)
        made["rows"] = Gauge("rows", "Rows.", ["kind"], registry=registry)

    seen, _, clock = numbers(monkeypatch, fill)
    made["calls"].labels("a").inc(1_000)  # long ago
    made["wait"].observe(100)
    seen.note()
    clock.now += 100
    made["calls"].labels("a").inc(50)
    made["calls"].labels("b").inc(10)
    for moment in (0.5, 0.5, 1.5, 3.0):
        made["wait"].observe(moment)
    made["rows"].labels("a").set(3)
    made["rows"].labels("b").set(4)
    panels = (
        Panel("g", "rate", "rows", "calls", "rate", "kind"),
        Panel("g", "all", "rows", "calls", "rate"),
        Panel("g", "p50", "seconds", "wait", "p50"),
        Panel("g", "p99", "seconds", "wait", "p99"),
        Panel("g", "sum", "rows", "rows", "sum"),
        Panel("g", "max", "rows", "rows", "max"),
    )
    found = {panel.title: values for panel, values in seen.values(panels, seen.read())}
    assert found["rate"] == {"a": 0.5, "b": 0.1}
    assert found["all"] == {"": 0.6}
    assert found["p50"] == {"": 1.0}  # two of four are at most 1
    assert math.isclose(found["p99"][""], 2 + 2 * 0.96)
    assert found["sum"] == {"": 7}
    assert found["max"] == {"": 4}
    clock.now += 1_000
    seen.note()  # the first one is older than five minutes now
    assert dict(seen.values(panels, seen.read()))[panels[0]] == {"a": 0.0, "b": 0.0}
    assert dict(seen.values(panels, seen.read()))[panels[2]] == {}, "a quantile of nothing"


def test_what_the_page_shows_is_escaped_and_a_dependency_that_is_away_is_said() -> None:
    registry = CollectorRegistry()
    Metrics(registry)
    health = Health(started=True, joined=True)
    page = Status("1.0<b>", health, Numbers(registry), "enforce")
    assert "<b>" not in page.page()
    assert 'class="good">ready<' in page.page()
    health.lost("kafka", "fetch", "planted reason")
    assert 'class="wrong">waiting for kafka<' in page.page()
    assert "planted" not in page.page()
    health.stopping = True
    assert ">shutting down<" in page.page()
