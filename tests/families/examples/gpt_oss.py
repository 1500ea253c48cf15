"""Tiny configs of `gpt_oss` that differ in what matters."""

from typing import Any

YARN = {
    "rope_type": "yarn",
    "rope_theta": 1000.0,
    "factor": 4.0,
    "beta_fast": 8.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 16,
}
EXAMPLES: tuple[dict[str, Any], ...] = (
    {"num_local_experts": 6, "num_experts_per_tok": 3, "head_dim": 8, "sliding_window": 5, "rope_parameters": YARN},
    {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 3,
        "head_dim": 12,
        "sliding_window": 3,
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
        "attention_bias": False,
        "tie_word_embeddings": True,
        "rope_parameters": YARN | {"truncate": True, "beta_fast": 32.0},
    },
)
