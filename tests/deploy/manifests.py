"""The files of `deploy/` as values, without the tools that their users have."""

from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parent.parent.parent
DEPLOY = ROOT / "deploy"
BASE = DEPLOY / "kubernetes" / "base"
COMPOSE: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())


def manifest(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(path.read_text())
    return found


def deployment() -> dict[str, Any]:
    return manifest(BASE / "deployment.yaml")


def config() -> dict[str, str]:
    """The settings of the base, by variable."""
    [generator] = manifest(BASE / "kustomization.yaml")["configMapGenerator"]
    return dict(literal.split("=", 1) for literal in generator["literals"])


def unit() -> dict[str, list[str]]:
    """The directives of the systemd unit, each with all of its values."""
    directives: dict[str, list[str]] = {}
    for line in (DEPLOY / "systemd" / "moedial.service").read_text().splitlines():
        name, equals, value = line.partition("=")
        if equals and not line.startswith("#"):
            directives.setdefault(name, []).append(value)
    return directives


def unit_environment() -> dict[str, str]:
    [variables] = unit()["Environment"]
    return dict(variable.split("=", 1) for variable in variables.split())
