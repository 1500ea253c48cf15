"""How a family delimits reasoning in running text, and how a prompt may have opened or closed it already."""

from collections.abc import Mapping
from dataclasses import dataclass

from server.dialects.cursor import Cursor, Parser
from server.dialects.deltas import Deltas
from server.dialects.grammar import lark_text, reasoning_rule


@dataclass(frozen=True, slots=True)
class ReasoningTags:
    """The two tags of a family. `declared`: it is known to reason, so that a forced answer may begin with reasoning.

    Reasoning is looked for at the start of an answer. `anywhere`: the opening tag is a special token, which no model
    writes to quote it, so that it opens reasoning wherever it stands.
    """

    open: str = "<think>"
    close: str = "</think>"
    declared: bool = True
    anywhere: bool = False

    def opened(self, prompt: str) -> bool:
        return prompt.rstrip().endswith(self.open)

    def closed(self, prompt: str) -> bool:
        return prompt.rstrip().endswith(self.close)

    def parse_first(self, cursor: Cursor, deltas: Deltas, opened: bool) -> Parser[None]:
        """Parse the reasoning at the start, if there is any. What the prompt opened may be opened again."""
        cursor.pin()
        yield from cursor.skip()
        if (yield from cursor.take_one_of(self.open)):
            cursor.unpin()
        else:
            cursor.rewind()
            if not opened:
                return
        yield from self.parse_rest(cursor, deltas)

    def parse_rest(self, cursor: Cursor, deltas: Deltas) -> Parser[None]:
        """Parse reasoning whose opening tag has been taken."""
        deltas.delimiter()
        if (yield from cursor.write_until((self.close,), deltas.reasoning)):
            cursor.take(len(self.close))
            deltas.delimiter()

    def before(self, prompt: str, ids: Mapping[str, int]) -> tuple[str, str]:
        """What a grammar has before the answer itself, and the rules that define it."""
        if self.opened(prompt):
            return "moe_thought", self._rules(ids)
        if self.declared and not self.closed(prompt):
            return f"({lark_text(self.open, ids)} moe_thought)?", self._rules(ids)
        return "", ""

    def _rules(self, ids: Mapping[str, int]) -> str:
        return f"{reasoning_rule(self.close, ids)}moe_thought: moe_thinking MOE_GAP?\nMOE_GAP: /\\n{{1,2}}/\n"
