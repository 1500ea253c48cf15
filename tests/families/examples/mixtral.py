"""Tiny configs of `mixtral` that differ in what matters."""

EXAMPLES = (
    {"num_local_experts": 5, "sliding_window": 7},
    {
        "num_local_experts": 4,
        "num_experts_per_tok": 3,
        "tie_word_embeddings": True,
        "head_dim": 10,
        "num_key_value_heads": 4,
    },
)
