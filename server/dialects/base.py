"""The seam between a model's own way of writing calls and thoughts, and the wire: what every dialect can do.

A dialect is text in, pieces out. It knows no HTTP, no tokenizer and no request beyond its tools.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgspec


@dataclass(frozen=True, slots=True)
class Tool:
    """One function that the model may call; `parameters` is a JSON schema of its arguments, an object.

    `closed`: what it does not name is ruled out unless it says otherwise.
    """

    name: str
    parameters: Mapping[str, Any] = field(default_factory=lambda: {"type": "object", "properties": {}})
    closed: bool = True


class Content(msgspec.Struct, frozen=True, gc=False):
    """Text of the answer itself."""

    text: str


class Reasoning(msgspec.Struct, frozen=True, gc=False):
    """Text that the family marks as thinking."""

    text: str


class CallStart(msgspec.Struct, frozen=True, gc=False):
    """Call number `index` of this answer begins; calls are numbered from 0 and do not overlap."""

    index: int
    name: str


class CallArguments(msgspec.Struct, frozen=True, gc=False):
    """More of the JSON text of the arguments of call `index`."""

    index: int
    text: str


Piece = Content | Reasoning | CallStart | CallArguments


class Reader(Protocol):
    """Turns one answer's text, as it grows, into pieces. What the pieces join to never depends on how it was split."""

    @property
    def in_call(self) -> bool:
        """Whether a call has begun that is not whole yet."""

    @property
    def over(self) -> bool:
        """Whether the one call that may be made is whole: what follows is no part of the answer."""

    def push(self, text: str) -> list[Piece]: ...

    def flush(self, cut: bool = False, last: str = "") -> list[Piece]:
        """What is held back, now that the answer has ended with `last`. Text that turned out to be no call is content;
        with `cut`, by a limit or a stop string, a mark or a call without its name that the end broke off is dropped."""


class Dialect(Protocol):
    """One way of writing. Made for a checkpoint, so that it knows which of its marks are special tokens."""

    name: str
    marks: tuple[str, ...]  # special tokens whose text the reader must see
    ends: tuple[str, ...]  # special tokens that end an answer, beside the checkpoint's own

    def reader(self, prompt: str, tools: Sequence[Tool], single: bool = False) -> Reader:
        """For one answer. `prompt` is the rendered template: its end may have opened a thought. Without tools,
        nothing is read as a call; with `single`, the first whole call ends the answer."""

    def calls(self, prompt: str, tools: Sequence[Tool], parallel: bool) -> str:
        """A Lark grammar (llguidance's) of answers that call: thoughts where the family has them, then one call of
        one of `tools`, or with `parallel` one or more. (Harmony's answers end with their first call: it stays one.)"""

    def free(self) -> str:
        """Lark that defines `answer` as any text in which no call begins."""

    def answers(self, prompt: str, rules: str) -> str:
        """A Lark grammar of answers whose content is `answer`, which `rules` defines; thoughts may come before."""
