"""deploy/prometheus/rules.yaml and the tests of it that promtool runs, written from the list of alerts."""

import re
from pathlib import Path
from typing import Any, Final

import yaml

from deploy.tools.alerts import ALERTS, JOB, OBJECTIVES, WINDOWS, Alert, Case
from deploy.tools.catalogue import catalogue, names
from deploy.tools.programs import ROOT, debian, run

FOLDER: Final = ROOT / "deploy" / "prometheus"
RULES: Final = FOLDER / "rules.yaml"
RESOURCE: Final = ROOT / "deploy" / "kubernetes" / "overlays" / "production" / "prometheusrule.yaml"
CONFIGURATION: Final = FOLDER / "prometheus.yml"
TESTS: Final = {1: FOLDER / "rules_test.yaml", 30: FOLDER / "rules_days_test.yaml"}  # by minutes from value to value
RUNBOOK: Final = ROOT / "deploy" / "runbook.md"
PAGES: Final = (RUNBOOK, ROOT / "deploy" / "operations.md")
GROUPS: Final = {"recorded": "campaign-stats objectives", "alerts": "campaign-stats alerts"}
HOW_TO_WRITE: Final = "make deploy-files"
WRITTEN: Final = "# Written from deploy/tools/alerts.py by `make deploy-files`.\n"

SECONDS: Final = {"s": 1, "m": 60, "h": 3_600, "d": 86_400}


def rules(faster: int = 1) -> dict[str, Any]:
    """Recording rules and alerts. `faster`: windows and waits divided by it, for a drill that takes no hours."""
    recorded = [
        {"record": objective.recorded(window), "expr": objective.ratio(window)}
        for objective in OBJECTIVES
        for window in WINDOWS
    ]
    groups: list[dict[str, Any]] = [
        {"name": GROUPS["recorded"], "rules": recorded},
        {"name": GROUPS["alerts"], "rules": [_rule(alert) for alert in ALERTS]},
    ]
    if faster > 1:
        for group in groups:
            for rule in group["rules"]:
                rule["expr"] = re.sub(r"\[(\w+)\]", lambda found: f"[{_shorter(found[1], faster)}]", rule["expr"])
                if "for" in rule:
                    rule["for"] = _shorter(rule["for"], faster)
    return {"groups": groups}


def _shorter(duration: str, faster: int) -> str:
    number, unit = int(duration[:-1]), duration[-1]
    return f"{max(1, number * SECONDS[unit] // faster)}s"


def _rule(alert: Alert) -> dict[str, Any]:
    return {
        "alert": alert.name,
        "expr": alert.expr,
        "for": alert.lasts,
        "labels": {"severity": alert.severity},
        "annotations": _annotations(alert),
    }


def _annotations(alert: Alert) -> dict[str, str]:
    return {"summary": alert.summary, "runbook": f"deploy/runbook.md#{anchor(alert.section)}"}


def anchor(heading: str) -> str:
    """The name a heading gets in the page."""
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


def rules_text() -> str:
    """The file of rules."""
    return WRITTEN + _yaml(rules())


def tests_text(step: int) -> str:
    """For each alert a case in which it fires, and one in which it does not: those whose series have this step."""
    tests = []
    for alert in ALERTS:
        fired = {
            "exp_labels": {"severity": alert.severity, **alert.labels},
            "exp_annotations": _annotations(alert),
        }
        for case, what, expected in ((alert.fires, "fires", [fired]), (alert.silent, "stays silent", [])):
            if case.step == step:
                tests.append(_test(alert, what, case, expected))
    document = {
        "rule_files": [RULES.name],
        "evaluation_interval": f"{step}m",
        "group_eval_order": [GROUPS["recorded"], GROUPS["alerts"]],  # else any order, and alerts lag a step behind
        "tests": tests,
    }
    return WRITTEN + _yaml(document)


def _test(alert: Alert, what: str, case: Case, expected: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "name": f"{alert.name} {what}",
        "interval": f"{case.step}m",
        "input_series": [{"series": series, "values": values} for series, values in case.series.items()],
        "alert_rule_test": [{"eval_time": f"{case.at}m", "alertname": alert.name, "exp_alerts": expected}],
    }


