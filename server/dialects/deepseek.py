"""DeepSeek V3, R1 and V3.1: calls between marks of their own, thoughts in `<think>`, which a prompt may open or close.

V3 and R1 write `function`, the name on a line and fenced JSON; V3.1 the name and bare JSON. Both are read from either.
"""

import re
from collections.abc import Mapping, Sequence

from server.dialects.base import Tool
from server.dialects.cursor import Script, Tape
from server.dialects.deltas import Pieces
from server.dialects.grammar import NO_TOKENS, literal, one_of, repeated, spell
from server.dialects.grammar import arguments as arguments_rule
from server.dialects.objects import last_arguments
from server.dialects.reasoning import Thoughts
from server.dialects.tagged import Form, Marked

CALLS, CALLS_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
CALL, CALL_END = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"
SEPARATOR = "<｜tool▁sep｜>"
FENCE = "```json"
_NAME = re.compile(r"[^\s<>{}\[\]\"`]+")


class DeepSeek(Marked):
    """`fenced`: the checkpoint is of the older kind, as far as a forced call is concerned."""

    name = "deepseek"
    call_marks = (CALLS, CALL, SEPARATOR, CALL_END, CALLS_END)

    def __init__(
        self,
        specials: Mapping[str, int],
        thoughts: Thoughts | None = None,
        added: Mapping[str, int] = NO_TOKENS,
        fenced: bool = False,
    ) -> None:
        super().__init__(specials, thoughts, added)
        self._fenced = fenced

    def form(self, tools: Sequence[Tool]) -> Form:
        return Form({CALLS: _calls, CALL: _call}, (CALL_END, CALLS_END))

    def call_rules(self, tools: Sequence[Tool], parallel: bool) -> str:
        opening, closing = spell(CALLS, self._ids), spell(CALLS_END, self._ids)
        calls = repeated("moe_call", '"\\n"?' if self._fenced else "", parallel)
        return f"moe_calls: {opening} {calls} {closing}\n" + one_of("moe_call", [self._call_rule(t) for t in tools])

    def _call_rule(self, tool: Tool) -> str:
        name, arguments = literal(tool.name), arguments_rule(tool)
        if self._fenced:
            opening = spell(f"{CALL}function{SEPARATOR}", self._ids)
            fence, closing = literal(f"\n{FENCE}\n"), spell(f"\n```{CALL_END}", self._ids)
            return f"{opening} {name} {fence} {arguments} {closing}"
        opening, middle, closing = (spell(mark, self._ids) for mark in (CALL, SEPARATOR, CALL_END))
        return f"{opening} {name} {middle} {arguments} {closing}"


def _calls(tape: Tape, pieces: Pieces) -> Script[bool]:
    yield from tape.skip()
    return bool((yield from tape.starts(CALL))) and (yield from _call(tape, pieces))


def _call(tape: Tape, pieces: Pieces) -> Script[bool]:
    yield from tape.skip()
    name = yield from tape.word(_NAME)
    if not name or not (yield from tape.starts(SEPARATOR)):
        return False
    if name == "function" and (yield from tape.peek()) != "{":  # V3: the kind of call, its name comes only now
        name = yield from tape.word(_NAME)
        if not (yield from tape.peek()):
            return False
    if not name or not name.isprintable():
        return False
    tape.unpin()
    pieces.call(name)
    yield from _fenced(tape, pieces)
    return True


def _fenced(tape: Tape, pieces: Pieces) -> Script[None]:
    """Arguments, in a fence or not. What has no object there is content."""
    yield from tape.skip()
    fence = yield from tape.starts("```")
    if fence:
        yield from tape.starts("json")
    yield from tape.skip()
    if (yield from tape.peek()) != "{":
        return
    yield from last_arguments(tape, pieces)
    yield from tape.skip()
    if fence:
        yield from tape.starts("```")
