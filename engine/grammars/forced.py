"""Forced tokens: those that a grammar leaves no alternative to, a few at a time.

The library's own function looks ahead to the end of a forced text, again for every token, and holds the interpreter's
lock meanwhile: 50 ms per token inside a literal of 60 kB.
"""

from collections.abc import Collection

import numpy as np
from llguidance import LLMatcher, LLTokenizer
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask
from numpy.typing import NDArray

MAX_STEPS = 24  # how far to look ahead: one step is one letter or a few
MAX_CHOICES = 64  # if more tokens are allowed, they have no common beginning


class ForcedTokens:
    """Finds forced tokens for one tokenizer."""

    def __init__(self, tokenizer: LLTokenizer, vocabulary: int, ends: Collection[int]) -> None:
        self._tokenizer, self._ends = tokenizer, ends
        self._scratch = allocate_token_bitmask(1, vocabulary)

    def after(self, inner: LLMatcher, row: NDArray[np.int32]) -> list[int]:
        """The tokens that must come next in `inner`, whose mask is `row`, as the tokenizer would write them."""
        found: list[int] = []
        while (
            len(found) < MAX_STEPS
            and (token := self._forced_token(row)) is not None
            and inner.try_consume_tokens([token])
        ):
            found.append(token)
            fill_next_token_bitmask(inner, self._scratch, 0)
            row = self._scratch[0]
        if found and not inner.is_error():
            inner.rollback(len(found))
        return self._retokenized(found)

    def _forced_token(self, row: NDArray[np.int32]) -> int | None:
        """The shortest allowed token, if all others begin with its text: then that text comes next in any case."""
        if not 0 < int(np.bitwise_count(row).sum()) <= MAX_CHOICES:
            return None
        tokens = _tokens(row)
        if len(tokens) == 1:
            return None if tokens[0] in self._ends else tokens[0]
        if any(self._tokenizer.is_special_token(token) for token in tokens):
            return None
        texts = [self._tokenizer.decode_bytes([token]) for token in tokens]
        shortest = min(texts, key=len)
        if not all(text.startswith(shortest) for text in texts):
            return None
        return tokens[texts.index(shortest)]

    def _retokenized(self, tokens: list[int]) -> list[int]:
        """The same text in the tokenizer's own tokens, as far as they are certain; special tokens are kept."""
        special = (index for index, token in enumerate(tokens) if self._tokenizer.is_special_token(token))
        plain = next(special, len(tokens))
        if plain == 0:
            return tokens[:1]
        return self._tokenizer.tokenize_partial(self._tokenizer.decode_bytes(tokens[:plain]))[0]


def _tokens(row: NDArray[np.int32]) -> list[int]:
    """The ids whose bits are set, few of them."""
    words = np.flatnonzero(row)
    bytes_of_word = row[words].view(np.uint8).reshape(-1, 4)
    bits = np.unpackbits(bytes_of_word, axis=1, bitorder="little")
    index, bit = bits.nonzero()
    return [int(token) for token in words[index] * 32 + bit]
