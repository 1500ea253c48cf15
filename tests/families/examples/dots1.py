"""Tiny configs of `dots1` that differ in what matters."""

EXAMPLES = (
    {
        "moe_intermediate_size": 12,
        "n_routed_experts": 8,
        "n_shared_experts": 2,
        "num_experts_per_tok": 3,
        "n_group": 4,
        "topk_group": 2,
        "first_k_dense_replace": 1,
        "num_hidden_layers": 3,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "sliding_window": 5,
        "max_window_layers": 2,
        "attention_bias": True,
    },
    {
        "moe_intermediate_size": 8,
        "n_routed_experts": 5,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "tie_word_embeddings": True,
        "sliding_window": 6,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    {
        "moe_intermediate_size": 12,
        "n_routed_experts": 6,
        "n_shared_experts": 1,
        "num_experts_per_tok": 3,
        "norm_topk_prob": True,
        "sliding_window": None,
        "head_dim": 12,
    },
)
