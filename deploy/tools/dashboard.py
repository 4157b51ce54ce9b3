"""deploy/grafana/dashboard.json, written from consumer/panels.py, which the status page shows too."""

import json
from itertools import groupby
from typing import Any, Final

from consumer.panels import PANELS, Panel
from deploy.tools.programs import ROOT
from deploy.tools.rules import HOW_TO_WRITE, unknown_metrics

DASHBOARD: Final = ROOT / "deploy" / "grafana" / "dashboard.json"
UNITS: Final = {"seconds": "s", "bytes": "bytes", "0 or 1": "bool_yes_no"}
WIDTH: Final = 24  # Grafana's columns
ACROSS: Final = 3
HEIGHT: Final = 7
SOURCE: Final = {"type": "prometheus", "uid": "${source}"}


def text() -> str:
    """The dashboard as Grafana imports it; its only variable is the data source."""
    panels: list[dict[str, Any]] = []
    top = 0
    for group, members in groupby(PANELS, key=lambda panel: panel.group):
        panels.append(
            {
                "id": len(panels) + 1,
                "type": "row",
                "title": group,
                "collapsed": False,
                "panels": [],
                "gridPos": _at(top),
            }
        )
        top += 1
        for place, panel in enumerate(members):
            panels.append(_panel(panel, len(panels) + 1, top + place // ACROSS * HEIGHT, place % ACROSS))
        top += (place // ACROSS + 1) * HEIGHT
    dashboard = {
        "uid": "campaign-stats",
        "title": "campaign-stats",
        "schemaVersion": 39,
        "editable": True,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {
            "list": [{"name": "source", "label": "Data source", "type": "datasource", "query": "prometheus"}]
        },
        "panels": panels,
    }
    return json.dumps(dashboard, indent=1) + "\n"


def _at(top: int) -> dict[str, int]:
    return {"x": 0, "y": top, "w": WIDTH, "h": 1}


def _panel(panel: Panel, number: int, top: int, place: int) -> dict[str, Any]:
    width = WIDTH // ACROSS
    return {
        "id": number,
        "type": "timeseries",
        "title": panel.title,
        "datasource": SOURCE,
        "gridPos": {"x": place * width, "y": top, "w": width, "h": HEIGHT},
        "fieldConfig": {"defaults": {"unit": UNITS.get(panel.unit, panel.unit), "min": 0}, "overrides": []},
        "targets": [
            {
                "refId": "A",
                "datasource": SOURCE,
                "expr": panel.query,
                "legendFormat": f"{{{{{panel.by}}}}}" if panel.by else panel.title,
            }
        ],
    }


def problems() -> list[str]:
    """Where the file is not what the list says, or a panel asks for a metric that does not exist."""
    found = [
        f"panel {panel.title}: the service has no metric {name}"
        for panel in PANELS
        for name in sorted(unknown_metrics(panel.query))
    ]
    if not DASHBOARD.exists() or DASHBOARD.read_text() != text():
        found.append(f"{DASHBOARD.relative_to(ROOT)} is not what consumer/panels.py says: {HOW_TO_WRITE}")
    return found
