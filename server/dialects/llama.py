"""Llama 3.x and 4: the whole answer is a JSON object, or several, `parameters` in place of `arguments`.

Nothing marks such a call for certain, so only an object that names a tool of the request is one.
"""

import re
from collections.abc import Container, Sequence

from server.dialects.base import Tool
from server.dialects.cursor import Script, Tape
from server.dialects.deltas import Pieces
from server.dialects.grammar import object_call, one_of, repeated
from server.dialects.objects import call_object
from server.dialects.tagged import Form, Marked

TAGS = ("<|python_tag|>", "<|python_start|>")
CLOSE = "<|python_end|>"
_BETWEEN = re.compile(r"[ \t\r\n;]+")


class Llama(Marked):
    name = "llama"
    call_marks = (*TAGS, CLOSE)
    end_marks = ("<|eom_id|>", "<|eom|>")

    def form(self, tools: Sequence[Tool]) -> Form:
        names = frozenset(tool.name for tool in tools)

        def calls(tape: Tape, pieces: Pieces) -> Script[bool]:
            return (yield from _calls(tape, pieces, names))

        return Form(dict.fromkeys(TAGS, calls), (CLOSE,), calls)

    def call_rules(self, tools: Sequence[Tool], parallel: bool) -> str:
        calls = one_of("moe_call", [object_call(tool, "parameters") for tool in tools])
        return f"moe_calls: {repeated('moe_call', '/; ?/', parallel)}\n{calls}"


def _calls(tape: Tape, pieces: Pieces, names: Container[str]) -> Script[bool]:
    """The first object decides whether these are calls; what follows and is none is content from there on."""
    yield from tape.skip()
    if not (yield from call_object(tape, pieces, names)):
        return False
    while True:
        tape.pin()
        yield from tape.skip(_BETWEEN)
        yield from tape.starts(*TAGS)
        if not (yield from tape.peek()):
            tape.unpin()
            return True
        if not (yield from call_object(tape, pieces, names)):
            tape.rewind()
            return True