def resource_text() -> str:
    """The same rules as the Prometheus operator takes them."""
    kind = {"apiVersion": "monitoring.coreos.com/v1", "kind": "PrometheusRule"}
    return WRITTEN + _yaml({**kind, "metadata": {"name": "campaign-stats"}, "spec": rules()})


def files() -> dict[Path, str]:
    """What is written from the list."""
    return {RULES: rules_text(), RESOURCE: resource_text(), **{path: tests_text(step) for step, path in TESTS.items()}}


def _yaml(document: object) -> str:
    return yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=120)


def unknown_metrics(expression: str) -> set[str]:
    """Names in a PromQL expression that look like ours and that the code does not have."""
    known = {name for entry in catalogue() for name in names(entry)}
    found = set(re.findall(r"\b(campaign_stats_\w+)\b(?!:)", re.sub(r"campaign_stats:\w+:\w+", "", expression)))
    return found - known


def _begins(name: str) -> bool:
    """Whether it is the beginning of a metric's name, as people write it."""
    return any(known.startswith(name) for entry in catalogue() for known in names(entry))


def unknown_labels(expression: str) -> set[str]:
    """Labels and values asked for of our metrics that the code does not have; `job` and `instance` are Prometheus's."""
    known = {name: entry for entry in catalogue() for name in names(entry)}
    found = set()
    for name, selector in re.findall(r"\b(campaign_stats_\w+)\{([^}]*)\}", expression):
        for label, value in re.findall(r'(\w+)="([^"]*)"', selector):
            if label in ("job", "instance") or name not in known:
                continue
            edges = [str(float(edge)) for edge in known[name].buckets] if label == "le" else ()
            if value not in (*edges, *(known[name].labels.get(label) or ())):
                found.add(f'{name}{{{label}="{value}"}}')
    return found


def problems() -> list[str]:
    """Where the files are not what the list says, a metric does not exist or an alert has no runbook."""
    found = []
    for path, text in files().items():
        if not path.exists() or path.read_text() != text:
            found.append(f"{path.relative_to(ROOT)} is not what deploy/tools/alerts.py says: {HOW_TO_WRITE}")
    found += [
        f"{rule.get('alert', rule.get('record'))}: the service has no metric {name}"
        for group in rules()["groups"]
        for rule in group["rules"]
        for name in sorted(unknown_metrics(rule["expr"]))
    ]
    found += [
        f"{rule.get('alert', rule.get('record'))}: the service has no series {selector}"
        for group in rules()["groups"]
        for rule in group["rules"]
        for selector in sorted(unknown_labels(rule["expr"]))
    ]
    found += [
        f"{alert.name}, its cases: the service has no series {selector}"
        for alert in ALERTS
        for series in (*alert.fires.series, *alert.silent.series)
        for selector in sorted(unknown_labels(series))
    ]
    for page in PAGES:
        found += [
            f"{page.relative_to(ROOT)}: the service has no metric {name}"
            for name in sorted(unknown_metrics(page.read_text()))
            if not _begins(name)
        ]
    jobs = {one["job_name"] for one in yaml.safe_load(CONFIGURATION.read_text())["scrape_configs"]}
    if jobs != {JOB.partition('"')[2].rstrip('"')}:
        found.append(
            f"{CONFIGURATION.relative_to(ROOT)}, job_name: {', '.join(sorted(jobs))}, but the rules ask for {JOB}"
        )
    headings = re.findall(r"^## (.+)$", RUNBOOK.read_text() if RUNBOOK.exists() else "", re.MULTILINE)
    sections = {alert.section for alert in ALERTS}
    found += [
        f"deploy/runbook.md has no section `## {section}`: write it" for section in sorted(sections - {*headings})
    ]
    return found


def promtool_problems() -> list[str]:
    """What promtool says of the rules, and of their tests."""
    promtool = debian("promtool", "prometheus")
    found = []
    for command in (
        ("check", "config", str(CONFIGURATION)),
        ("check", "rules", str(RULES)),
        ("test", "rules", *map(str, TESTS.values())),
    ):
        code, said = run(promtool, *command)
        if code != 0:
            found += said.splitlines()
    return found
