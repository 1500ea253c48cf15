"""What the families share that mark thoughts and calls in running text: the loop that reads, the grammar around calls.

A family says what follows its marks; this file knows none of them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from server.dialects.base import Reader, Tool
from server.dialects.cursor import Script, Tape
from server.dialects.deltas import Pieces, ScriptReader
from server.dialects.grammar import NO_TOKENS, free_text, ids_of
from server.dialects.reasoning import Thoughts

# Reads calls. False: there is none, nothing has been written, and the caller goes back to its pin.
Attempt = Callable[[Tape, Pieces], Script[bool]]
ANY = Tool("any")


@dataclass(frozen=True, slots=True)
class Form:
    """How calls are written: what follows each opening mark, the marks that end one, and a call that needs no mark."""

    opens: Mapping[str, Attempt] = field(default_factory=dict)
    closes: tuple[str, ...] = ()
    bare: Attempt | None = None


class Marked:
    """A dialect of marks in running text. `specials` are the checkpoint's special tokens and their ids.

    `added`: tokens that stand for a text as a whole but are not special. A text shows them, so a reader needs no more;
    a grammar must name them by id, as llguidance takes such a token for special if it looks like `<mark>`.
    """

    name: str
    call_marks: tuple[str, ...] = ()
    end_marks: tuple[str, ...] = ()

    def __init__(
        self, specials: Mapping[str, int], thoughts: Thoughts | None = None, added: Mapping[str, int] = NO_TOKENS
    ) -> None:
        self._thoughts = thoughts
        written = self.call_marks if thoughts is None else (*self.call_marks, thoughts.open, thoughts.close)
        self._ids = ids_of(written, {**added, **specials})
        self.marks = tuple(mark for mark in written if mark in specials)
        self.ends = tuple(mark for mark in self.end_marks if mark in specials)

    def form(self, tools: Sequence[Tool]) -> Form:
        raise NotImplementedError

    def call_rules(self, tools: Sequence[Tool], parallel: bool) -> str:
        """Lark rules that define `moe_calls`."""
        raise NotImplementedError

    def reader(self, prompt: str, tools: Sequence[Tool], single: bool = False) -> Reader:
        form = self.form(tools) if tools else Form()
        opened = self._thoughts is not None and self._thoughts.opened(prompt)
        return ScriptReader(lambda tape, pieces: self._read(tape, pieces, form, opened), single=single)

    def calls(self, prompt: str, tools: Sequence[Tool], parallel: bool) -> str:
        if not tools:
            raise ValueError("a call needs at least one tool")
        return self._grammar(prompt, "moe_calls", self.call_rules(tools, parallel))

    def free(self) -> str:
        return free_text(tuple(self.form((ANY,)).opens))

    def answers(self, prompt: str, rules: str) -> str:
        return self._grammar(prompt, "answer", rules)

    def _grammar(self, prompt: str, rest: str, rules: str) -> str:
        head, thoughts = self._thoughts.before(prompt, self._ids) if self._thoughts else ("", "")
        return f"start: {head} {rest}\n{thoughts}{rules}"

    def _read(self, tape: Tape, pieces: Pieces, form: Form, opened: bool) -> Script[None]:
        thoughts = self._thoughts
        if thoughts is not None:
            yield from thoughts.first(tape, pieces, opened)
        if form.bare is not None:
            yield from _bare(tape, pieces, form.bare)
        anywhere = (thoughts.open,) if thoughts is not None and thoughts.anywhere else ()
        marks = (*form.opens, *form.closes, *anywhere)
        if not marks:
            pieces.no_more_marks()
        while mark := (yield from tape.until(marks, pieces.content)):
            if mark in form.opens:
                yield from _marked(tape, pieces, mark, form.opens[mark])
                continue
            tape.take(len(mark))
            if thoughts is not None and mark == thoughts.open:
                yield from thoughts.rest(tape, pieces)
            elif not pieces.calls:  # a closing mark that closes nothing
                pieces.content(mark)


def _marked(tape: Tape, pieces: Pieces, mark: str, attempt: Attempt) -> Script[None]:
    """A call after its mark; where none comes, the mark is content and what follows is read again."""
    tape.pin()
    tape.take(len(mark))
    if (yield from attempt(tape, pieces)):
        tape.unpin()
    else:
        tape.rewind()
        pieces.content(tape.take(len(mark)))


def _bare(tape: Tape, pieces: Pieces, attempt: Attempt) -> Script[None]:
    tape.pin()
    yield from tape.skip()
    if (yield from attempt(tape, pieces)):
        tape.unpin()
    else:
        tape.rewind()
