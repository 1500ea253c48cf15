"""Small vocabularies, trained here, as tokenizer.json and as GGUF metadata."""

import json
from functools import cache
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from tests.weights.gguf.metadata import metadata_of
from weights.gguf.pre_tokenizers import PRE_TOKENIZERS

END, USER, THINK, SPACES = "<|endoftext|>", "<|user|>", "<think>", "    "
CORPUS = [
    "Once upon a time there was a big dog, and it couldn't see 1234567 cats.",
    "def f(x):\n    return x ** 2  # comment\n\tif True:\n\t\tpass\r\n",
    "日本語のテキスト、中文文本。 한국어 Ελληνικά кириллица عربى हिन्दी",
    "😀 👩‍👩‍👧 café e\u0301 ﬁne ½ ² Ⅷ HelloWorld camelCase I'LL we'Ve",
    "  two   three    four\n\n\n  \t\n end  ",
] * 8
PLAIN = {"unk_token": None, "bos_token": END, "eos_token": END}


@cache
def trained(pre: str) -> str:
    """A byte-level tokenizer.json with that pre-tokenizer, special tokens, and two more that are text."""
    steps = PRE_TOKENIZERS[pre]
    made = Tokenizer(models.BPE(ignore_merges=steps.whole_words))
    data = json.loads(made.to_str()) | {"normalizer": steps.normalizer, "pre_tokenizer": steps.pre_tokenizer}
    made = Tokenizer.from_str(json.dumps(data))
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=420, special_tokens=[END], initial_alphabet=alphabet)
    )
    made.add_special_tokens([USER])
    made.add_tokens([AddedToken(token, normalized=False) for token in (THINK, SPACES)])
    return made.to_str()


def byte_level(pre: str = "qwen2") -> dict[str, Any]:
    return metadata_of(json.loads(trained(pre)), PLAIN, pre, size=440)


@cache
def sentencepiece_json(prefix: bool) -> str:
    """A tokenizer.json as transformers makes it of a SentencePiece model: every way to make a token is a merge."""
    spaces = normalizers.Replace(" ", "\u2581")
    made = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), spaces] if prefix else [spaces])
    made.pre_tokenizer = pre_tokenizers.Split(" ", "isolated")
    first = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=first, limit_alphabet=60, max_token_length=9)
    made.train_from_iterator([word for line in CORPUS for word in line.split(" ")], trainer)
    data = json.loads(made.to_str())
    vocab = data["model"]["vocab"]
    ranks = {"".join(merge): rank for rank, merge in enumerate(data["model"]["merges"])}
    order = sorted(vocab, key=lambda token: (token not in first, ranks.get(token, len(ranks)), vocab[token]))
    ids = {token: id for id, token in enumerate(order)}
    pieces = [token for token in order if token not in first]
    cuts = ((piece[:cut], piece[cut:]) for piece in pieces for cut in range(1, len(piece)))
    data["model"] |= {"vocab": ids, "merges": [pair for pair in cuts if set(pair) <= set(pieces)]}
    data["added_tokens"] = [token | {"id": ids[token["content"]]} for token in data["added_tokens"][:3]]
    return json.dumps(data | {"pre_tokenizer": None, "decoder": _decoder(prefix)})


def _decoder(prefix: bool) -> dict[str, Any]:
    steps: list[Any] = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    found = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    decoder: dict[str, Any] = json.loads(found.__getstate__())
    return decoder


def sentencepiece(prefix: bool = True) -> dict[str, Any]:
    config = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "add_space_prefix": prefix}
    return metadata_of(json.loads(sentencepiece_json(prefix)), config)
