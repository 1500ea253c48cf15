"""Tiny configs of `deepseek_v3` that differ in what matters."""

from typing import Any

LATENT: dict[str, Any] = {
    "num_key_value_heads": 4,
    "q_lora_rank": 10,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 5,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 100.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 2.0,
    "beta_slow": 0.5,
    "mscale": 0.7,
    "mscale_all_dim": 1.2,
}
EXAMPLES = (
    LATENT
    | {
        "num_hidden_layers": 3,
        "first_k_dense_replace": 1,
        "moe_intermediate_size": 12,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "n_group": 4,
        "topk_group": 2,
        "n_shared_experts": 2,
        "rope_parameters": YARN,
        "attention_bias": True,
    },
    LATENT
    | {
        "first_k_dense_replace": 0,
        "moe_intermediate_size": 12,
        "n_routed_experts": 5,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "q_lora_rank": None,
        "rope_interleave": False,
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.5,
        "tie_word_embeddings": True,
        "moe_layer_freq": 1,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
    },
)
