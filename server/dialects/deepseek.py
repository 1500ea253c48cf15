"""DeepSeek V3, R1 and V3.1: calls between delimiters of their own, reasoning in `<think>`, which a prompt may open.

V3 and R1 write `function`, the name on a line and fenced JSON; V3.1 writes the name and bare JSON. Both are parsed.
"""

import re
from collections.abc import Mapping, Sequence

from server.dialects.base import ToolSpec
from server.dialects.cursor import Cursor, Parser
from server.dialects.deltas import Deltas
from server.dialects.grammar import NO_TOKENS, arguments_rule, lark_text, literal, one_of, repeated
from server.dialects.objects import last_arguments
from server.dialects.reasoning import ReasoningTags
from server.dialects.tagged import CallSyntax, TaggedDialect

CALLS, CALLS_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
CALL, CALL_END = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"
SEPARATOR = "<｜tool▁sep｜>"
FENCE = "```json"
_NAME = re.compile(r"[^\s<>{}\[\]\"`]+")


class DeepSeek(TaggedDialect):
    """`fenced`: forced calls are written as V3 and R1 write them."""

    name = "deepseek"
    call_delimiters = (CALLS, CALL, SEPARATOR, CALL_END, CALLS_END)

    def __init__(
        self,
        specials: Mapping[str, int],
        reasoning: ReasoningTags | None = None,
        added: Mapping[str, int] = NO_TOKENS,
        fenced: bool = False,
    ) -> None:
        super().__init__(specials, reasoning, added)
        self._fenced = fenced

    def call_syntax(self, tools: Sequence[ToolSpec]) -> CallSyntax:
        return CallSyntax({CALLS: _calls, CALL: _call}, (CALL_END, CALLS_END))

    def call_rules(self, tools: Sequence[ToolSpec], parallel: bool) -> str:
        opening, closing = lark_text(CALLS, self._ids), lark_text(CALLS_END, self._ids)
        calls = repeated("moe_call", '"\\n"?' if self._fenced else "", parallel)
        rules = one_of("moe_call", [self._call_rule(tool) for tool in tools])
        return f"moe_calls: {opening} {calls} {closing}\n{rules}"

    def _call_rule(self, tool: ToolSpec) -> str:
        name, arguments = literal(tool.name), arguments_rule(tool)
        if self._fenced:
            opening = lark_text(f"{CALL}function{SEPARATOR}", self._ids)
            fence, closing = literal(f"\n{FENCE}\n"), lark_text(f"\n```{CALL_END}", self._ids)
            return f"{opening} {name} {fence} {arguments} {closing}"
        opening, middle, closing = (lark_text(delimiter, self._ids) for delimiter in (CALL, SEPARATOR, CALL_END))
        return f"{opening} {name} {middle} {arguments} {closing}"


def _calls(cursor: Cursor, deltas: Deltas) -> Parser[bool]:
    yield from cursor.skip()
    return bool((yield from cursor.take_one_of(CALL))) and (yield from _call(cursor, deltas))


def _call(cursor: Cursor, deltas: Deltas) -> Parser[bool]:
    yield from cursor.skip()
    name = yield from cursor.word(_NAME)
    if not name or not (yield from cursor.take_one_of(SEPARATOR)):
        return False
    if name == "function" and (yield from cursor.peek()) != "{":  # V3 writes the kind of call first, then its name
        name = yield from cursor.word(_NAME)
        if not (yield from cursor.peek()):
            return False
    if not name or not name.isprintable():
        return False
    cursor.unpin()
    deltas.call(name)
    yield from _fenced(cursor, deltas)
    return True


def _fenced(cursor: Cursor, deltas: Deltas) -> Parser[None]:
    """Parse arguments, in a fence or not. Without an object there, the text is content."""
    yield from cursor.skip()
    fence = yield from cursor.take_one_of("```")
    if fence:
        yield from cursor.take_one_of("json")
    yield from cursor.skip()
    if (yield from cursor.peek()) != "{":
        return
    yield from last_arguments(cursor, deltas)
    yield from cursor.skip()
    if fence:
        yield from cursor.take_one_of("```")
