"""Marks that keep token strings which a user typed from being read as tokens. It knows no tokenizer, no template."""

import re
from collections.abc import Sequence
from functools import lru_cache

MARK = "\ufdd0"  # a Unicode non-character: never part of valid text


@lru_cache(maxsize=16)
def _any_of(tokens: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, sorted(filter(None, tokens), key=len, reverse=True))) or "(?!)")


def mark_specials(text: str, specials: Sequence[str]) -> str:
    """Break every one of these token strings in `text`, overlapping ones too, by a mark after its first character."""
    pattern, pieces, begin = _any_of(tuple(specials)), [], 0
    while found := pattern.search(text, begin):
        pieces.append(text[begin : found.start() + 1])
        begin = found.start() + 1
    return MARK.join([*pieces, text[begin:]])
