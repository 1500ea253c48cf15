"""Tiny configs of `minimax_m2` that differ in what matters."""

EXAMPLES = (
    {"num_local_experts": 6, "num_experts_per_tok": 3, "head_dim": 12, "rotary_dim": 6},
    {
        "num_local_experts": 5,
        "num_experts_per_tok": 2,
        "head_dim": 8,
        "num_key_value_heads": 1,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 300.0, "partial_rotary_factor": 0.25},
    },
)
