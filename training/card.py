"""Writes the model card (README.md beside the weights) from measured figures. It measures nothing itself.

Once the model is calibrated, `make docs` replaces the table by what its calibration says.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from training.recipe import Recipe

_KINDS = {
    "infinity_moe": "an ∞-MoE (arXiv 2601.17680): each of K draws from a Gaussian masks one wide layer",
    "olmoe": "a sparse top-k mixture in OLMoE's layout; `transformers` loads it too",
}

_TEXT = """# {name}

A language model of {parameters:.1f} M parameters that writes very short children's stories: {kind}.
It exists to show what an expert count does, not to know anything. Licence: Apache-2.0.

## Quality per expert count

<!-- calibration: written by `make docs` -->
Held-out text: {held_out_tokens:,} tokens of real TinyStories (CDLA-Sharing-1.0), none of which was trained on.
`agreement`: share of positions with the same most likely token as at the {reference} count ({trained}).

| K | loss (nats) | perplexity | bits per byte | agreement |
|---|---|---|---|---|
{rows}
<!-- end of calibration -->

## Recipe

"""

_RECIPE = """\
- Text: 43.8 MB of stories sampled from stories15M (MIT) at temperatures 0.9 and 1.0 by `training/synthesise.py`;
  a fifth of the stories wrapped as the answer to a one-line request, so that the chat format is known.
- Tokenizer: byte-level BPE of {vocabulary} entries, trained on the same text ({bytes_per_token} bytes per token).
- {training_tokens:,} tokens in {steps} steps of {rows_per_step} windows of {length}; seed {seed}; K uniform on
  1..{largest}, drawn for each layer and micro-batch; Muon {muon} on matrices, AdamW {adam} on the rest, cosine,
  bf16 autocast.
- Config: `config.json`. Commands: `docs/training.md`.
"""

_TWIN_RECIPE = """\
- Text: 193 MB of stories sampled from stories15M (MIT) at temperatures 0.9 and 1.0 by `training/on_gpu.py`;
  a fifth of the stories wrapped as the answer to a one-line request, so that the chat format is known.
- Tokenizer: byte-level BPE of 4,096 entries, trained on text of the same kind ({bytes_per_token} bytes per token).
- {training_tokens:,} tokens in {steps} steps of {rows} windows of {length}, {training_seconds} s on one {device};
  seed {seed}; K per row, {counts}-uniform on 1..16; Muon {muon_lr} on matrices, AdamW {adam_lr} on embeddings,
  {route_lr} on what routes, cosine, bf16 autocast.
- Config: `config.json`. Commands, and what the choices were measured against: `docs/training.md`.
"""

_ROW = "| {num_experts} | {loss:.4f} | {perplexity:.3f} | {bits_per_byte:.4f} | {agreement:.1%} |"


def write_card(folder: Path, facts: Mapping[str, Any], raw: Mapping[str, Any], recipe: Recipe) -> None:
    """Write README.md from the facts in card.json, the config and the recipe."""
    told = _RECIPE.format(
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
    (folder / "README.md").write_text(_quality(facts, "trained", raw["num_experts_per_tok"]) + told)


def write_twin_card(folder: Path, facts: Mapping[str, Any], plan: Mapping[str, Any], default: int) -> None:
    """Write README.md of a model trained by `training.on_gpu` from the facts in card.json and the run's plan."""
    told = _TWIN_RECIPE.format(**dict(plan) | dict(facts))
    (folder / "README.md").write_text(_quality(facts, "default", default) + told)


def _quality(facts: Mapping[str, Any], reference: str, trained: int) -> str:
    """The card down to its recipe. `reference` says which count the `agreement` compares with."""
    return _TEXT.format(
        name=facts["name"],
        parameters=facts["parameters"] / 1e6,
        kind=_KINDS[facts["family"]],
        held_out_tokens=facts["held_out_tokens"],
        reference=reference,
        trained=trained,
        rows="\n".join(_ROW.format(**row) for row in facts["quality"]),
    )
