"""Text to ids and back, over `tokenizer.json` and the `tokenizers` library. Torch-free: the HTTP process uses it.

Special-token strings that a user typed are ordinary text, in prompts and inside chat messages (`mark_specials`).
It does not know templates, requests or stop strings.
"""

import json
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend
from tokenizers.decoders import DecodeStream

from model.errors import CheckpointError

_MARK = "\ufdd0"  # a Unicode non-character: never part of valid text


def mark_specials(text: str, specials: Sequence[str]) -> str:
    """Break every special-token string in a user's text, so that `Tokenizer.encode_chat` takes it for plain text."""
    for special in specials:
        text = text.replace(special, special[0] + _MARK + special[1:])
    return text


def byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte, inverted."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(others)}


class IncrementalDecoder:
    """Text of one growing id sequence; a character comes out only once all its bytes are there."""

    def __init__(self, backend: Backend) -> None:
        self._backend, self._stream = backend, DecodeStream(skip_special_tokens=True)
        self._held: list[int] = []

    def push(self, id: int) -> str:
        """The text that this id completes, "" if none."""
        self._held.append(id)
        text: str | None = self._stream.step(self._backend, id)
        if text is None:
            return ""
        self._held.clear()
        return text

    def flush(self) -> str:
        """What a sequence that ends in the middle of a character still shows: replacement characters."""
        text: str = self._backend.decode(self._held, skip_special_tokens=True)
        self._held.clear()
        return text


class Tokenizer:
    """One checkpoint's tokenizer. `eos_ids` end a generation."""

    def __init__(self, backend: Backend, plain: Backend, eos_ids: tuple[int, ...]) -> None:
        self._backend, self._plain, self.eos_ids = backend, plain, eos_ids
        self._plain.encode_special_tokens = True

    @classmethod
    def load(cls, folder: Path) -> "Tokenizer":
        """Read `tokenizer.json` and the end-of-sequence ids.

        Raises:
            CheckpointError: the file is missing or damaged.
        """
        path = folder / "tokenizer.json"
        if not path.exists():
            raise CheckpointError(f"{path} does not exist")
        try:
            return cls(Backend.from_file(str(path)), Backend.from_file(str(path)), read_eos_ids(folder))
        except Exception as error:  # the library raises bare Exception
            raise CheckpointError(f"{path} cannot be read: {error}") from None

    @property
    def vocabulary(self) -> int:
        """Ids in use, added tokens included."""
        return int(self._backend.get_vocab_size())

    @cached_property
    def specials(self) -> tuple[str, ...]:
        """The special-token strings, longest first."""
        added = self._backend.get_added_tokens_decoder().values()
        return tuple(sorted((token.content for token in added if token.special), key=len, reverse=True))

    def encode(self, text: str) -> list[int]:
        """Ids of a prompt, with what the checkpoint puts before it; special-token strings are plain text."""
        return list(self._plain.encode(text).ids)

    def encode_chat(self, text: str) -> list[int]:
        """Ids of a rendered template: its special tokens are special, those marked in user text are plain."""
        if not self.specials:
            return list(self._plain.encode(text, add_special_tokens=False).ids)
        marked = "|".join(re.escape(s[0] + _MARK + s[1:]) for s in self.specials)
        ids: list[int] = []
        for part in re.split(f"({marked})", text):
            if _MARK in part and re.fullmatch(marked, part):
                ids += self._plain.encode(part.replace(_MARK, ""), add_special_tokens=False).ids
            elif part:
                ids += self._backend.encode(part, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text without special tokens; incomplete bytes become U+FFFD."""
        return str(self._backend.decode(list(ids), skip_special_tokens=True))

    def stream(self) -> IncrementalDecoder:
        """A decoder for one growing sequence."""
        return IncrementalDecoder(self._backend)

    def token_bytes(self, id: int) -> bytes:
        """The bytes one id stands for; empty for an id that the tokenizer does not use."""
        token = self._backend.id_to_token(id)
        if token is None:
            return b""
        if token in self.specials:
            return token.encode()
        if self._byte_level:
            return b"".join(_byte(c) for c in token)
        if re.fullmatch(r"<0x[0-9A-F]{2}>", token):
            return bytes([int(token[3:5], 16)])
        return token.replace("\u2581", " ").encode()

    @cached_property
    def _byte_level(self) -> bool:
        decoder = json.dumps(json.loads(self._backend.to_str()).get("decoder"))
        return '"ByteLevel"' in decoder


_ALPHABET = byte_alphabet()


def _byte(character: str) -> bytes:
    return bytes([_ALPHABET[character]]) if character in _ALPHABET else character.encode()


def read_eos_ids(folder: Path) -> tuple[int, ...]:
    """`eos_token_id` of generation_config.json, else of config.json: one id, several, or none."""
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        value: Any = json.loads(path.read_text()).get("eos_token_id") if path.exists() else None
        if value is not None:
            return tuple(value) if isinstance(value, list) else (int(value),)
    return ()
