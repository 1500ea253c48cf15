"""The demo recipes in a size for tests, and rows for them."""

from typing import Any

import torch
from torch import Tensor

from model.decoder import Decoder
from training.demos.recipes import BASE_RECIPE, RECIPES
from training.demos.rows import NONE

VOCABULARY = 300
DECODER: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
DECODER |= {"num_key_value_heads": 2, "intermediate_size": 16}
T5: dict[str, Any] = {"d_model": 32, "d_kv": 16, "num_heads": 2, "d_ff": 16}
OWN: dict[str, dict[str, Any]] = {
    "soft_moe": {"segment_length": 5},
    "deep_moe": {"gate_intermediate_size": 8},
    "mu_moe": {"ranks": [12]},
}


def small(name: str) -> dict[str, Any]:
    """config.json of a recipe's model, small."""
    recipe = RECIPES[name]
    sizes = T5 if "d_model" in recipe.config else DECODER
    return dict(recipe.config) | {"vocab_size": VOCABULARY} | sizes | OWN.get(recipe.family, {})


def small_base() -> dict[str, Any]:
    """config.json of the dense model."""
    return dict(BASE_RECIPE.config) | {"vocab_size": VOCABULARY} | DECODER


def tokens_and_targets(model: Decoder) -> tuple[Tensor, Tensor]:
    """Two rows of random tokens; with an encoder, prompts of six tokens."""
    ids_BS = torch.randint(3, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(1))
    target_BS = ids_BS.roll(-1, 1)
    if model.config.encoder is not None:
        ids_BS[:, 6] = 0
        target_BS[:, :6] = NONE
    return ids_BS, target_BS
