"""Mistral: `[TOOL_CALLS]` with an array of objects, or before each call as `name[ARGS]{…}`; thoughts in `[THINK]`.

A checkpoint that has `[ARGS]` as a token is taken to write the newer form; both are read from any.
"""

import re
from collections.abc import Sequence

from server.dialects.base import Tool
from server.dialects.cursor import Script, Tape
from server.dialects.deltas import Pieces
from server.dialects.grammar import arguments as arguments_rule
from server.dialects.grammar import literal, object_call, one_of, repeated, spell
from server.dialects.objects import call_object, last_arguments
from server.dialects.tagged import Form, Marked

CALLS, ARGS, ID = "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"
_NAME = re.compile(r"[^\s{}\[\]\"]+")


class Mistral(Marked):
    name = "mistral"
    call_marks = (CALLS, ARGS, ID)

    def form(self, tools: Sequence[Tool]) -> Form:
        return Form({CALLS: _calls})

    def call_rules(self, tools: Sequence[Tool], parallel: bool) -> str:
        return self._named_rules(tools, parallel) if ARGS in self._ids else self._array_rules(tools, parallel)

    def _named_rules(self, tools: Sequence[Tool], parallel: bool) -> str:
        opening, middle = spell(CALLS, self._ids), spell(ARGS, self._ids)
        # older checkpoints of this form were trained to make up an id of nine characters
        middle = f"({spell(ID, self._ids)} /[a-zA-Z0-9]{{9}}/)? {middle}" if ID in self._ids else middle
        calls = one_of("moe_call", [f"{opening} {literal(t.name)} {middle} {arguments_rule(t)}" for t in tools])
        return f"moe_calls: {'moe_call+' if parallel else 'moe_call'}\n{calls}"

    def _array_rules(self, tools: Sequence[Tool], parallel: bool) -> str:
        opening = spell(CALLS, self._ids)
        calls = one_of("moe_call", [object_call(tool) for tool in tools])
        return f'moe_calls: {opening} " "? "[" {repeated("moe_call", "/, ?/", parallel)} "]"\n{calls}'


def _calls(tape: Tape, pieces: Pieces) -> Script[bool]:
    yield from tape.skip()
    if (yield from tape.starts("[")):
        return (yield from _array(tape, pieces))
    return (yield from _named(tape, pieces))


def _array(tape: Tape, pieces: Pieces) -> Script[bool]:
    """The first object decides whether these are calls; what breaks after it is content from there on."""
    yield from tape.skip()
    if not (yield from call_object(tape, pieces)):
        return False
    while True:
        tape.pin()
        yield from tape.skip()
        after = yield from tape.starts(",", "]")
        if after == "]":
            return True
        yield from tape.skip()
        if not (yield from tape.peek()):  # the array is cut here
            tape.unpin()
            return True
        if not after or not (yield from call_object(tape, pieces)):
            tape.rewind()
            return True


def _named(tape: Tape, pieces: Pieces) -> Script[bool]:
    name = yield from tape.word(_NAME)
    unmarked = (yield from tape.peek()) == "{"  # some write no mark between the name and its arguments
    mark = "" if unmarked else (yield from tape.starts(ARGS, ID))
    if not name.isprintable() or not name or not (unmarked or mark):
        return False
    tape.unpin()
    pieces.call(name)
    if mark == ID:
        yield from tape.word(_NAME)
        yield from tape.starts(ARGS)
    yield from tape.skip()
    yield from last_arguments(tape, pieces)
    return True
