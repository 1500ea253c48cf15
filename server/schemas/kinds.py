"""Values that say their kind in `type`: unknown kinds are refused by name, and tools of unknown kinds can be left out.

It reads raw bodies, before pydantic does, so that an error names the kind and no branch of a union.
"""

from collections.abc import Collection, Mapping
from typing import Any

from model.errors import InvalidRequest, shown

MAX_NAME = 64  # characters of a type or a name that are kept


def entries_of(value: Any, limit: int) -> list[Any]:
    """The first `limit` entries of a list; none of any other value."""
    return value[:limit] if isinstance(value, list) else []


def check_kind(value: Any, where: str, known: Collection[str]) -> None:
    """Raises InvalidRequest for an object whose `type` is a text that is not `known`."""
    kind = _kind_of(value)
    if kind is not None and kind not in known:
        message = f"{where}.type: {shown(kind)} is not supported; supported: {', '.join(known)}"
        raise InvalidRequest(message, f"{where}.type", "unsupported_parameter")


def without_unknown_tools(
    raw: Mapping[str, Any], known: Collection[str], limit: int
) -> tuple[dict[str, Any], list[str]]:
    """The body without the tools whose `type` is not `known`, and these as `type` or `type:name`.

    A list with more than `limit` tools stays as it is: it is refused later.
    """
    tools = raw.get("tools")
    if not isinstance(tools, list) or len(tools) > limit:
        return dict(raw), []
    skipped = [_name_of(tool) for tool in tools if not _is_known(tool, known)]
    if not skipped:
        return dict(raw), []
    return {**raw, "tools": [tool for tool in tools if _is_known(tool, known)]}, skipped


def _is_known(tool: Any, known: Collection[str]) -> bool:
    """Whether a tool is of a known kind, or of none, so that validation has to say what is wrong with it."""
    kind = _kind_of(tool)
    return kind is None or kind in known


def _kind_of(value: Any) -> str | None:
    kind = value.get("type") if isinstance(value, Mapping) else None
    return kind if isinstance(kind, str) else None


def _name_of(tool: Mapping[str, Any]) -> str:
    kind, name = tool["type"][:MAX_NAME], tool.get("name")
    return f"{kind}:{name[:MAX_NAME]}" if isinstance(name, str) else kind
