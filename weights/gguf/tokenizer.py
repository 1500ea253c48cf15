"""The tokenizer in a GGUF file's metadata, as a folder would have it: tokenizer.json and the files that go with it.

A byte-level BPE needs its pre-tokenizer by name (`weights/gguf/pre_tokenizers.py`); a SentencePiece vocabulary has
scores, from which its merges follow. Torch-free. It encodes nothing and opens no file.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from model.errors import CheckpointError, shown
from weights.gguf.pre_tokenizers import PRE_TOKENIZERS, PreTokenizer
from weights.gguf.vocabulary import MAX_MERGES, MAX_TOKENS, PREFIX, TokenType, Vocabulary, flag, items, refuse, text

SPACE = "\u2581"  # SentencePiece's
MAX_CUT = 1 << 26  # characters of all ways to cut a token in two, of all tokens
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
TEMPLATE = "tokenizer.chat_template"
NAMED = {
    "bos": "bos",
    "eos": "eos",
    "unknown": "unk",
    "padding": "pad",
    "seperator": "sep",
    "mask": "mask",
    "cls": "cls",
}
SAMPLING = {
    "temp": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
}
# Of these architectures' tokenizers, special tokens take the white space behind them, but for the named ones.
TAKES_SPACE = {"phi3": ("<s>", "<unk>", "<|endoftext|>"), "phimoe": ("<s>", "<unk>", "<|endoftext|>")}


def tokenizer_json(vocabulary: Vocabulary) -> dict[str, Any]:
    """A tokenizer.json.

    Raises:
        CheckpointError: the metadata is damaged, or of a tokenizer that is not known.
    """
    kind = text(vocabulary.metadata, "model")
    if kind == "gpt2":
        parts = _byte_level(vocabulary)
    elif kind == "llama":
        parts = _sentencepiece(vocabulary)
    else:
        refuse(f"{PREFIX}model is {shown(kind)}; known are gpt2 and llama")
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added_tokens(vocabulary), **parts}


def tokenizer_config(vocabulary: Vocabulary) -> dict[str, Any]:
    """A tokenizer_config.json: the named special tokens, what goes around a text, and the chat templates.

    Raises:
        CheckpointError: the metadata is damaged.
    """
    metadata = vocabulary.metadata
    config: dict[str, Any] = {
        f"{named}_token": token
        for key, named in NAMED.items()
        if (token := vocabulary.token(f"{key}_token_id")) is not None
    }
    adds_bos = text(metadata, "model") == "llama" or _pre_tokenizer(metadata, PreTokenizer()).adds_bos
    for name, default in (("bos", adds_bos), ("eos", False)):
        config[f"add_{name}_token"] = adds = flag(metadata, f"add_{name}_token", default)
        if adds and f"{name}_token" not in config and f"{PREFIX}add_{name}_token" in metadata:
            refuse(f"{PREFIX}add_{name}_token is true, but there is no {PREFIX}{name}_token_id")
    return config | _templates(metadata)


def generation_config(vocabulary: Vocabulary) -> dict[str, Any]:
    """A generation_config.json: the ids that end an answer, and the sampling defaults.

    Raises:
        CheckpointError: the metadata is damaged.
    """
    config: dict[str, Any] = {"eos_token_id": vocabulary.end_ids}
    for key, name in SAMPLING.items():
        if (value := vocabulary.metadata.get(f"general.sampling.{key}")) is not None:
            config[name] = float(f"{value:.7g}") if isinstance(value, float) else value  # as written before float32
    return config


def _templates(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The chat template, or several by name, as tokenizer_config.json has them."""
    found = {"default": metadata[TEMPLATE]} if TEMPLATE in metadata else {}
    found |= {
        key.removeprefix(f"{TEMPLATE}."): value for key, value in metadata.items() if key.startswith(f"{TEMPLATE}.")
    }
    for name, source in found.items():
        if not isinstance(source, str):
            raise CheckpointError(f"{TEMPLATE} ({shown(name)}) is {shown(source)}, no text")
    return {"chat_template": [{"name": name, "template": source} for name, source in found.items()]} if found else {}


def added_tokens(vocabulary: Vocabulary) -> list[dict[str, Any]]:
    """The `added_tokens` of a tokenizer.json: found in a text as they are written, before anything is done to it."""
    strict = TAKES_SPACE.get(str(vocabulary.metadata.get("general.architecture")))
    added = []
    for id in sorted([*vocabulary.specials, *vocabulary.of_types(TokenType.USER_DEFINED)]):
        token, special = vocabulary.tokens[id], vocabulary.types[id] != TokenType.USER_DEFINED
        takes_space = strict is not None and special and token not in strict
        added.append(
            {
                "id": id,
                "content": token,
                "single_word": False,
                "lstrip": False,
                "rstrip": takes_space,
                "normalized": False,
                "special": special,
            }
        )
    return added


