"""Tiny configs of `phimoe` that differ in what matters."""

from typing import Any

LONGROPE: dict[str, Any] = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.4, 2.0],
    "long_factor": [1.5, 2.0, 3.0, 8.0],
    "short_mscale": 1.2,
    "long_mscale": 1.3,
    "original_max_position_embeddings": 40,
}
EXAMPLES: tuple[dict[str, Any], ...] = (
    {
        "num_local_experts": 6,
        "attention_bias": True,
        "lm_head_bias": True,
        "router_jitter_noise": 0.3,
        "rope_parameters": LONGROPE,
    },
    {"num_local_experts": 4, "tie_word_embeddings": True, "sliding_window": 7, "num_key_value_heads": 4},
)
