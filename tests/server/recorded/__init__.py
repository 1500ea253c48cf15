"""Requests in the shapes that agents send, as JSON files beside this module; texts and names in them are our own."""

import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent


def recorded(agent: str) -> list[dict[str, Any]]:
    """The requests of one agent in the order in which it sends them: method, path, headers and body of each."""
    requests: list[dict[str, Any]] = json.loads((FOLDER / f"{agent}.json").read_text())
    return requests
