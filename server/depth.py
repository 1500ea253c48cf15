"""How deep JSON may be nested. It knows no field."""

from typing import Any

from model.errors import InvalidRequest


def check_depth(value: Any, limit: int) -> None:
    """Raises InvalidRequest where lists and objects are nested deeper than `limit`."""
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(limit):
        children = (child for node in level for child in (node.values() if isinstance(node, dict) else node))
        level = [child for child in children if isinstance(child, dict | list)]
        if not level:
            return
    raise InvalidRequest(f"the body is nested deeper than {limit} levels", None, "invalid_json")
