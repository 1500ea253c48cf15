"""Tiny configs of `qwen2_moe` that differ in what matters."""

EXAMPLES = (
    {
        "moe_intermediate_size": 12,
        "shared_expert_intermediate_size": 20,
        "num_experts": 6,
        "num_experts_per_tok": 3,
        "num_hidden_layers": 4,
        "use_sliding_window": True,
        "sliding_window": 5,
        "max_window_layers": 2,
    },
    {
        "moe_intermediate_size": 8,
        "shared_expert_intermediate_size": 12,
        "num_experts": 5,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 5,
        "mlp_only_layers": [3],
        "decoder_sparse_step": 2,
        "norm_topk_prob": True,
        "qkv_bias": False,
        "tie_word_embeddings": True,
        "use_sliding_window": True,
        "sliding_window": 6,
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention", "full_attention"],
    },
)
