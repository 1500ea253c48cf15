"""The model card (README.md beside the weights), written from what was measured. It measures nothing itself."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from training.recipe import Recipe

TEXT = "43.8 MB of stories sampled from stories15M (MIT) at temperatures 0.9 and 1.0 by `training/synthesise.py`"

_KINDS = {
    "infinity_moe": "an ∞-MoE (arXiv 2601.17680): each of K draws from a Gaussian masks one wide layer",
    "olmoe": "a sparse top-k mixture in OLMoE's layout; `transformers` loads it too",
}

_TEXT = """# {name}

A language model of {parameters:.1f} M parameters that writes very short children's stories: {kind}.
It exists to show what an expert count does, not to know anything. Licence: Apache-2.0.

## Quality per expert count

Held-out text: {held_out_tokens:,} tokens of real TinyStories (CDLA-Sharing-1.0), none of which was trained on.
`agreement`: share of positions with the same most likely token as at the trained count ({trained}).

| K | loss (nats) | perplexity | bits per byte | agreement |
|---|---|---|---|---|
{rows}

## Recipe

- Text: {text};
  a fifth of the stories wrapped as the answer to a one-line request, so that the chat format is known.
- Tokenizer: byte-level BPE of {vocabulary} entries, trained on the same text ({bytes_per_token} bytes per token).
- {training_tokens:,} tokens in {steps} steps of {rows_per_step} windows of {length}; seed {seed}; K uniform on
  1..{largest} anew per layer and micro-batch; Muon {muon} on matrices, AdamW {adam} on the rest, cosine, bf16 autocast.
- Config: `config.json`. Commands: `docs/training.md`.
"""


def write_card(folder: Path, facts: Mapping[str, Any], raw: Mapping[str, Any], recipe: Recipe) -> None:
    """Write README.md from the facts in card.json, the config and the recipe."""
    rows = "\n".join(
        f"| {q['num_experts']} | {q['loss']:.4f} | {q['perplexity']:.3f} | {q['bits_per_byte']:.4f} "
        f"| {q['agreement']:.1%} |"
        for q in facts["quality"]
    )
    text = _TEXT.format(
        name=facts["name"],
        parameters=facts["parameters"] / 1e6,
        kind=_KINDS[facts["family"]],
        held_out_tokens=facts["held_out_tokens"],
        trained=raw["num_experts_per_tok"],
        rows=rows,
        text=TEXT,
        vocabulary=raw["vocab_size"],
        bytes_per_token=facts["bytes_per_token"],
        training_tokens=facts["training_tokens"],
        steps=facts["steps"],
        rows_per_step=recipe.rows,
        length=recipe.length,
        seed=facts["seed"],
        largest=recipe.largest_count,
        muon=recipe.muon_lr,
        adam=recipe.adam_lr,
    )
    (folder / "README.md").write_text(text)
