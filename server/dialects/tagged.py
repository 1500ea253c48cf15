"""Dialects that delimit reasoning and calls with tags in running text: their common parser, and the grammar of a call.

Not here: what follows a family's tags (see the family's own file).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from server.dialects.base import OutputParser, ToolSpec
from server.dialects.cursor import Cursor, Parser
from server.dialects.deltas import Deltas, StreamingParser
from server.dialects.grammar import NO_TOKENS, free_text_rules, token_ids_of
from server.dialects.reasoning import ReasoningTags

# Parses calls. False: there is none, nothing has been written, and the cursor is to go back to its pin.
CallParser = Callable[[Cursor, Deltas], Parser[bool]]
ANY_TOOL = ToolSpec("any")


@dataclass(frozen=True, slots=True)
class CallSyntax:
    """How calls are written."""

    opens: Mapping[str, CallParser] = field(default_factory=dict)  # what follows each opening tag
    closes: tuple[str, ...] = ()  # the tags that end a call
    untagged: CallParser | None = None  # calls that need no tag, at the start of an answer


class TaggedDialect:
    """A dialect of tags in running text. `specials` are the checkpoint's special tokens and their ids.

    `added`: tokens that stand for a text as a whole but are not special. They are shown as text, so that a parser sees
    them anyway; a grammar must name them by id, as llguidance takes such a token for special if it looks like `<tag>`.
    """

    name: str
    call_delimiters: tuple[str, ...] = ()
    end_delimiters: tuple[str, ...] = ()

    def __init__(
        self, specials: Mapping[str, int], reasoning: ReasoningTags | None = None, added: Mapping[str, int] = NO_TOKENS
    ) -> None:
        self._reasoning = reasoning
        tags = () if reasoning is None else (reasoning.open, reasoning.close)
        written = (*self.call_delimiters, *tags)
        self._ids = token_ids_of(written, {**added, **specials})
        self.delimiters = tuple(delimiter for delimiter in written if delimiter in specials)
        self.end_tokens = tuple(delimiter for delimiter in self.end_delimiters if delimiter in specials)

    def call_syntax(self, tools: Sequence[ToolSpec]) -> CallSyntax:
        raise NotImplementedError

    def call_rules(self, tools: Sequence[ToolSpec], parallel: bool) -> str:
        """Lark rules that define `moe_calls`."""
        raise NotImplementedError

    def parser(self, prompt: str, tools: Sequence[ToolSpec], single: bool = False) -> OutputParser:
        syntax = self.call_syntax(tools) if tools else CallSyntax()
        opened = self._reasoning is not None and self._reasoning.opened(prompt)
        return StreamingParser(lambda cursor, deltas: self._parse(cursor, deltas, syntax, opened), single=single)

    def call_grammar(self, prompt: str, tools: Sequence[ToolSpec], parallel: bool) -> str:
        if not tools:
            raise ValueError("a call needs at least one tool")
        return self._grammar(prompt, "moe_calls", self.call_rules(tools, parallel))

    def free_text_rules(self) -> str:
        return free_text_rules(tuple(self.call_syntax((ANY_TOOL,)).opens))

    def answer_grammar(self, prompt: str, rules: str) -> str:
        return self._grammar(prompt, "answer", rules)

    def _grammar(self, prompt: str, rest: str, rules: str) -> str:
        head, reasoning = self._reasoning.before(prompt, self._ids) if self._reasoning else ("", "")
        return f"start: {head} {rest}\n{reasoning}{rules}"

    def _parse(self, cursor: Cursor, deltas: Deltas, syntax: CallSyntax, opened: bool) -> Parser[None]:
        reasoning = self._reasoning
        if reasoning is not None:
            yield from reasoning.parse_first(cursor, deltas, opened)
        if syntax.untagged is not None:
            yield from _untagged(cursor, deltas, syntax.untagged)
        anywhere = (reasoning.open,) if reasoning is not None and reasoning.anywhere else ()
        delimiters = (*syntax.opens, *syntax.closes, *anywhere)
        if not delimiters:
            deltas.no_more_delimiters()
        while delimiter := (yield from cursor.write_until(delimiters, deltas.content)):
            if delimiter in syntax.opens:
                yield from _tagged(cursor, deltas, delimiter, syntax.opens[delimiter])
                continue
            cursor.take(len(delimiter))
            if reasoning is not None and delimiter == reasoning.open:
                yield from reasoning.parse_rest(cursor, deltas)
            elif not deltas.calls:  # a closing tag that closes nothing
                deltas.content(delimiter)


def _tagged(cursor: Cursor, deltas: Deltas, tag: str, parse: CallParser) -> Parser[None]:
    """Parse a call after its tag; where none comes, the tag is content, and what follows it is parsed again."""
    cursor.pin()
    cursor.take(len(tag))
    if (yield from parse(cursor, deltas)):
        cursor.unpin()
    else:
        cursor.rewind()
        deltas.content(cursor.take(len(tag)))


def _untagged(cursor: Cursor, deltas: Deltas, parse: CallParser) -> Parser[None]:
    """Parse calls at the start of the answer, if there are any."""
    cursor.pin()
    yield from cursor.skip()
    if (yield from parse(cursor, deltas)):
        cursor.unpin()
    else:
        cursor.rewind()
