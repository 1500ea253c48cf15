"""A model whose family has no delimiters: its answer is content, whatever it contains.

Where a request has tools, such a model writes calls as Hermes does, and only then are they looked for.
"""

from collections.abc import Mapping

from server.dialects.grammar import NO_TOKENS
from server.dialects.hermes import Hermes


class Plain(Hermes):
    name = "plain"

    def __init__(self, specials: Mapping[str, int], added: Mapping[str, int] = NO_TOKENS) -> None:
        super().__init__(specials, None, added)
