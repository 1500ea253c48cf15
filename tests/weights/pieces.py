"""Small tokenizers with SentencePiece's habits: blanks as U+2581, unknown characters as bytes. Made, not downloaded."""

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from tests.weights.words import TEXTS

BLANK = "\u2581"
SPECIALS = ("<unk>", "<s>", "</s>")
ROLE, THINK = "<role>", "<think>"  # added tokens that are not special, as DeepSeek's and Qwen's
KINDS = ("prepend", "replace", "metaspace", "metaspace-first", "bare")


def _model() -> models.BPE:
    """Merges learnt from a few texts, and a token for every byte."""
    learner = Tokenizer(models.BPE())
    learner.normalizer = normalizers.Replace(" ", BLANK)
    learner.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=120, show_progress=False))
    learnt = json.loads(learner.to_str())["model"]
    tokens = [*SPECIALS, *(f"<0x{byte:02X}>" for byte in range(256)), *learnt["vocab"]]
    merges = [tuple(pair) for pair in learnt["merges"]]
    return models.BPE({t: i for i, t in enumerate(tokens)}, merges, unk_token="<unk>", byte_fallback=True)


def _decoder(*last: decoders.Decoder) -> decoders.Decoder:
    return decoders.Sequence([decoders.Replace(BLANK, " "), decoders.ByteFallback(), decoders.Fuse(), *last])


def pieces(kind: str) -> Tokenizer:
    """As Llama 2's, Gemma's, T5's, newer Llama's, and one whose decoder only joins."""
    made = Tokenizer(_model())
    replace = normalizers.Replace(" ", BLANK)
    if kind == "prepend":
        made.normalizer = normalizers.Sequence([normalizers.Prepend(BLANK), replace])
        made.decoder = _decoder(decoders.Strip(" ", 1, 0))
    elif kind == "metaspace":
        made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    elif kind == "metaspace-first":
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        made.decoder = _decoder(decoders.Strip(" ", 1, 0))
    else:
        made.normalizer, made.decoder = replace, _decoder() if kind == "replace" else decoders.Fuse()
    made.add_special_tokens(list(SPECIALS))
    made.add_tokens([AddedToken(ROLE, normalized=True), AddedToken(THINK, normalized=False)])
    return made


def write_pieces(folder: Path, kind: str, **config: object) -> Path:
    pieces(kind).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"} | config))
    return folder
