"""Hermes, Qwen2.5, Qwen3 and the bundled models: a JSON object in `<tool_call>`, thoughts in `<think>`.

It does not know Qwen3-Coder's XML, nor GLM's, which use the same mark: those come out as content.
"""

from collections.abc import Sequence

from server.dialects.base import Tool
from server.dialects.cursor import Script, Tape
from server.dialects.deltas import Pieces
from server.dialects.grammar import object_call, one_of, repeated, spell
from server.dialects.objects import call_object
from server.dialects.tagged import Form, Marked

OPEN, CLOSE = "<tool_call>", "</tool_call>"


class Hermes(Marked):
    name = "hermes"
    call_marks = (OPEN, CLOSE)

    def form(self, tools: Sequence[Tool]) -> Form:
        return Form({OPEN: _call}, (CLOSE,))

    def call_rules(self, tools: Sequence[Tool], parallel: bool) -> str:
        opening, closing = spell(f"{OPEN}\n", self._ids), spell(f"\n{CLOSE}", self._ids)
        calls = repeated("moe_call", spell("\n", self._ids), parallel)
        tool = one_of("moe_tool", [object_call(tool) for tool in tools])
        return f"moe_calls: {calls}\nmoe_call: {opening} moe_tool {closing}\n{tool}"


def _call(tape: Tape, pieces: Pieces) -> Script[bool]:
    yield from tape.skip()
    return (yield from call_object(tape, pieces))
