"""Escapes special-token strings in user text, so that they are not tokenized as special tokens.

An escape is a mark after the string's first character, which the tokenizer removes later. It does not depend on a
tokenizer or a template.
"""

import re
from collections.abc import Sequence
from functools import lru_cache

MARK = "\ufdd0"  # a Unicode non-character: never part of valid text
WINDOW = 256 * 1024  # characters searched at a time: a search holds the interpreter's lock


@lru_cache(maxsize=16)
def _any_of(tokens: tuple[str, ...]) -> re.Pattern[str]:
    longest_first = sorted(filter(None, tokens), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def escape_specials(text: str, specials: Sequence[str]) -> str:
    """`text` with a mark after the first character of each of these token strings, overlapping ones included."""
    specials = tuple(specials)
    pattern, longest = _any_of(specials), max(map(len, specials), default=0)
    pieces, begin, place = [], 0, 0
    while place < len(text):
        found = pattern.search(text, place, place + WINDOW + longest)
        if found is None or found.start() >= place + WINDOW:
            place += WINDOW
            continue
        pieces.append(text[begin : found.start() + 1])
        begin = place = found.start() + 1
    return MARK.join([*pieces, text[begin:]])
