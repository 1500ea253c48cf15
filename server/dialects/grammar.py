"""Grammars in llguidance's Lark: literals, special tokens, a tool's arguments. Rules written here begin with `moe_`.

Names and schemas are data: they cannot become grammar.
"""

import json
import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from server.dialects.base import ToolSpec
from server.dialects.closed_schemas import closed

# At most one space after a separator and none elsewhere: where whitespace is free, small models write nothing else.
# Lenient: a forced call must be made even if llguidance cannot enforce a keyword of the schema.
_JSON = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?", "lenient": True}
NO_TOKENS: Mapping[str, int] = MappingProxyType({})
MAX_REASONING = 8192  # characters before a forced answer; a small model might never end by itself


def literal(text: str) -> str:
    """`text` as a terminal."""
    return json.dumps(text)


def token_ids_of(delimiters: Sequence[str], tokens: Mapping[str, int]) -> Mapping[str, int]:
    """The delimiters that are tokens, and their ids. Other tokens, such as a line end, are written as text."""
    return {delimiter: tokens[delimiter] for delimiter in delimiters if delimiter in tokens}


def lark_text(text: str, ids: Mapping[str, int]) -> str:
    """`text` as a sequence of literals, and of token ids where delimiters are tokens."""
    parts = [text]
    if ids:
        delimiters = "|".join(map(re.escape, ids))
        parts = re.split(f"({delimiters})", text)
    tokens = {part: f"<[{id}]>" for part, id in ids.items()}
    return " ".join(tokens.get(part) or literal(part) for part in parts if part)


def arguments_rule(tool: ToolSpec) -> str:
    """A term for a JSON object that follows the tool's schema.

    Raises:
        SchemaTooComplex: the schema cannot be closed.
    """
    schema: dict[str, Any] = {**tool.parameters, "type": "object", "x-guidance": _JSON}
    return f"%json {json.dumps(closed(schema) if tool.closed else schema)}"


def object_call_rule(tool: ToolSpec, key: str = "arguments") -> str:
    """Terms for `{"name": …, "arguments": {…}}`, a call of `tool`."""
    head = f'{{"name": {json.dumps(tool.name, ensure_ascii=False)}, "{key}": '
    return f"{literal(head)} {arguments_rule(tool)} {literal('}')}"


def one_of(rule: str, bodies: Sequence[str]) -> str:
    """The definition of `rule` as one of `bodies`."""
    names = [f"{rule}_{i}" for i in range(len(bodies))]
    rules = [f"{name}: {body}" for name, body in zip(names, bodies, strict=True)]
    return "\n".join([f"{rule}: {' | '.join(names)}", *rules]) + "\n"


def repeated(rule: str, between: str, parallel: bool) -> str:
    """A term for one `rule`, or with `parallel` for one or more, separated by `between`."""
    return f"{rule} ({between} {rule})*" if parallel else rule


def free_text_rules(without: Sequence[str]) -> str:
    """The definition of `answer` as any text that contains none of these delimiters."""
    delimiters = "|".join(re.escape(delimiter).replace("/", "\\/") for delimiter in without)
    return f"answer: MOE_FREE?\nMOE_FREE: /(?s:.+)/ & ~/(?s:.*)({delimiters})(?s:.*)/\n"


def reasoning_rule(close: str, ids: Mapping[str, int]) -> str:
    """The definition of `moe_thinking`: reasoning up to the first `close`, which is forced once it is too long."""
    text = f"/(?s:.{{0,{MAX_REASONING}}})/"
    if close in ids:
        return f"moe_thinking: {text}? {lark_text(close, ids)}\n"
    return f"moe_thinking[lazy]: MOE_THINKING\nMOE_THINKING: {text} {literal(close)}\n"