def _byte_level(vocabulary: Vocabulary) -> dict[str, Any]:
    """What a tokenizer.json says of a byte-level BPE."""
    pre = _pre_tokenizer(vocabulary.metadata)
    return {
        "normalizer": pre.normalizer,
        "pre_tokenizer": pre.pre_tokenizer,
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        "model": _bpe(vocabulary, _merges(vocabulary), ignore_merges=pre.whole_words),
    }


def _pre_tokenizer(metadata: Mapping[str, Any], default: PreTokenizer | None = None) -> PreTokenizer:
    name = text(metadata, "pre")
    found = PRE_TOKENIZERS.get(name, default)
    if found is None:
        refuse(f"{PREFIX}pre is {shown(name)}, which is not known; known are {', '.join(PRE_TOKENIZERS)}")
    return found


def _sentencepiece(vocabulary: Vocabulary) -> dict[str, Any]:
    """What a tokenizer.json says of a SentencePiece BPE: spaces are characters, unknown characters become bytes."""
    if missing := [byte for byte in BYTES if byte not in vocabulary.ids]:
        refuse(f"{PREFIX}tokens has no token {missing[0]}, and every byte needs one")
    prefix = flag(vocabulary.metadata, "add_space_prefix", True)
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    first = [{"type": "Prepend", "prepend": SPACE}] if prefix else []
    decoder = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        *([{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []),
    ]
    given = f"{PREFIX}merges" in vocabulary.metadata
    merges = _merges(vocabulary) if given else _merges_by_score(vocabulary)
    unknown = next((vocabulary.tokens[id] for id in vocabulary.of_types(TokenType.UNKNOWN)), None)
    return {
        "normalizer": {"type": "Sequence", "normalizers": [*first, spaces]},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": decoder},
        "model": _bpe(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True),
    }


def _bpe(vocabulary: Vocabulary, merges: Iterable[tuple[str, str]], **changed: Any) -> dict[str, Any]:
    plain = {"unk_token": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False}
    fixed = {"type": "BPE", "dropout": None, "continuing_subword_prefix": None, "end_of_word_suffix": None}
    return fixed | plain | changed | {"vocab": vocabulary.ids, "merges": list(merges)}


def _merges(vocabulary: Vocabulary) -> list[tuple[str, str]]:
    """The merges that the file has.

    Raises:
        CheckpointError: one is not of two tokens that make a third.
    """
    known, found = vocabulary.ids, []
    for number, merge in enumerate(items(vocabulary.metadata, "merges", str, MAX_MERGES)):
        left, _, right = merge.partition(" ")
        if not (left in known and right in known and left + right in known):
            refuse(f"{PREFIX}merges: item {number}, {shown(merge)}, is not of two tokens that make a third")
        found.append((left, right))
    return found


def _merges_by_score(vocabulary: Vocabulary) -> list[tuple[str, str]]:
    """The merges of a SentencePiece vocabulary: every way to make a token of two others, the best tokens first.

    Raises:
        CheckpointError: the scores do not say which tokens are better.
    """
    scores = items(vocabulary.metadata, "scores", float, MAX_TOKENS)
    if len(scores) != len(vocabulary.tokens):
        refuse(f"{PREFIX}tokens has {len(vocabulary.tokens)} tokens and {PREFIX}scores {len(scores)} scores")
    pieces = {vocabulary.tokens[id]: id for id in vocabulary.of_types(TokenType.NORMAL)}
    if (cut := sum(len(piece) ** 2 for piece in pieces)) > MAX_CUT:
        refuse(
            f"{PREFIX}tokens: all ways to cut a token in two have {cut} characters; at most {MAX_CUT} are supported"
            " where merges follow from scores"
        )
    if any(score != score for score in scores):
        refuse(f"{PREFIX}scores has one that is not a number")
    ways = [
        (-scores[id], id, pieces[left], pieces[right], left, right)
        for piece, id in pieces.items()
        for left, right in ((piece[:cut], piece[cut:]) for cut in range(1, len(piece)))
        if left in pieces and right in pieces
    ]
    if len(ways) > 1 and len({score for score, *_ in ways}) == 1:
        refuse(f"{PREFIX}scores are all the same for tokens that are made of others, so no merges follow from them")
    return [(left, right) for *_, left, right in sorted(ways)]
