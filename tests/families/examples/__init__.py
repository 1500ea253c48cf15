"""Tiny configs of every family, a file each: what tests compare with `transformers`."""

import importlib.util
from importlib import import_module
from typing import Any


def examples_of(family: str) -> tuple[dict[str, Any], ...]:
    """The family's configs; none for a family that `transformers` does not know."""
    name = f"tests.families.examples.{family}"
    if importlib.util.find_spec(name) is None:
        return ()
    found: tuple[dict[str, Any], ...] = import_module(name).EXAMPLES
    return found
