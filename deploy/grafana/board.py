"""Makes the Grafana board `moedial.json` beside this file; `make docs` writes it, and a test compares.

What it shows is in `panels.py`. The format is Grafana's classic one, which later versions convert when they load it.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deploy.grafana.panels import ROWS
from deploy.grafana.queries import MODEL, SERVER, Panel

FILE = Path(__file__).with_name("moedial.json")
SOURCE = {"type": "prometheus", "uid": "${DS_PROMETHEUS}"}
COLUMNS = 24  # of Grafana's grid


def board() -> dict[str, Any]:
    """The board, as Grafana imports it."""
    panels: list[dict[str, Any]] = []
    top = 0
    for title, row in ROWS:
        panels.append(
            {"type": "row", "title": title, "collapsed": False, "panels": [], "gridPos": _place(0, top, COLUMNS, 1)}
        )
        top = _add(panels, row, top + 1)
    for number, panel in enumerate(panels, start=1):
        panel["id"] = number
    return {
        "uid": "moedial",
        "title": "moedial",
        "description": "Inference with an expert count per request: load, latency by count, work saved.",
        "tags": ["moedial", "inference"],
        "schemaVersion": 39,
        "editable": False,
        "graphTooltip": 1,
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "timezone": "browser",
        "annotations": {"list": []},
        "templating": {"list": _variables()},
        "panels": panels,
    }


def _add(panels: list[dict[str, Any]], row: Sequence[Panel], top: int) -> int:
    """Append the panels of a row, from left to right in as many lines as they need; returns what is below them."""
    left = 0
    for panel in row:
        height = 4 if panel.kind == "stat" else 8
        if left + panel.width > COLUMNS:
            left, top = 0, top + height
        panels.append(_panel(panel) | {"gridPos": _place(left, top, panel.width, height)})
        left += panel.width
    return top + height


def _place(left: int, top: int, width: int, height: int) -> dict[str, int]:
    return {"x": left, "y": top, "w": width, "h": height}


def _panel(panel: Panel) -> dict[str, Any]:
    targets = []
    for letter, (expression, legend) in zip("ABCDEFGH", panel.queries, strict=False):
        target = {"refId": letter, "expr": expression, "legendFormat": legend, "datasource": SOURCE, "range": True}
        targets.append(target | ({"format": "heatmap"} if panel.kind == "heatmap" else {}))
    custom = {} if panel.kind != "timeseries" else _lines(panel)
    defaults = {"unit": panel.unit, "min": 0} | ({"custom": custom} if custom else {})
    return {
        "type": panel.kind,
        "title": panel.title,
        "description": panel.description,
        "datasource": SOURCE,
        "targets": targets,
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": _options(panel),
    }


def _lines(panel: Panel) -> dict[str, Any]:
    return {
        "lineWidth": 1,
        "fillOpacity": 0 if panel.stacking == "none" else 30,
        "showPoints": "never",
        "stacking": {"mode": panel.stacking, "group": "A"},
    }


def _options(panel: Panel) -> dict[str, Any]:
    if panel.kind == "stat":
        return {"reduceOptions": {"calcs": ["lastNotNull"]}, "colorMode": "none", "graphMode": "area"}
    if panel.kind == "heatmap":
        return {"calculate": False, "yAxis": {"unit": panel.unit}, "color": {"mode": "scheme", "scheme": "Spectral"}}
    return {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi", "sort": "desc"}}


def _variables() -> list[dict[str, Any]]:
    """The choices at the top: of a data source, servers, models and counts. Each list depends on those before it."""
    source = {"name": "DS_PROMETHEUS", "label": "Data source", "type": "datasource", "query": "prometheus"}
    queries = {
        "job": "label_values(moedial:engine_up, job)",
        "instance": 'label_values(moedial:engine_up{job=~"$job"}, instance)',
        "model_name": f"label_values(moedial:engine_up{{{SERVER}}}, model_name)",
        "num_experts": f"label_values(moedial:generation_tokens_total{{{MODEL}}}, num_experts)",
    }
    return [source, *(_variable(name, query) for name, query in queries.items())]


def _variable(name: str, query: str) -> dict[str, Any]:
    return {
        "name": name,
        "label": name.replace("_", " ").capitalize(),
        "type": "query",
        "datasource": SOURCE,
        "query": {"query": query, "refId": name},
        "refresh": 2,
        "sort": 3,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"text": ["All"], "value": ["$__all"]},
    }


def text() -> str:
    """The file's content."""
    return json.dumps(board(), indent=1) + "\n"
