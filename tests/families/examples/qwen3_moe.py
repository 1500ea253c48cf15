"""Tiny configs of `qwen3_moe` that differ in what matters."""

EXAMPLES = (
    {"moe_intermediate_size": 12, "num_experts": 6, "num_experts_per_tok": 3, "norm_topk_prob": True, "head_dim": 12},
    {
        "moe_intermediate_size": 12,
        "num_experts": 5,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 4,
        "mlp_only_layers": [0],
        "decoder_sparse_step": 2,
        "attention_bias": True,
        "tie_word_embeddings": True,
    },
)
