"""Marks that keep token strings which a user typed from being read as tokens. It knows no tokenizer, no template."""

import re
from collections.abc import Sequence
from functools import lru_cache

MARK = "\ufdd0"  # a Unicode non-character: never part of valid text
WINDOW = 256 * 1024  # characters searched at a time: a search keeps the interpreter's lock


@lru_cache(maxsize=16)
def _any_of(tokens: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, sorted(filter(None, tokens), key=len, reverse=True))) or "(?!)")


def mark_specials(text: str, specials: Sequence[str]) -> str:
    """Break every one of these token strings in `text`, overlapping ones too, by a mark after its first character."""
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
