"""A small byte-level tokenizer with special tokens, as our training makes it, in a folder that can be loaded."""

import json
from pathlib import Path

from training.corpus import train_tokenizer

TEXTS = ["Once upon a time there was a big dog. " * 3, "The cat saw a café, 日本 and 😀 — and smiled."] * 30
END, USER, ASSISTANT = "<|endoftext|>", "<|user|>", "<|assistant|>"
SPECIALS = (END, USER, ASSISTANT)


def write_tokenizer(folder: Path, **config: object) -> Path:
    """`tokenizer.json` of about 300 tokens, and config.json and tokenizer_config.json beside it."""
    train_tokenizer(TEXTS, 330).save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps({"eos_token_id": 0}))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": END, "eos_token": {"content": END}} | config)
    )
    return folder
