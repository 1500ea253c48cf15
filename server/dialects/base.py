"""What every dialect can do. A dialect is one model family's way of writing tool calls and reasoning in its text.

A dialect turns text into delta parts, and writes grammars of such text. Of a request it
sees only the tools.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgspec


@dataclass(frozen=True, slots=True)
class ToolSpec:
    """A function that the model may call; `parameters` is the JSON schema of its arguments, which are an object.

    `closed`: properties that the schema does not name are ruled out, unless it says otherwise.
    """

    name: str
    parameters: Mapping[str, Any] = field(default_factory=lambda: {"type": "object", "properties": {}})
    closed: bool = True


class Content(msgspec.Struct, frozen=True, gc=False):
    """Text of the answer itself."""

    text: str


class Reasoning(msgspec.Struct, frozen=True, gc=False):
    """Text that the family delimits as reasoning."""

    text: str


class CallStart(msgspec.Struct, frozen=True, gc=False):
    """Tool call number `index` of this answer begins; calls are numbered from 0 and do not overlap."""

    index: int
    name: str


class CallArguments(msgspec.Struct, frozen=True, gc=False):
    """More of the JSON text of the arguments of call `index`."""

    index: int
    text: str


DeltaPart = Content | Reasoning | CallStart | CallArguments


class OutputParser(Protocol):
    """Parses one answer's text as it grows. The joined parts do not depend on how the text was split."""

    @property
    def in_call(self) -> bool:
        """Whether a call has begun and is not complete yet."""

    @property
    def complete(self) -> bool:
        """Whether the only call that may be made is complete, so that the answer ends with it."""

    def push(self, text: str) -> list[DeltaPart]:
        """The parts that can be shown once `text` has been added."""

    def flush(self, cut: bool = False, last: str = "") -> list[DeltaPart]:
        """The parts that were held back, now that the answer has ended with `last`.

        Text that turned out to be no call is content. `cut`: a limit or a stop string ended the answer, so that an
        incomplete delimiter, or a call without its name, at the end is dropped.
        """


class Dialect(Protocol):
    """One family's syntax. It is made for a checkpoint, whose special tokens it knows."""

    name: str
    delimiters: tuple[str, ...]  # special tokens whose text the parser must see
    end_tokens: tuple[str, ...]  # special tokens that end an answer, beside the checkpoint's own

    def parser(self, prompt: str, tools: Sequence[ToolSpec], single: bool = False) -> OutputParser:
        """A parser of one answer.

        `prompt` is the rendered template, whose end may have opened the reasoning. Without tools nothing is parsed as a
        call; with `single` the first complete call ends the answer.
        """

    def call_grammar(self, prompt: str, tools: Sequence[ToolSpec], parallel: bool) -> str:
        """A Lark grammar (llguidance's) of answers that call one of `tools`, or with `parallel` one or more times.

        Reasoning may come first where the family has it. (Harmony's answers end with their first call: it stays one.)
        """

    def free_text_rules(self) -> str:
        """Lark rules that define `answer` as any text in which no call begins."""

    def answer_grammar(self, prompt: str, rules: str) -> str:
        """A Lark grammar of answers whose content is `answer`, which `rules` defines; reasoning may come first."""
