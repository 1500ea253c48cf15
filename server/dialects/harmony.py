"""Harmony, the format of gpt-oss: an answer is a sequence of messages, each with a header that says what its body is.

A header that names a recipient is a call. `<|call|>` ends an answer, so that each has at most one call.
"""

import re
from collections.abc import Mapping, Sequence

from server.dialects.base import OutputParser, ToolSpec
from server.dialects.cursor import Cursor, Parser
from server.dialects.deltas import Deltas, StreamingParser, WhitespaceTrimmer
from server.dialects.grammar import (
    NO_TOKENS,
    arguments_rule,
    free_text_rules,
    lark_text,
    literal,
    one_of,
    reasoning_rule,
    token_ids_of,
)
from server.dialects.objects import arguments

START, CHANNEL, CONSTRAIN, MESSAGE = "<|start|>", "<|channel|>", "<|constrain|>", "<|message|>"
END, RETURN, CALL = "<|end|>", "<|return|>", "<|call|>"
ROLE, FUNCTIONS = "assistant", "functions."
_ENDS = (END, RETURN, CALL)
_DELIMITERS = (START, CHANNEL, CONSTRAIN, MESSAGE, *_ENDS)
_BODY_ENDS = (*_ENDS, START, CHANNEL)  # the last two where the model left out the end
_WORDS = re.compile(r"[^<\n]+")
_MAX_HEADER_PARTS = 6  # role, recipient, channel, recipient, type, and one more
_CHANNEL = re.compile(re.escape(CHANNEL) + r"\s*(\w+)")
_RECIPIENT = re.compile(r"\bto=([^\s<]+)")
# The beginning of a header at the end of a cut answer
_CUT_HEADER = re.compile(r"\s*(?:<\|(?:start|channel)\|>[a-z]*)+(?:<(?:\|[a-z]*\|?)?)?\Z")


class Harmony:
    name = "harmony"

    def __init__(self, specials: Mapping[str, int], added: Mapping[str, int] = NO_TOKENS) -> None:
        self._ids = token_ids_of(_DELIMITERS, {**added, **specials})
        self.delimiters = tuple(delimiter for delimiter in _DELIMITERS if delimiter in specials)
        self.end_tokens = tuple(delimiter for delimiter in (RETURN, CALL) if delimiter in specials)

    def parser(self, prompt: str, tools: Sequence[ToolSpec], single: bool = False) -> OutputParser:
        return StreamingParser(lambda cursor, deltas: _parse(cursor, deltas, bool(tools)), _begun(prompt), single)

    def call_grammar(self, prompt: str, tools: Sequence[ToolSpec], parallel: bool) -> str:
        if not tools:
            raise ValueError("a call needs at least one tool")
        grammar = self._grammar(prompt, f"moe_call ({lark_text(CALL, self._ids)})?")
        return grammar + one_of("moe_call", [self._call_rule(tool) for tool in tools])

    def free_text_rules(self) -> str:
        return free_text_rules(_DELIMITERS)

    def answer_grammar(self, prompt: str, rules: str) -> str:
        begun = _begun(prompt)
        final = "" if begun.endswith(f"final{MESSAGE}") else lark_text(f"{CHANNEL}final{MESSAGE}", self._ids)
        return self._grammar(prompt, f"{final} answer ({lark_text(RETURN, self._ids)})?") + rules

    def _call_rule(self, tool: ToolSpec) -> str:
        opening = lark_text(f"{CHANNEL}commentary to={FUNCTIONS}", self._ids)
        middle = lark_text(f" {CONSTRAIN}json{MESSAGE}", self._ids)
        return f"{opening} {literal(tool.name)} {middle} {arguments_rule(tool)}"

    def _grammar(self, prompt: str, rest: str) -> str:
        begun = _begun(prompt)
        if begun and not begun.endswith(f"analysis{MESSAGE}"):
            return f"start: {rest}\n"
        opening = lark_text(f"{CHANNEL}analysis{MESSAGE}", self._ids)
        head = "moe_thought" if begun else f"({opening} moe_thought)?"
        reasoning = f"moe_thought: moe_thinking {lark_text(START + ROLE, self._ids)}\n"
        return f"start: {head} {rest}\n{reasoning_rule(END, self._ids)}{reasoning}"


def _begun(prompt: str) -> str:
    """The header, or the part of one, that the end of the prompt has already written for the answer."""
    _before, start, message = prompt.rpartition(START)
    if not start or not message.startswith(ROLE) or any(end in message for end in _ENDS):
        return ""
    header, delimiter, _body = message.removeprefix(ROLE).partition(MESSAGE)
    return header + delimiter


def _parse(cursor: Cursor, deltas: Deltas, with_tools: bool) -> Parser[None]:
    while True:
        cursor.pin()
        header = yield from _header(cursor)
        if header is not None:
            cursor.unpin()
            yield from _body(cursor, deltas, header, with_tools)
        else:
            yield from _stray_text(cursor, deltas)
        if not (yield from cursor.peek()):
            return
        yield from cursor.take_one_of(*_ENDS)


def _stray_text(cursor: Cursor, deltas: Deltas) -> Parser[None]:
    """Write text that stands where a header should be as content; drop a header in which the answer was cut."""
    cursor.rewind()
    if cursor.ended:
        cursor.take_match(_CUT_HEADER)
    deltas.content((yield from cursor.take_one_of(START, CHANNEL, MESSAGE)))
    yield from cursor.write_until(_BODY_ENDS, deltas.content)


def _header(cursor: Cursor) -> Parser[str | None]:
    """The header up to the delimiter that begins a body, which is taken as well; None if no header is here."""
    yield from cursor.skip()
    delimiter = text = yield from cursor.take_one_of("to=", START, CHANNEL, MESSAGE)
    for _ in range(_MAX_HEADER_PARTS if text else 0):
        if delimiter == MESSAGE:
            return text
        words = yield from cursor.word(_WORDS)
        delimiter = yield from cursor.take_one_of(CHANNEL, CONSTRAIN, MESSAGE)
        text += words + delimiter
        if not delimiter:
            break
    return None


def _body(cursor: Cursor, deltas: Deltas, header: str, with_tools: bool) -> Parser[None]:
    recipient, channel = _RECIPIENT.search(header), _CHANNEL.search(header)
    name = recipient.group(1).removeprefix(FUNCTIONS) if recipient else ""
    if name.isprintable() and name and with_tools:
        yield from _call(cursor, deltas, name)
    elif channel and channel.group(1) == "analysis" and not recipient:
        deltas.new_reasoning()
        if (yield from cursor.write_until(_BODY_ENDS, deltas.reasoning)):
            deltas.delimiter()
    else:
        deltas.new_content()
        deltas.content(
            header if recipient else ""
        )  # a call, although the request has no tools, stays as it was written
        yield from cursor.write_until(_BODY_ENDS, deltas.content)


def _call(cursor: Cursor, deltas: Deltas, name: str) -> Parser[None]:
    """Parse a body of arguments. JSON is read first, since a string in it may quote one of Harmony's delimiters."""
    deltas.call(name)
    yield from cursor.skip()
    yield from arguments(cursor, deltas)
    rest = WhitespaceTrimmer()
    if (yield from cursor.write_until(_BODY_ENDS, lambda text: deltas.arguments(rest.write(text)))):
        deltas.call_end()
