"""What is trained and how: one frozen recipe per shipped model. The config inside is the checkpoint's config.json.

Learning rates are per optimiser step; `steps · rows · length` tokens are seen in all.
"""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

SHAPE: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "dtype": "float32",  # to run in; stored in bfloat16
}

INFINITY: dict[str, Any] = SHAPE | {
    "model_type": "infinity_moe",
    "norm": "rms",
    "norm_eps": 1e-5,
    "positions": "rotary",
    "qk_norm": "full",
    "intermediate_size": 2304,
    "gate_dim": 32,
    "kept_share": 0.25,
    "mask_block": 64,
    "activation": "gelu",
    "sigma_link": "exp",
    "sigma_min": 0.0,
    "draws": "independent",
    "num_experts_per_tok": 4,
    "max_experts_per_tok": 16,
}

TOPK: dict[str, Any] = SHAPE | {
    "model_type": "olmoe",
    "architectures": ["OlmoeForCausalLM"],
    "intermediate_size": 64,
    "num_experts": 24,
    "num_experts_per_tok": 4,
    "norm_topk_prob": True,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
}


@dataclass(frozen=True, slots=True)
class Recipe:
    """One training run. `largest_count`: K is uniform on 1..largest_count, drawn for each layer and micro-batch."""

    config: Mapping[str, Any]
    steps: int = 900
    rows: int = 16
    micro_rows: int = 8
    length: int = 512
    muon_lr: float = 0.02
    adam_lr: float = 4e-3
    decay: float = 0.05
    balance: float = 0.0
    largest_count: int = 8
    warmup: int = 40
    evaluate_every: int = 100
    seed: int = 1

    @property
    def tokens(self) -> int:
        return self.steps * self.rows * self.length

    def schedule(self, step: int) -> float:
        """Linear warm-up, then a cosine down to a fiftieth."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        progress = (step - self.warmup) / max(1, self.steps - self.warmup)
        return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

    def override(self, steps: int = 0, rows: int = 0, fields: Sequence[str] = ()) -> "Recipe":
        """This recipe with other sizes (0: its own) and changed config fields, given as `name=json`."""
        pairs = (field.split("=", 1) for field in fields)
        config = {**self.config} | {name: json.loads(value) for name, value in pairs}
        return dataclasses.replace(self, steps=steps or self.steps, rows=rows or self.rows, config=config)


RECIPES = {"infinity": Recipe(INFINITY), "topk": Recipe(TOPK, balance=0.01)}
