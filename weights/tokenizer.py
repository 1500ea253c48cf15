"""The tokenizer: a `tokenizer.json` and the `tokenizers` library. Torch-free, since the HTTP process uses it.

Special-token strings that a user typed are ordinary text, in prompts and in messages (`weights/special_tokens.py`).
It does not know templates, requests or stop strings.
"""

import json
import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tokenizers import Tokenizer as Backend
from tokenizers.processors import TemplateProcessing

from model.errors import CheckpointError, InvalidRequest
from weights.generation import read_eos_ids
from weights.small_files import TOKENIZER, TOKENIZER_CONFIG, small_files
from weights.special_tokens import MARK, escape_specials
from weights.token_bytes import IncrementalDecoder, TokenBytes
from weights.token_count_bound import NO_BOUND, TokenCountBound, bound_of

# The library's thread pool has one thread per core, so that a short text would wait there behind long ones. Without it
# a text is encoded on the calling thread.
os.environ["TOKENIZERS_PARALLELISM"] = "false"

NAMED = ("bos_token", "eos_token", "pad_token", "unk_token")


PROBED = 1 << 18  # so many characters of a long text are encoded first, to refuse one with too many tokens


class TooManyTokens(InvalidRequest):
    """A text has `count` tokens (not `exact`: at least so many), more than the caller allows."""

    def __init__(self, count: int, most: int, exact: bool = True) -> None:
        how_many = f"{'' if exact else 'at least '}{count}"
        super().__init__(f"a text of {how_many} tokens; at most {most} are taken", "prompt", "context_length_exceeded")
        self.count, self.exact = count, exact


