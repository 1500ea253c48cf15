"""Writes a demo checkpoint: bfloat16 weights, config, tokenizer, card.json and README.md."""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from model.decoder import Decoder
from training.corpus import END
from training.demos.recipes import Recipe
from weights.save import save_model

CARD = "card.json"
KINDS = {
    "soft_moe": "a causal Soft MoE: the tokens of a segment share the weights of their experts (arXiv 2308.00951, made "
    "causal after arXiv 2405.03133)",
    "soft_t5": "a T5 with Soft MoE in its encoder (arXiv 2308.00951)",
    "deep_moe": "a Deep MoE: levels of experts behind gates of two layers (arXiv 1312.4314)",
    "switch_transformers": "a Switch Transformer: one expert per token, encoder and decoder (arXiv 2101.03961)",
    "moe_plus_plus": "MoE++: some experts of the pool compute nothing (arXiv 2410.07348)",
    "remoe": "ReMoE: an expert runs where its ReLU gate is above zero (arXiv 2412.14711)",
    "dynmoe": "DynMoE: an expert runs where its gate reaches its threshold (arXiv 2405.14297)",
    "mu_moe": "µMoE: experts that are slices of one factorised tensor (arXiv 2402.12550)",
    "st_moe": "a sparse top-2 mixture, trained as ST-MoE (arXiv 2202.08906)",
}
FROM_BASE = "Begun with the embeddings, attention and norms of a dense model of 1.7 M tokens"
README = """# {name}

A language model of {millions:.2f} M parameters that writes on in the manner of very short children's stories:
{kind}.
It exists to show what an expert count does in this kind of mixture, not to know anything. Licence: Apache-2.0.
What a count means here, and its quality and speed at each one: `docs/mixtures.md`; the figures are in `card.json`.

- Text: {megabytes} MB of stories sampled from stories15M (MIT) at temperature 0.9 by `training/synthesise.py`.
- Tokenizer: byte-level BPE of {vocabulary:,} entries, trained on the same text ({bytes_per_token} bytes per token).
- {begun}: {tokens:,} tokens in {steps:,} steps of {rows} rows of {length}; Muon {muon} on matrices, AdamW {peak}
  on the rest, {warm} steps of warm-up, cosine; float32; seed {seed}; {minutes:.0f} minutes of one core's time.
  `python -m training.demos train {name}`; `docs/training.md` has the whole command.
- Held-out text: real TinyStories (CDLA-Sharing-1.0), none of which was trained on.
"""


def export(model: Decoder, raw: dict[str, Any], tokenizer: Tokenizer, folder: Path) -> None:
    """Write what is served. A prompt of an encoder has an end token behind it, one of a decoder before it."""
    save_model(model, raw, folder, torch.bfloat16)
    tokenizer.save(str(folder / "tokenizer.json"))
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END}
    if model.config.encoder is None:
        config |= {"bos_token": END}
    else:
        config |= {"pad_token": END, "add_bos_token": False, "add_eos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def write_card(folder: Path, facts: dict[str, Any]) -> None:
    """Write card.json."""
    (folder / CARD).write_text(json.dumps(facts, indent=1) + "\n")


def write_readme(folder: Path, recipe: Recipe, facts: dict[str, Any]) -> None:
    """Write README.md."""
    training = facts["training"]
    told = README.format(
        **training,
        name=facts["name"],
        millions=facts["parameters"] / 1e6,
        kind=KINDS[recipe.family],
        vocabulary=facts["vocabulary"],
        bytes_per_token=facts["bytes_per_token"],
        minutes=training["cpu_seconds"] / 60,
        begun="From initial weights" if "d_model" in recipe.config else FROM_BASE,
    )
    (folder / "README.md").write_text(told)
