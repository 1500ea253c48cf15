"""A lower bound of a text's token count, without tokenizing it: a text that cannot fit need not be tokenized.

The bound holds for tokenizers that lose nothing of a text but white space; for others it is 0. It encodes nothing.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from weights.special_tokens import MARK
from weights.token_bytes import byte_alphabet

_LOSSLESS = ("ByteLevel", "Metaspace", "Digits", "UnicodeScripts", "Prepend")
_WHITE = tuple(character for character in map(chr, range(0x3001)) if character.isspace())
_BLANKS = ("Strip", "Whitespace", "WhitespaceSplit")
# By how much a normalizer can shorten a text that is not ASCII, in bytes. Composition joins 3 jamo into one syllable,
# 9 bytes into 3; canonical equivalents are up to 3 times shorter (the Kelvin sign), compatible ones 4 times
# (mathematical letters). ASCII keeps its length.
_SHRINK = {"NFD": 3, "NFC": 9, "NFKD": 4, "NFKC": 12, "Lowercase": 3}


@dataclass(frozen=True, slots=True)
class TokenCountBound:
    """`longest`: the most bytes that one token stands for; 0 if not bounded. `shrink`: the most bytes of non-ASCII text
    per byte of its normalized form. `blanks`: white space may be removed."""

    longest: int
    shrink: int = 1
    blanks: bool = False

    def least_tokens(self, text: str) -> int:
        """A lower bound of the number of tokens of `text`; 0 if none is known."""
        if not self.longest:
            return 0
        plain = text.isascii()
        size = len(text) if plain else len(text.encode("utf-8", "replace"))
        lost = (MARK, *_WHITE) if self.blanks else (MARK,)
        size -= sum(text.count(character) * len(character.encode()) for character in lost)
        return -(-size // (self.longest * (1 if plain else self.shrink)))


NO_BOUND = TokenCountBound(0)


def bound_of(data: Mapping[str, Any]) -> TokenCountBound:
    """The bound that holds for a tokenizer.json."""
    steps = [*_flat(data.get("normalizer")), *_flat(data.get("pre_tokenizer"))]
    added, model = data.get("added_tokens") or [], data["model"]
    byte_level = any(step["type"] == "ByteLevel" for step in steps)
    if not (all(map(_bounded, steps)) and _covers_all(model, byte_level)):
        return NO_BOUND
    shrink = 1
    for step in steps:
        shrink *= _SHRINK.get(step["type"], 1)
    tokens = _tokens(model)
    longest = max((len(token) if byte_level else len(token.encode()) for token in tokens), default=0)
    longest = max([longest, *(len(token["content"].encode()) for token in added)])
    stripped = any(token.get("lstrip") or token.get("rstrip") for token in added)
    blanks = stripped or any(step["type"] in _BLANKS for step in steps)
    return TokenCountBound(longest, shrink, blanks)


def _flat(part: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    """The single steps of a normalizer or pre-tokenizer."""
    if part is None:
        return
    if part["type"] != "Sequence":
        yield part
        return
    for inner in part.get("normalizers") or part.get("pretokenizers") or ():
        yield from _flat(inner)


def _bounded(step: Mapping[str, Any]) -> bool:
    """Whether a step loses nothing but white space, or shortens a text by a known factor."""
    kind = step["type"]
    if kind == "Replace":
        pattern = step["pattern"].get("String")
        return pattern is not None and len(step["content"].encode()) >= len(pattern.encode())
    if kind in ("Split", "Punctuation"):
        return step.get("behavior") != "Removed"
    return kind in _LOSSLESS or kind in _BLANKS or kind in _SHRINK


def _covers_all(model: Mapping[str, Any], byte_level: bool) -> bool:
    """Whether every byte is a token of its own. Otherwise many unknown characters may be one token, or none."""
    parts = ("continuing_subword_prefix", "end_of_word_suffix")
    if model.get("type") not in ("BPE", "Unigram") or any(model.get(part) for part in parts):
        return False
    known = set(_tokens(model))
    if byte_level:
        return known.issuperset(byte_alphabet())
    if not model.get("byte_fallback"):
        return False
    return known.issuperset(f"<0x{byte:02X}>" for byte in range(256))


def _tokens(model: Mapping[str, Any]) -> list[str]:
    vocab = model["vocab"]
    return list(vocab) if isinstance(vocab, dict) else [entry[0] for entry in vocab]
