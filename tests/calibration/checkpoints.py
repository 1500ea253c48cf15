"""Checkpoints and texts for tests of calibration. One of them has an answer that is known without measuring."""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from tests.weights.checkpoints import OLMOE, random_decoder
from weights.save import save_model

WORDS = ("once", "upon", "a", "time", "there", "was", "fox", "who", "liked", "to", "sleep", "in", "the", "sun")
END = "<|endoftext|>"
TWO: dict[str, Any] = OLMOE | {"num_experts": 6, "num_experts_per_tok": 4, "hidden_size": 64, "intermediate_size": 16}


def two_experts(folder: Path) -> Path:
    """A checkpoint trained at four experts of which only the first two do anything: every token's router scores experts
    0 and 1 best, by far, and what the others make is zero.

    Hidden unit 0 is large for every token and no layer changes it; only experts 0 and 1 have a router that reads it.
    """
    model: Any = random_decoder(TWO)
    with torch.no_grad():
        model.embed.weight[:, 0] = 4.0
        for layer in model.layers:
            layer.attention.out.weight[0] = 0.0
            layer.ffn.router[:] = 0.0
            layer.ffn.router[0, 0], layer.ffn.router[1, 0], layer.ffn.router[2:, 0] = 3.0, 2.9, -3.0
            layer.ffn.down[:, 0] = 0.0
            layer.ffn.down[2:] = 0.0
            layer.ffn.down[:2] *= 3.0
    save_model(model, TWO, folder, torch.float32)
    write_tokenizer(folder)
    return folder


def write_tokenizer(folder: Path) -> None:
    """A tokenizer of whole words; each text begins with the end-of-text token."""
    vocabulary = {word: number for number, word in enumerate((END, "[unk]", *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[unk]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([END])
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{END} $A", special_tokens=[(END, 0)])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": END, "eos_token": END}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def write_text(path: Path, words: int = 2000) -> Path:
    """A text in several documents."""
    parts = [" ".join(WORDS[(i * i + i // 7) % len(WORDS)] for i in range(j, j + 100)) for j in range(0, words, 100)]
    path.write_text(END.join(parts))
    return path


def write_task(path: Path) -> Path:
    """Questions in both spellings of the fields."""
    lines = [
        {"prompt": "once upon a", "choices": ["time", "fox"], "answer": 0},
        {"query": "there was a", "choices": ["sun", "fox who liked"], "gold": 1},
        {"query": "to sleep in", "choices": ["the sun", "a fox", "once"], "gold": 0},
    ]
    path.write_text("\n".join(json.dumps(line) for line in lines) + "\n")
    return path
