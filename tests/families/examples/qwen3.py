"""Tiny configs of `qwen3` that differ in what matters."""

YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 16}
EXAMPLES = (
    {"head_dim": 12, "tie_word_embeddings": True, "rope_parameters": YARN},
    {
        "head_dim": 8,
        "attention_bias": True,
        "num_hidden_layers": 3,
        "use_sliding_window": True,
        "sliding_window": 5,
        "max_window_layers": 1,
    },
)
