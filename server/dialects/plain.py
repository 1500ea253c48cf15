"""A model whose family marks nothing: its answer is content, whatever it holds.

Asked for calls all the same, it writes them in the Hermes form, and only then are they looked for.
"""

from collections.abc import Mapping

from server.dialects.grammar import NO_TOKENS
from server.dialects.hermes import Hermes


class Plain(Hermes):
    name = "plain"

    def __init__(self, specials: Mapping[str, int], added: Mapping[str, int] = NO_TOKENS) -> None:
        super().__init__(specials, None, added)
