"""The Grafana board and Prometheus' rules name series that the server has, and keep the rules of good boards.

`check_prometheus.py` sends every expression to a real Prometheus.
"""

import json
import re
from typing import Any

import pytest
import yaml

from deploy.grafana.board import FILE
from server.metrics import PREFIX
from server.metrics import SERIES as OWN
from server.processes import ENGINE_NAMESPACE
from server.processes import SERIES as OF_PROCESSES
from tests.deploy.expressions import RULES, rule_expressions, rules

BOARD: dict[str, Any] = json.loads(FILE.read_text())
PANELS = [panel for panel in BOARD["panels"] if panel["type"] != "row"]
TARGETS = [(panel["title"], target["expr"]) for panel in PANELS for target in panel["targets"]]
UNITS = {"short", "none", "s", "bytes", "percentunit", "reqps", "ops"}
SERIES_NAME = re.compile(r"(?:moedial:)?[a-z_]+(?::[a-z0-9_]+)*(?=[{\[])")
COUNTERS = {f"{PREFIX}{series.name}_total" for series in OWN if series.kind == "counter"}


def known_series() -> set[str]:
    """Every name that a scrape, a rule or Prometheus itself makes."""
    names = {"up", *(rule["record"] for rule in rules() if "record" in rule)}
    for series in OWN:
        name = PREFIX + series.name
        suffixes = {"counter": ["_total"], "gauge": [""], "histogram": ["_bucket", "_count", "_sum"]}[series.kind]
        names |= {name + suffix for suffix in suffixes}
    for prefix in ("process_", f"{ENGINE_NAMESPACE}_process_"):
        names |= {prefix + name for name, _, _ in OF_PROCESSES}
    return names


def named_in(expression: str) -> set[str]:
    bare = re.sub(r"\{[^}]*\}", "{", expression)
    return set(SERIES_NAME.findall(bare)) | set(re.findall(r"moedial:[\w:]+", bare))


@pytest.mark.parametrize(("title", "expression"), [*TARGETS, *rule_expressions()])
def test_an_expression_names_series_of_the_server(title: str, expression: str) -> None:
    assert named_in(expression), title
    assert named_in(expression) <= known_series(), title


@pytest.mark.parametrize(("title", "expression"), TARGETS)
def test_a_query_of_the_board_is_of_the_chosen_servers_and_rates_counters(title: str, expression: str) -> None:
    for selector in re.findall(r"\{([^}]*)\}", expression):
        assert selector.startswith('job=~"$job",instance=~"$instance"'), title
    for name in COUNTERS & named_in(expression):
        assert re.search(rf"(rate|increase)\({name}\{{[^}}]*\}}\[\$__rate_interval\]\)", expression), title


def test_panels_have_titles_sentences_units_and_places_of_their_own() -> None:
    assert len({panel["title"] for panel in PANELS}) == len(PANELS)
    taken: set[tuple[int, int]] = set()
    for panel in PANELS:
        assert panel["description"].endswith(".") and panel["targets"], panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"] in UNITS, panel["title"]
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {(place["x"] + column, place["y"] + row) for column in range(place["w"]) for row in range(place["h"])}
        assert not cells & taken, panel["title"]
        taken |= cells
    assert len({panel["id"] for panel in BOARD["panels"]}) == len(BOARD["panels"])


def test_alerts_have_a_severity_and_a_sentence_and_are_explained() -> None:
    page = (RULES.parent.parent.parent / "docs" / "operating.md").read_text()
    for rule in rules():
        if "alert" in rule:
            assert rule["labels"]["severity"] in ("info", "warning", "critical"), rule["alert"]
            assert rule["annotations"]["summary"], rule["alert"]
            assert f"`{rule['alert']}`" in page, f"{rule['alert']} is not in docs/operating.md"


def test_every_rule_has_a_test() -> None:
    tested = RULES.with_name("rules_test.yml").read_text()
    untested = [name for name in (rule.get("alert") for rule in rules()) if name and f"alertname: {name}" not in tested]
    assert untested == []


def test_prometheus_scrapes_the_job_that_the_rules_name() -> None:
    config = yaml.safe_load(RULES.with_name("prometheus.yml").read_text())
    assert [job["job_name"] for job in config["scrape_configs"]] == ["moedial"]
    assert config["rule_files"] == [RULES.name]
