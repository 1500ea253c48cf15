"""Mistral: `[TOOL_CALLS]` with an array of objects, or before each call as `name[ARGS]{…}`; reasoning in `[THINK]`.

Forced calls take the newer form where `[ARGS]` is a token of the checkpoint; both forms are parsed for any.
"""

import re
from collections.abc import Sequence

from server.dialects.base import ToolSpec
from server.dialects.cursor import Cursor, Parser
from server.dialects.deltas import Deltas
from server.dialects.grammar import arguments_rule, lark_text, literal, object_call_rule, one_of, repeated
from server.dialects.objects import call_object, last_arguments
from server.dialects.tagged import CallSyntax, TaggedDialect

CALLS, ARGS, ID = "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"
_NAME = re.compile(r"[^\s{}\[\]\"]+")


class Mistral(TaggedDialect):
    name = "mistral"
    call_delimiters = (CALLS, ARGS, ID)

    def call_syntax(self, tools: Sequence[ToolSpec]) -> CallSyntax:
        return CallSyntax({CALLS: _calls})

    def call_rules(self, tools: Sequence[ToolSpec], parallel: bool) -> str:
        return self._named_rules(tools, parallel) if ARGS in self._ids else self._array_rules(tools, parallel)

    def _named_rules(self, tools: Sequence[ToolSpec], parallel: bool) -> str:
        opening, middle = lark_text(CALLS, self._ids), lark_text(ARGS, self._ids)
        # older checkpoints of this call_syntax were trained to make up an id of nine characters
        middle = f"({lark_text(ID, self._ids)} /[a-zA-Z0-9]{{9}}/)? {middle}" if ID in self._ids else middle
        calls = one_of("moe_call", [self._named_rule(tool, opening, middle) for tool in tools])
        return f"moe_calls: {'moe_call+' if parallel else 'moe_call'}\n{calls}"

    def _named_rule(self, tool: ToolSpec, opening: str, middle: str) -> str:
        return f"{opening} {literal(tool.name)} {middle} {arguments_rule(tool)}"

    def _array_rules(self, tools: Sequence[ToolSpec], parallel: bool) -> str:
        opening = lark_text(CALLS, self._ids)
        calls = one_of("moe_call", [object_call_rule(tool) for tool in tools])
        return f'moe_calls: {opening} " "? "[" {repeated("moe_call", "/, ?/", parallel)} "]"\n{calls}'


def _calls(cursor: Cursor, deltas: Deltas) -> Parser[bool]:
    yield from cursor.skip()
    if (yield from cursor.take_one_of("[")):
        return (yield from _array(cursor, deltas))
    return (yield from _named(cursor, deltas))


def _array(cursor: Cursor, deltas: Deltas) -> Parser[bool]:
    """Parse an array of calls, which its first object must be one of. From the first error on, the rest is content."""
    yield from cursor.skip()
    if not (yield from call_object(cursor, deltas)):
        return False
    while True:
        cursor.pin()
        yield from cursor.skip()
        after = yield from cursor.take_one_of(",", "]")
        if after == "]":
            return True
        yield from cursor.skip()
        if not (yield from cursor.peek()):  # the answer was cut within the array
            cursor.unpin()
            return True
        if not after or not (yield from call_object(cursor, deltas)):
            cursor.rewind()
            return True


def _named(cursor: Cursor, deltas: Deltas) -> Parser[bool]:
    name = yield from cursor.word(_NAME)
    bare = (yield from cursor.peek()) == "{"  # some models write no delimiter between the name and its arguments
    delimiter = "" if bare else (yield from cursor.take_one_of(ARGS, ID))
    if not name.isprintable() or not name or not (bare or delimiter):
        return False
    cursor.unpin()
    deltas.call(name)
    if delimiter == ID:
        yield from cursor.word(_NAME)
        yield from cursor.take_one_of(ARGS)
    yield from cursor.skip()
    yield from last_arguments(cursor, deltas)
    return True
