"""Hermes, Qwen2.5, Qwen3 and the bundled models: a JSON object in `<tool_call>`, reasoning in `<think>`.

It does not know the XML of Qwen3-Coder and GLM, which use the same tag: such calls come out as content.
"""

from collections.abc import Sequence

from server.dialects.base import ToolSpec
from server.dialects.cursor import Cursor, Parser
from server.dialects.deltas import Deltas
from server.dialects.grammar import lark_text, object_call_rule, one_of, repeated
from server.dialects.objects import call_object
from server.dialects.tagged import CallSyntax, TaggedDialect

OPEN, CLOSE = "<tool_call>", "</tool_call>"


class Hermes(TaggedDialect):
    name = "hermes"
    call_delimiters = (OPEN, CLOSE)

    def call_syntax(self, tools: Sequence[ToolSpec]) -> CallSyntax:
        return CallSyntax({OPEN: _call}, (CLOSE,))

    def call_rules(self, tools: Sequence[ToolSpec], parallel: bool) -> str:
        opening = lark_text(f"{OPEN}\n", self._ids)
        closing = lark_text(f"\n{CLOSE}", self._ids)
        calls = repeated("moe_call", lark_text("\n", self._ids), parallel)
        tool = one_of("moe_tool", [object_call_rule(tool) for tool in tools])
        return f"moe_calls: {calls}\nmoe_call: {opening} moe_tool {closing}\n{tool}"


def _call(cursor: Cursor, deltas: Deltas) -> Parser[bool]:
    yield from cursor.skip()
    return (yield from call_object(cursor, deltas))
