"""Tiny configs of `llama4_text` that differ in what matters."""

from typing import Any

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
EXAMPLES: tuple[dict[str, Any], ...] = (
    {
        "num_local_experts": 4,
        "num_hidden_layers": 4,
        "head_dim": 8,
        "intermediate_size_mlp": 20,
        "interleave_moe_layer_step": 2,
        "attention_chunk_size": 6,
        "no_rope_layer_interval": 2,
        "floor_scale": 5,
        "attn_scale": 0.5,
        "rope_parameters": LLAMA3,
    },
    {
        "num_local_experts": 3,
        "num_hidden_layers": 3,
        "num_experts_per_tok": 2,
        "head_dim": 10,
        "intermediate_size_mlp": 20,
        "moe_layers": [0, 2],
        "no_rope_layers": [1, 0, 1],
        "attention_chunk_size": 4,
        "use_qk_norm": False,
        "attn_temperature_tuning": False,
        "attention_bias": True,
        "tie_word_embeddings": True,
    },
)
