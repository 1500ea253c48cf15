"""Tiny configs of `glm4_moe` that differ in what matters."""

EXAMPLES = (
    {
        "num_hidden_layers": 3,
        "first_k_dense_replace": 1,
        "moe_intermediate_size": 12,
        "n_routed_experts": 6,
        "num_experts_per_tok": 3,
        "n_group": 3,
        "topk_group": 2,
        "n_shared_experts": 1,
        "routed_scaling_factor": 2.5,
        "head_dim": 12,
        "use_qk_norm": True,
        "attention_bias": True,
    },
    {
        "first_k_dense_replace": 0,
        "moe_intermediate_size": 12,
        "n_routed_experts": 5,
        "num_experts_per_tok": 2,
        "n_shared_experts": 2,
        "norm_topk_prob": False,
        "partial_rotary_factor": 0.25,
        "tie_word_embeddings": True,
    },
)
