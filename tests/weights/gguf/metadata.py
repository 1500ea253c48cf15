"""GGUF metadata made of a tokenizer.json, as llama.cpp's converter makes it: without merges for SentencePiece."""

from collections.abc import Mapping
from typing import Any

from weights.gguf.vocabulary import TokenType
from weights.tokenizer import token_text

PIECES = 259  # SentencePiece has special and byte tokens first, then pieces, the best first
NAMED = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}


def looks_special(token: str) -> bool:
    """What the converter takes for a control token, whatever tokenizer.json says."""
    return token in ("<pad>", "<mask>") or (token.startswith(("<|", "<｜")) and token.endswith(("|>", "｜>")))


def metadata_of(data: Mapping[str, Any], config: Mapping[str, Any], pre: str = "", size: int = 0) -> dict[str, Any]:
    """The `tokenizer.*` keys for a tokenizer.json and a tokenizer_config.json. `pre` is "" for SentencePiece; `size`
    is the model's vocabulary, if that is larger."""
    model, added = data["model"], {token["id"]: token for token in data["added_tokens"]}
    by_id = {id: token for token, id in model["vocab"].items()} | {id: token["content"] for id, token in added.items()}
    tokens = [by_id.get(id, f"[PAD{id}]") for id in range(max(size, max(by_id) + 1))]
    types = [int(_type(id, token, by_id, added, model)) for id, token in enumerate(tokens)]
    found: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2" if pre else "llama",
        "tokenizer.ggml.pre": pre or "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
    }
    if pre:
        pairs = (merge if isinstance(merge, list) else merge.split(" ") for merge in model["merges"])
        found["tokenizer.ggml.merges"] = [" ".join(pair) for pair in pairs]
    else:
        found["tokenizer.ggml.scores"] = [_score(id, token) for id, token in enumerate(tokens)]
    ids = {token: id for id, token in enumerate(tokens)}
    for name, key in NAMED.items():
        token = token_text(config.get(f"{name}_token"))
        if token in ids:
            found[f"tokenizer.ggml.{key}_token_id"] = ids[token]
    flags = ("add_bos_token", "add_eos_token", "add_space_prefix")
    found |= {f"tokenizer.ggml.{flag}": config[flag] for flag in flags if isinstance(config.get(flag), bool)}
    template = config.get("chat_template")
    return found | ({"tokenizer.chat_template": template} if isinstance(template, str) else {})


def _score(id: int, token: str) -> float:
    """SentencePiece keeps the runs of blanks for last."""
    return -1e9 if set(token) == {"\u2581"} else float(min(0, PIECES - id))


def _type(id: int, token: str, by_id: Mapping[int, str], added: Mapping[int, Any], model: Mapping[str, Any]) -> int:
    if id not in by_id:
        return TokenType.UNUSED
    if token == model.get("unk_token"):
        return TokenType.UNKNOWN
    if id in added:
        special = added[id]["special"] or looks_special(token)
        return TokenType.CONTROL if special else TokenType.USER_DEFINED
    return TokenType.BYTE if model.get("byte_fallback") and token.startswith("<0x") else TokenType.NORMAL
