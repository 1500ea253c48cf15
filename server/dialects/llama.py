"""Llama 3.x and 4: the whole answer is one JSON object or several, with `parameters` in place of `arguments`.

No delimiter tells such a call from other JSON, so that only an object that names a tool of the request is a call.
"""

import re
from collections.abc import Container, Sequence

from server.dialects.base import ToolSpec
from server.dialects.cursor import Cursor, Parser
from server.dialects.deltas import Deltas
from server.dialects.grammar import object_call_rule, one_of, repeated
from server.dialects.objects import call_object
from server.dialects.tagged import CallSyntax, TaggedDialect

TAGS = ("<|python_tag|>", "<|python_start|>")
CLOSE = "<|python_end|>"
_BETWEEN = re.compile(r"[ \t\r\n;]+")


class Llama(TaggedDialect):
    name = "llama"
    call_delimiters = (*TAGS, CLOSE)
    end_delimiters = ("<|eom_id|>", "<|eom|>")

    def call_syntax(self, tools: Sequence[ToolSpec]) -> CallSyntax:
        names = frozenset(tool.name for tool in tools)

        def calls(cursor: Cursor, deltas: Deltas) -> Parser[bool]:
            return (yield from _calls(cursor, deltas, names))

        return CallSyntax(dict.fromkeys(TAGS, calls), (CLOSE,), calls)

    def call_rules(self, tools: Sequence[ToolSpec], parallel: bool) -> str:
        calls = one_of("moe_call", [object_call_rule(tool, "parameters") for tool in tools])
        return f"moe_calls: {repeated('moe_call', '/; ?/', parallel)}\n{calls}"


def _calls(cursor: Cursor, deltas: Deltas, names: Container[str]) -> Parser[bool]:
    """Parse calls, which the first object must be one of. From the first that is none on, the rest is content."""
    yield from cursor.skip()
    if not (yield from call_object(cursor, deltas, names)):
        return False
    while True:
        cursor.pin()
        yield from cursor.skip(_BETWEEN)
        yield from cursor.take_one_of(*TAGS)
        if not (yield from cursor.peek()):
            cursor.unpin()
            return True
        if not (yield from call_object(cursor, deltas, names)):
            cursor.rewind()
            return True
