"""Harmony, gpt-oss's format: an answer is a row of messages, each with a header that says where its body goes.

A header that names a recipient is a call. `<|call|>` ends an answer, so there is one call in each.
"""

import re
from collections.abc import Mapping, Sequence

from server.dialects.base import Reader, Tool
from server.dialects.cursor import Script, Tape
from server.dialects.deltas import Pieces, ScriptReader, Trim
from server.dialects.grammar import NO_TOKENS, free_text, ids_of, literal, one_of, spell, thinking
from server.dialects.grammar import arguments as arguments_rule
from server.dialects.objects import arguments

START, CHANNEL, CONSTRAIN, MESSAGE = "<|start|>", "<|channel|>", "<|constrain|>", "<|message|>"
END, RETURN, CALL = "<|end|>", "<|return|>", "<|call|>"
ROLE, FUNCTIONS = "assistant", "functions."
_ENDS = (END, RETURN, CALL)
_MARKS = (START, CHANNEL, CONSTRAIN, MESSAGE, *_ENDS)
_BODY_ENDS = (*_ENDS, START, CHANNEL)  # the last two where a model forgot to end
_WORDS = re.compile(r"[^<\n]+")
_PARTS = 6  # of a header, at most: role, recipient, channel, recipient, type, and one to spare
_CHANNEL = re.compile(re.escape(CHANNEL) + r"\s*(\w+)")
_RECIPIENT = re.compile(r"\bto=([^\s<]+)")
# A header that the answer's end cut, with nothing in it
_CUT = re.compile(
    r"\s*(?:<\|(?:start|channel)\|>[a-z]*)+(?:<(?:\|[a-z]*\|?)?)?\Z"
)  # a header that the answer's end cut, with nothing in it


class Harmony:
    name = "harmony"

    def __init__(self, specials: Mapping[str, int], added: Mapping[str, int] = NO_TOKENS) -> None:
        self._ids = ids_of(_MARKS, {**added, **specials})
        self.marks = tuple(mark for mark in _MARKS if mark in specials)
        self.ends = tuple(mark for mark in (RETURN, CALL) if mark in specials)

    def reader(self, prompt: str, tools: Sequence[Tool], single: bool = False) -> Reader:
        return ScriptReader(lambda tape, pieces: _read(tape, pieces, bool(tools)), _begun(prompt), single)

    def calls(self, prompt: str, tools: Sequence[Tool], parallel: bool) -> str:
        if not tools:
            raise ValueError("a call needs at least one tool")
        return self._grammar(prompt, f"moe_call ({spell(CALL, self._ids)})?") + one_of(
            "moe_call", [self._call_rule(tool) for tool in tools]
        )

    def free(self) -> str:
        return free_text(_MARKS)

    def answers(self, prompt: str, rules: str) -> str:
        begun = _begun(prompt)
        final = "" if begun.endswith(f"final{MESSAGE}") else spell(f"{CHANNEL}final{MESSAGE}", self._ids)
        return self._grammar(prompt, f"{final} answer ({spell(RETURN, self._ids)})?") + rules

    def _call_rule(self, tool: Tool) -> str:
        opening = spell(f"{CHANNEL}commentary to={FUNCTIONS}", self._ids)
        middle = spell(f" {CONSTRAIN}json{MESSAGE}", self._ids)
        return f"{opening} {literal(tool.name)} {middle} {arguments_rule(tool)}"

    def _grammar(self, prompt: str, rest: str) -> str:
        begun = _begun(prompt)
        if begun and not begun.endswith(f"analysis{MESSAGE}"):
            return f"start: {rest}\n"
        opening = spell(f"{CHANNEL}analysis{MESSAGE}", self._ids)
        head = "moe_thought" if begun else f"({opening} moe_thought)?"
        thought = f"moe_thought: moe_thinking {spell(START + ROLE, self._ids)}\n"
        return f"start: {head} {rest}\n{thinking(END, self._ids)}{thought}"


def _begun(prompt: str) -> str:
    """The header, or the part of one, that the prompt's end has already written for the answer."""
    _before, start, message = prompt.rpartition(START)
    if not start or not message.startswith(ROLE) or any(end in message for end in _ENDS):
        return ""
    header, mark, _body = message.removeprefix(ROLE).partition(MESSAGE)
    return header + mark


def _read(tape: Tape, pieces: Pieces, with_tools: bool) -> Script[None]:
    while True:
        tape.pin()
        header = yield from _header(tape)
        if header is not None:
            tape.unpin()
            yield from _body(tape, pieces, header, with_tools)
        else:
            yield from _stray(tape, pieces)
        if not (yield from tape.peek()):
            return
        yield from tape.starts(*_ENDS)


def _stray(tape: Tape, pieces: Pieces) -> Script[None]:
    """Text where a header should be is content; of a header that the answer's end cut, nothing is left."""
    tape.rewind()
    if tape.ended:
        tape.run(_CUT)
    pieces.content((yield from tape.starts(START, CHANNEL, MESSAGE)))
    yield from tape.until(_BODY_ENDS, pieces.content)


def _header(tape: Tape) -> Script[str | None]:
    """Up to the mark that begins a body, which is taken too; None if no header is here."""
    yield from tape.skip()
    mark = text = yield from tape.starts("to=", START, CHANNEL, MESSAGE)
    for _ in range(_PARTS if text else 0):
        if mark == MESSAGE:
            return text
        words = yield from tape.word(_WORDS)
        mark = yield from tape.starts(CHANNEL, CONSTRAIN, MESSAGE)
        text += words + mark
        if not mark:
            break
    return None


def _body(tape: Tape, pieces: Pieces, header: str, with_tools: bool) -> Script[None]:
    recipient, channel = _RECIPIENT.search(header), _CHANNEL.search(header)
    name = recipient.group(1).removeprefix(FUNCTIONS) if recipient else ""
    if name.isprintable() and name and with_tools:
        yield from _call(tape, pieces, name)
    elif channel and channel.group(1) == "analysis" and not recipient:
        pieces.thought_part()
        if (yield from tape.until(_BODY_ENDS, pieces.thought)):
            pieces.mark()
    else:
        pieces.content_part()
        pieces.content(header if recipient else "")  # a call that nobody asked for, as it was written
        yield from tape.until(_BODY_ENDS, pieces.content)


def _call(tape: Tape, pieces: Pieces, name: str) -> Script[None]:
    """The body is the arguments. As JSON it is read by its own marks first: a text in it may quote the family's."""
    pieces.call(name)
    yield from tape.skip()
    yield from arguments(tape, pieces)
    rest = Trim()
    if (yield from tape.until(_BODY_ENDS, lambda text: pieces.arguments(rest.write(text)))):
        pieces.call_end()
