"""Tiny configs of `ernie4_5_moe` that differ in what matters."""

EXAMPLES = (
    {
        "num_hidden_layers": 4,
        "moe_intermediate_size": 12,
        "moe_num_experts": 6,
        "moe_k": 3,
        "moe_layer_start_index": 1,
        "moe_layer_end_index": 2,
        "use_bias": True,
        "tie_word_embeddings": False,
    },
    {
        "num_hidden_layers": 4,
        "moe_intermediate_size": 12,
        "moe_num_experts": 5,
        "moe_k": 2,
        "moe_num_shared_experts": 0,
        "moe_layer_interval": 2,
        "moe_norm_min": 0.3,  # larger than many sums
        "head_dim": 10,
    },
)
