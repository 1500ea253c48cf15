"""What an option is made of: how its text becomes a value, its group, its flag and its row in the docs.

It knows no option by name.
"""

import re
from typing import Any

from pydantic import Field
from pydantic.fields import FieldInfo

ORIGIN = re.compile(r"\*|null|[a-z][a-z0-9+.-]*://[^/\sA-Z]+")
TEMPLATE_OWN = ("messages", "tools", "documents", "add_generation_prompt")  # no request sets these by name


def words(value: Any) -> Any:
    return tuple(word.strip() for word in value.split(",") if word.strip()) if isinstance(value, str) else value


def secrets(value: Any) -> Any:
    """Empty keys stay, to be refused: what was meant to close a server must not open it."""
    return tuple(word.strip() for word in value.split(",")) if isinstance(value, str) else value


def counts(value: Any) -> Any:
    """`fast=2,strong=8` as a mapping; pydantic then checks the counts."""
    if not isinstance(value, str):
        return value
    pairs = [word.partition("=") for word in words(value)]
    if broken := [name for name, equals, _ in pairs if not equals or not name]:
        raise ValueError(f"expected name=count pairs such as fast=2,strong=8; {broken[0]!r} has no count")
    return {name.strip(): count.strip() for name, _, count in pairs}


def free_names(value: Any) -> Any:
    names = words(value)
    if taken := [name for name in names if name in TEMPLATE_OWN]:
        raise ValueError(f"{taken[0]} is set by the server itself")
    return names


def origins(value: tuple[str, ...]) -> tuple[str, ...]:
    if wrong := [origin for origin in value if not ORIGIN.fullmatch(origin)]:
        raise ValueError(f"an origin is scheme://host or scheme://host:port in small letters, got {wrong[0]!r}")
    return value


def option(default: Any, group: str, description: str, **limits: Any) -> Any:
    return Field(default, description=description, json_schema_extra={"group": group}, **limits)


def group_of(field: FieldInfo) -> str:
    extra = field.json_schema_extra
    return str(extra["group"]) if isinstance(extra, dict) else ""


def flag_of(name: str) -> str:
    return "--" + name.replace("_", "-")


def default_of(field: FieldInfo) -> str:
    """The default as a person would type it; empty when it is "nothing"."""
    if isinstance(field.default, bool):
        return "on" if field.default else "off"
    return f"{field.default}" if field.default not in ("", (), {}) else ""
