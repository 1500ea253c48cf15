"""Writing llguidance's Lark: literals, special tokens, a tool's arguments. Every rule of ours begins with `moe_`.

It knows no family. Names and schemas are data: they cannot become grammar.
"""

import json
import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from server.dialects.base import Tool
from server.dialects.closed_schemas import closed

# One space or none after a separator and none elsewhere: small models write whitespace for ever where they may.
# Lenient: a forced call is a promise to call; keywords that llguidance cannot enforce do not stop it.
_JSON = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?", "lenient": True}
NO_TOKENS: Mapping[str, int] = MappingProxyType({})
LONGEST_THOUGHT = 8192  # characters, before a forced answer: a small model would think for ever


def literal(text: str) -> str:
    return json.dumps(text)


def ids_of(marks: Sequence[str], tokens: Mapping[str, int]) -> Mapping[str, int]:
    """The marks that are tokens, and their ids. Other tokens, a line end perhaps, are spelled as text."""
    return {mark: tokens[mark] for mark in marks if mark in tokens}


def spell(text: str, ids: Mapping[str, int]) -> str:
    """`text` as a sequence of literals and of the tokens that stand for marks in it."""
    parts = re.split(f"({'|'.join(map(re.escape, ids))})", text) if ids else [text]
    return " ".join(f"<[{ids[part]}]>" if part in ids else literal(part) for part in parts if part)


def arguments(tool: Tool) -> str:
    """A JSON object that follows the tool's schema.

    Raises:
        TooEntangled: the schema cannot be closed.
    """
    schema: dict[str, Any] = {**tool.parameters, "type": "object", "x-guidance": _JSON}
    return f"%json {json.dumps(closed(schema) if tool.closed else schema)}"


def object_call(tool: Tool, key: str = "arguments") -> str:
    """`{"name": …, "arguments": {…}}`"""
    head = f'{{"name": {json.dumps(tool.name, ensure_ascii=False)}, "{key}": '
    return f"{literal(head)} {arguments(tool)} {literal('}')}"


def one_of(rule: str, bodies: Sequence[str]) -> str:
    """`rule`, which is one of `bodies`."""
    names = [f"{rule}_{i}" for i in range(len(bodies))]
    rules = [f"{name}: {body}" for name, body in zip(names, bodies, strict=True)]
    return "\n".join([f"{rule}: {' | '.join(names)}", *rules]) + "\n"


def repeated(rule: str, between: str, parallel: bool) -> str:
    """One `rule`, or with `parallel` one or more with `between` between them."""
    return f"{rule} ({between} {rule})*" if parallel else rule


def free_text(without: Sequence[str]) -> str:
    """`answer`, which is any text that holds none of these marks."""
    marks = "|".join(re.escape(mark).replace("/", "\\/") for mark in without)
    return f"answer: MOE_FREE?\nMOE_FREE: /(?s:.+)/ & ~/(?s:.*)({marks})(?s:.*)/\n"


def thinking(close: str, ids: Mapping[str, int]) -> str:
    """`moe_thinking`: a thought that ends with the first `close`, which is forced once it is too long."""
    text = f"/(?s:.{{0,{LONGEST_THOUGHT}}})/"
    if close in ids:
        return f"moe_thinking: {text}? {spell(close, ids)}\n"
    return f"moe_thinking[lazy]: MOE_THINKING\nMOE_THINKING: {text} {literal(close)}\n"
