"""The rules of `deploy/prometheus`, as values."""

from pathlib import Path
from typing import Any

import yaml

RULES = Path(__file__).parent.parent.parent / "deploy" / "prometheus" / "rules.yml"


def rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load(RULES.read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def rule_expressions() -> list[tuple[str, str]]:
    """Each rule's name and expression."""
    return [(rule.get("record") or rule["alert"], rule["expr"]) for rule in rules()]
