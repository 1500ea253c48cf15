"""The vocabulary in a GGUF file's metadata: tokens, their types and the ids with a meaning, every one checked.

Torch-free. It makes no tokenizer (see `weights/gguf/tokenizer.py`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from typing import Any, NoReturn

from model.errors import CheckpointError, shown

PREFIX = "tokenizer.ggml."
MAX_TOKENS, MAX_MERGES = 1 << 20, 1 << 21
MAX_TOKEN = 4096  # characters
WAY_OUT = "--tokenizer DIR takes the tokenizer of a folder with a tokenizer.json instead"

# Tokens that end an answer in one family or another. Files name one or two of their own.
ENDS = {
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<end_of_turn>",
    "<EOT>",
    "[EOT]",
    "[EOS]",
    "[e~[",
    "</s>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
}
HARMONY, PART_END = {"<|return|>", "<|call|>"}, "<|end|>"  # where those are, this one ends a part of an answer
SENTENCEPIECE = {"unknown_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


class TokenType(IntEnum):
    """What `tokenizer.ggml.token_type` says of a token."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


def refuse(message: str) -> NoReturn:
    raise CheckpointError(f"{message}; {WAY_OUT}")


@dataclass(frozen=True)
class Vocabulary:
    """Tokens by their ids, and the type of each."""

    metadata: Mapping[str, Any]
    tokens: list[str]
    types: list[int]

    @classmethod
    def read(cls, metadata: Mapping[str, Any]) -> "Vocabulary":
        """The vocabulary.

        Raises:
            CheckpointError: there is none, or it is damaged.
        """
        tokens = items(metadata, "tokens", str, MAX_TOKENS)
        types = items(metadata, "token_type", int, MAX_TOKENS)
        if not tokens or len(types) != len(tokens):
            refuse(f"{PREFIX}tokens has {len(tokens)} tokens and {PREFIX}token_type {len(types)} types")
        if wrong := set(types) - set(TokenType):
            refuse(f"{PREFIX}token_type has the type {min(wrong)}; known are {min(TokenType)} to {max(TokenType)}")
        seen: dict[str, int] = {}
        for id, token in enumerate(tokens):
            if types[id] == TokenType.UNUSED:
                continue
            if not 0 < len(token) <= MAX_TOKEN:
                refuse(f"token {id} has {len(token)} characters; 1 to {MAX_TOKEN} are supported")
            if seen.setdefault(token, id) != id:
                refuse(f"token {shown(token)} has the ids {seen[token]} and {id}")
        return cls(metadata, tokens, types)

    @cached_property
    def ids(self) -> dict[str, int]:
        """Ids by token, of all that are used."""
        return {token: id for id, token in enumerate(self.tokens) if self.types[id] != TokenType.UNUSED}

    def of_types(self, *types: TokenType) -> list[int]:
        """The ids of tokens of these types."""
        return [id for id, type in enumerate(self.types) if type in types]

    @cached_property
    def specials(self) -> list[int]:
        """The ids of tokens that are no text."""
        return self.of_types(TokenType.CONTROL, TokenType.UNKNOWN)

    def id_of(self, name: str) -> int | None:
        """The id in the key `name`, None if there is none. SentencePiece has ids of its own where keys are missing.

        Raises:
            CheckpointError: it is no id of a token.
        """
        id = self.metadata.get(PREFIX + name)
        if id is None and self.metadata.get(f"{PREFIX}model") == "llama":
            id = next((own for own in self.specials if own == SENTENCEPIECE.get(name)), None)
        if id is not None and not (type(id) is int and 0 <= id < len(self.tokens)):
            refuse(f"{PREFIX}{name} is {shown(id)}; ids are 0 to {len(self.tokens) - 1}")
        return id

    def token(self, name: str) -> str | None:
        """The token whose id is in the key `name`, None if there is none."""
        id = self.id_of(name)
        return None if id is None else self.tokens[id]

    @property
    def end_ids(self) -> list[int]:
        """The ids that end an answer: those that the file names, then those whose tokens do so in their families."""
        named = [self.id_of(f"{name}_token_id") for name in ("eos", "eot", "eom")]
        parts = {PART_END} if self.ids.keys() >= HARMONY else set()
        known = [id for id in self.specials if self.tokens[id] in ENDS - parts]
        return list(dict.fromkeys([*(id for id in named if id is not None), *known]))


def items(metadata: Mapping[str, Any], name: str, kind: type, most: int) -> list[Any]:
    """An array of values of one type.

    Raises:
        CheckpointError: it is missing, or something else.
    """
    value = metadata.get(PREFIX + name)
    if not isinstance(value, list) or not all(type(item) is kind for item in value):
        refuse(f"{PREFIX}{name} is {shown(value)}, no array of {kind.__name__}")
    if len(value) > most:
        refuse(f"{PREFIX}{name} has {len(value)} items; at most {most} are supported")
    return value


def flag(metadata: Mapping[str, Any], name: str, default: bool) -> bool:
    """A bool.

    Raises:
        CheckpointError: it is something else.
    """
    value = metadata.get(PREFIX + name, default)
    if not isinstance(value, bool):
        refuse(f"{PREFIX}{name} is {shown(value)}, neither true nor false")
    return value


def text(metadata: Mapping[str, Any], name: str) -> str:
    """A text.

    Raises:
        CheckpointError: it is missing, or something else.
    """
    value = metadata.get(PREFIX + name)
    if not isinstance(value, str):
        refuse(f"{PREFIX}{name} is {shown(value)}, no text")
    return value