class Tokenizer:
    """One checkpoint's tokenizer. `eos_ids` end a generation; `named` are the special tokens by their part.

    `backend` is the checkpoint's own; in `typed`, marks vanish from a text after special tokens have been looked for.
    """

    def __init__(
        self,
        backend: Backend,
        typed: Backend,
        eos_ids: tuple[int, ...],
        named: Mapping[str, str] = MappingProxyType({}),
        bound: TokenCountBound = NO_BOUND,
    ) -> None:
        self._backend, self._typed = backend, typed
        self._token_bytes = TokenBytes(backend)
        self._bound = bound
        self.eos_ids, self.named = eos_ids, named

    @classmethod
    def load(cls, model: Path, generation_config: bool = True, tokenizer: Path | None = None) -> "Tokenizer":
        """Read `tokenizer.json`, what tokenizer_config.json adds to it, and the end-of-sequence ids.

        Args:
            tokenizer: a folder whose tokenizer is read instead of the model's own.

        Raises:
            CheckpointError: a file is missing or damaged.
        """
        files = small_files(model, tokenizer)
        raw, config = files.text(TOKENIZER), files.optional(TOKENIZER_CONFIG)
        try:
            data = json.loads(raw)
            bound = bound_of(data)
            backend = _ready(Backend.from_str(raw), config)
            typed = _ready(Backend.from_str(_with_escapes_removed(data)), config)
            for made in (backend, typed):
                made.decode(made.encode("a").ids)
        except (CheckpointError, KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # the library raises bare Exception, and its panics are not even that
            raise CheckpointError(f"{tokenizer or model}: {TOKENIZER} cannot be read: {error}") from None
        own = backend.token_to_id(token_text(config.get("eos_token")) or "")
        ends = (*read_eos_ids(files, generation_config), *([] if own is None else [own]))
        named = {name: text for name in NAMED if (text := token_text(config.get(name))) is not None}
        if ends and (text := backend.id_to_token(ends[0])) is not None:
            named.setdefault("eos_token", text)
        return cls(backend, typed, tuple(dict.fromkeys(ends)), named, bound)

    def check_ids(self, embedded: int) -> tuple[str, ...]:
        """The special tokens beyond an embedding of so many ids: padding as a rule, which no text becomes.

        Raises:
            CheckpointError: other ids lie beyond it, which texts become, or an end that can never come.
        """
        if wrong := [id for id in self.eos_ids if not 0 <= id < embedded]:
            raise CheckpointError(f"eos_token_id {wrong[0]} is not an id of the model, which has 0 to {embedded - 1}")
        known = self._backend.get_vocab()
        beyond = {text: id for text, id in known.items() if id >= embedded}
        texts = [text for text in beyond if text not in self.specials]
        frame = self.encode("")
        if texts or max(frame, default=0) >= embedded:
            last = max([*beyond.values(), *frame])
            raise CheckpointError(f"tokenizer.json has ids up to {last}, but the model's vocab_size is {embedded}")
        return tuple(beyond)

    @property
    def vocabulary(self) -> int:
        """Ids in use, added tokens included."""
        return int(self._backend.get_vocab_size())

    @cached_property
    def specials(self) -> Mapping[str, int]:
        """The special-token strings and their ids."""
        return self._added(special=True)

    @cached_property
    def added(self) -> Mapping[str, int]:
        """The added tokens that are text all the same, as Qwen's `<think>`."""
        return self._added(special=False)

    def _added(self, special: bool) -> Mapping[str, int]:
        added = self._backend.get_added_tokens_decoder().items()
        return {token.content: id for id, token in added if token.special == special}

    def least_tokens(self, text: str) -> int:
        """A lower bound of the number of tokens of `text`, found at memory speed; 0 if none is known."""
        return self._bound.least_tokens(text)

    def encode(self, text: str, framed: bool = True, most: int | None = None) -> list[int]:
        """Ids of a prompt, `framed` by what the checkpoint puts around it; special-token strings are plain text.

        Raises:
            TooManyTokens: more than `most`.
        """
        marked = escape_specials(text, tuple(self.specials))
        return _ids(self._backend if marked == text else self._typed, marked, framed, most)

    def encode_chat(self, text: str, framed: bool = False, most: int | None = None) -> list[int]:
        """Ids of a rendered template: its special tokens are special, those marked in user text are plain. Templates
        write what goes around a prompt themselves; `framed` adds it all the same.

        Raises:
            TooManyTokens: more than `most`.
        """
        return _ids(self._typed if MARK in text else self._backend, text, framed, most)

    def decode(self, ids: Sequence[int], specials: bool = False) -> str:
        """Text without special tokens, unless `specials`; incomplete bytes become U+FFFD. (The library's `decode` keeps
        the interpreter's lock to its end; in a batch it lets go.)"""
        return str(self._backend.decode_batch([list(ids)], skip_special_tokens=not specials)[0])

    def stream(self, shown: Sequence[str] = (), continues: bool = False) -> IncrementalDecoder:
        """A decoder for one growing sequence; of special tokens it shows those named. A text that `continues` another
        keeps the space that some decoders take from the first token."""
        known = {self.specials[text]: text for text in shown if text in self.specials}
        return IncrementalDecoder(self._token_bytes, known, continues)

    def token_bytes(self, id: int) -> bytes:
        """The bytes one id stands for; empty for an id that the tokenizer does not use."""
        token = self._backend.id_to_token(id)
        if token is None or self._token_bytes.shows(id):
            return self._token_bytes.later(id)
        return str(token).encode()


def _ids(backend: Backend, text: str, framed: bool, most: int | None) -> list[int]:
    """Encode as a batch of one: then the library releases the interpreter's lock, and needs half the time without
    offsets."""
    if most is not None:
        _check_beginning(backend, text, most)
    encoding = backend.encode_batch_fast([text], add_special_tokens=framed)[0]
    if most is not None and len(encoding) > most:
        raise TooManyTokens(len(encoding), most)
    return list(encoding.ids)


def _check_beginning(backend: Backend, text: str, most: int) -> None:
    """Raise TooManyTokens where the beginning of a long text has too many, so that what encoding takes (200 bytes and
    half a microsecond per character) is bounded by `most`, not by the text. A cut may change some tokens before it."""
    length = max(PROBED, 4 * most)
    while 2 * length <= len(text):
        if len(backend.encode_batch_fast([text[:length]], add_special_tokens=False)[0]) > most + most // 8:
            raise TooManyTokens(most + 1, most, exact=False)
        length *= 2


def token_text(value: Any) -> str | None:
    """A token of tokenizer_config.json: its text, or an object that holds it."""
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else None


def _ready(backend: Backend, config: dict[str, Any]) -> Backend:
    """Without the cutting and padding that training may have left in the file, and framed as the config says."""
    backend.no_truncation()
    backend.no_padding()
    if "add_bos_token" in config or "add_eos_token" in config:
        names = [name for name in ("bos_token", "eos_token") if config.get(f"add_{name}")]
        around = {name: token for name in names if (token := token_text(config.get(name))) is not None}
        known = {token: id for token in around.values() if (id := backend.token_to_id(token)) is not None}
        frame = [around.get("bos_token"), "$A", around.get("eos_token")]
        single = [piece for piece in frame if piece == "$A" or piece in known]
        backend.post_processor = TemplateProcessing(single=single, special_tokens=list(known.items()))
    return backend


def _only_blanks_normalized(token: dict[str, Any]) -> dict[str, Any]:
    return token | {"normalized": token["normalized"] and token["content"].isspace()}


def _with_escapes_removed(data: dict[str, Any]) -> str:
    """A tokenizer.json that removes the marks of escaped strings after it has looked for added tokens.

    The library looks for added tokens before it normalizes a text and, for some of them, after. By then the marks are
    gone, so here all added tokens are looked for before.
    """
    steps = [{"type": "Replace", "pattern": {"String": MARK}, "content": ""}, data.get("normalizer")]
    normalizer = {"type": "Sequence", "normalizers": [step for step in steps if step]}
    added = [_only_blanks_normalized(token) for token in data["added_tokens"]]
    return json.dumps(data | {"normalizer": normalizer, "added_tokens": added})
