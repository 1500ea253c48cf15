"""The teacher as an ordinary dense checkpoint: its weights in the project's decoder, its tokens as a `tokenizer.json`.

It reads llama2.c's format (`training/synthesise.py` reads the tensors, `training/teacher_vocabulary.py` the tokens) and
keeps only the tokens that given stories use. It trains nothing.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
from torch import Tensor

from model.decoder import Decoder
from training.corpus import END
from training.synthesise import ModelShape, halves_first, read_tensors
from training.teacher_vocabulary import BOS, encode_word, read_tokens, used_vocabulary
from weights.config import decoder_config

BYTES = range(3, 259)  # the ids of single bytes, with which any text can be written
SPACE = "▁"  # how sentencepiece writes a space


def read_teacher(path: Path, text: str) -> tuple[Decoder, dict[str, Any], Tokenizer]:
    """The dense decoder over the tokens that `text` needs, its config.json, and its tokenizer."""
    blob = path.read_bytes()
    shape, tensors, offset = read_tensors(blob)
    pieces, scores = read_tokens(blob, offset, shape.vocabulary)
    kept_V = kept_tokens(text, pieces, scores)
    tokenizer = build_tokenizer([pieces[i] for i in kept_V], [scores[i] for i in kept_V], kept_V)
    raw = _config(shape, len(kept_V))
    model = Decoder(decoder_config(raw))
    model.load_state_dict(_state(tensors, shape, kept_V))
    return model, raw, tokenizer


def kept_tokens(text: str, pieces: list[bytes], scores: list[float]) -> list[int]:
    """The ids that `text` uses, all that they are merged from, and all bytes; BOS first, the others rising."""
    ids = {pieces[i]: i for i in reversed(range(len(pieces))) if i not in BYTES}
    pending = [i for i in used_vocabulary(text, pieces, scores) if i not in BYTES]
    kept = {*BYTES}
    while pending:
        token = pending.pop()
        kept.add(token)
        word = pieces[token].decode()
        if token != BOS and len(word) > 1:
            del ids[pieces[token]]
            parts = encode_word(word, ids, scores)  # without itself: what it is merged from
            ids[pieces[token]] = token
            pending += [part for part in parts if part not in kept]
    return [BOS, *sorted(kept - {BOS})]


def build_tokenizer(pieces: Sequence[bytes], scores: Sequence[float], original: Sequence[int]) -> Tokenizer:
    """Llama 2's byte-pair encoding over some of its tokens, the first of which ends a text.

    Two neighbours merge if they make a token, those with the best score first.
    """
    texts = [_token_text(piece, i) for piece, i in zip(pieces, original, strict=True)]
    texts[0] = END
    ids = {text: i for i, text in enumerate(texts)}
    merges = [
        (-scores[ids[text]], text[:cut], text[cut:])
        for text, i in zip(texts, original, strict=True)
        if i not in BYTES
        for cut in range(1, len(text))
        if text[:cut] in ids and text[cut:] in ids
    ]
    ordered = [(first, second) for _, first, second in sorted(merges)]
    tokenizer = Tokenizer(models.BPE(ids, ordered, byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    spaces = decoders.Replace(SPACE, " ")
    tokenizer.decoder = decoders.Sequence([spaces, decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer.add_special_tokens([AddedToken(END, normalized=False)])
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{END} $A", special_tokens=[(END, 0)])
    return tokenizer


def _token_text(piece: bytes, i: int) -> str:
    if i in BYTES:
        return f"<0x{piece[0]:02X}>"
    return piece.decode().replace(" ", SPACE)


def _config(shape: ModelShape, vocabulary: int) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "vocab_size": vocabulary,
        "hidden_size": shape.width,
        "intermediate_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "max_position_embeddings": shape.context,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "dtype": "float32",
    }


def _state(tensors: dict[str, Tensor], shape: ModelShape, kept_V: list[int]) -> dict[str, Tensor]:
    """The decoder's parameters."""
    turned = {name: halves_first(tensors[name], shape) for name in ("wq", "wk")}
    state = {"embed.weight": tensors["embedding"][kept_V], "norm.weight": tensors["final_norm"]}
    for number in range(shape.layers):
        layer = {name: value[number] for name, value in (tensors | turned).items() if value.ndim > 1}
        state |= {
            f"layers.{number}.attention_norm.weight": tensors["attention_norm"][number],
            f"layers.{number}.attention.qkv.weight": torch.cat([layer["wq"], layer["wk"], layer["wv"]]),
            f"layers.{number}.attention.out.weight": layer["wo"],
            f"layers.{number}.ffn_norm.weight": tensors["ffn_norm"][number],
            f"layers.{number}.ffn.up.weight": torch.cat([layer["w1"], layer["w3"]]),
            f"layers.{number}.ffn.down.weight": layer["w2"],
        }
    return state
