"""The bytes of each token id, and incremental decoding of a growing sequence. It encodes nothing.

The `tokenizers` library decodes whole sequences; its own stream stalls, fails, or takes quadratic time if a model
writes invalid UTF-8. Here an invalid byte becomes U+FFFD without effect on its neighbours.
"""

import codecs
import re
from collections.abc import Mapping
from types import MappingProxyType

from tokenizers import Tokenizer as Backend

_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_BEFORE = "x"  # any text: some decoders treat the first token differently, so ids are decoded after this one


def byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte, inverted."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    itself = {chr(byte): byte for byte in printable}
    return itself | {chr(256 + number): byte for number, byte in enumerate(others)}


_ALPHABET = byte_alphabet()


class TokenBytes:
    """The bytes of one tokenizer's ids; none for special tokens."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        decoder = backend.decoder
        kinds = decoder.__getstate__() if decoder is not None else b""
        self._byte_level, self._byte_fallback = b'"ByteLevel"' in kinds, b'"ByteFallback"' in kinds
        added = backend.get_added_tokens_decoder()
        self._hidden = {id for id, token in added.items() if token.special}
        self._later: dict[int, bytes] = {}
        self._whole: dict[int, str | None] = {}

    def shows(self, id: int) -> bool:
        """Whether this id is text at all: neither special nor unused."""
        return id not in self._hidden and self._backend.id_to_token(id) is not None

    def first(self, id: int) -> bytes:
        """The bytes of an id at the start of a text, where some decoders remove a space."""
        return self._piece(id, "")

    def later(self, id: int) -> bytes:
        """The bytes of an id after others."""
        if id not in self._later:
            self._later[id] = self._piece(id, _BEFORE)
        return self._later[id]

    def whole(self, id: int) -> str | None:
        """The text of an id after others; None if its bytes are not whole characters."""
        if id not in self._whole:
            try:
                self._whole[id] = self.later(id).decode()
            except UnicodeDecodeError:
                self._whole[id] = None
        return self._whole[id]

    def _piece(self, id: int, before: str) -> bytes:
        token = self._backend.id_to_token(id)
        if token is None or not self.shows(id):
            return b""
        if self._byte_level:
            known = all(character in _ALPHABET for character in token)
            return bytes(_ALPHABET[character] for character in token) if known else token.encode()
        tokens = [before, token] if before else [token]
        text = self._decode(tokens)[len(before) :]
        if self._byte_fallback and _BYTE.fullmatch(token):
            return bytes([int(token[3:5], 16)]) if text else b""
        return text.encode()

    def _decode(self, tokens: list[str]) -> str:
        decoder = self._backend.decoder
        return " ".join(tokens) if decoder is None else str(decoder.decode(tokens))


class IncrementalDecoder:
    """Text of one growing id sequence; a character comes out only once all its bytes are there."""

    def __init__(
        self, token_bytes: TokenBytes, shown: Mapping[int, str] = MappingProxyType({}), begun: bool = False
    ) -> None:
        self._token_bytes, self._shown, self._begun = token_bytes, shown, begun
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, id: int) -> str:
        """The text that this id completes, "" if none."""
        if id in self._shown:
            return self._utf8.decode(self._shown[id].encode())
        if not self._begun:
            self._begun = self._token_bytes.shows(id)
            return self._utf8.decode(self._token_bytes.first(id))
        text = self._token_bytes.whole(id)
        if text is None or self._utf8.getstate()[0]:  # it ends or goes on with a character that is split
            return self._utf8.decode(self._token_bytes.later(id))
        return text

    def flush(self) -> str:
        """The rest at the end of a sequence: a replacement character if a character is incomplete."""
        return self._utf8.decode(b"", final=True)
