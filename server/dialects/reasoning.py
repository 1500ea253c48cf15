"""How a family marks thoughts in running text, and how a prompt may have begun or ruled out one.

It knows no calls.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from server.dialects.cursor import Script, Tape
from server.dialects.deltas import Pieces
from server.dialects.grammar import spell, thinking


@dataclass(frozen=True, slots=True)
class Thoughts:
    """Two marks. `declared`: the family is known to think, so that a forced answer may begin with a thought.

    A thought is looked for at the start of an answer. `anywhere`: the opening mark is a special token, which no model
    writes by quoting it, so it opens a thought wherever it stands.
    """

    open: str = "<think>"
    close: str = "</think>"
    declared: bool = True
    anywhere: bool = False

    def opened(self, prompt: str) -> bool:
        return prompt.rstrip().endswith(self.open)

    def closed(self, prompt: str) -> bool:
        return prompt.rstrip().endswith(self.close)

    def first(self, tape: Tape, pieces: Pieces, opened: bool) -> Script[None]:
        """The thought at the start, if there is one. One that the prompt opened may be opened again."""
        tape.pin()
        yield from tape.skip()
        if (yield from tape.starts(self.open)):
            tape.unpin()
        else:
            tape.rewind()
            if not opened:
                return
        yield from self.rest(tape, pieces)

    def rest(self, tape: Tape, pieces: Pieces) -> Script[None]:
        """A thought whose opening mark has been taken."""
        pieces.mark()
        if (yield from tape.until((self.close,), pieces.thought)):
            tape.take(len(self.close))
            pieces.mark()

    def before(self, prompt: str, ids: Mapping[str, int]) -> tuple[str, str]:
        """What a grammar's start holds before the answer itself, and the rules for it."""
        if self.opened(prompt):
            return "moe_thought", self._rules(ids)
        if self.declared and not self.closed(prompt):
            return f"({spell(self.open, ids)} moe_thought)?", self._rules(ids)
        return "", ""

    def _rules(self, ids: Mapping[str, int]) -> str:
        return f"{thinking(self.close, ids)}moe_thought: moe_thinking MOE_GAP?\nMOE_GAP: /\\n{{1,2}}/\n"
