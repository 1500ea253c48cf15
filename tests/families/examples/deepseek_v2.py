"""Tiny configs of `deepseek_v2` that differ in what matters."""

from tests.families.examples.deepseek_v3 import LATENT, YARN

EXAMPLES = (
    LATENT
    | {
        "num_hidden_layers": 3,
        "first_k_dense_replace": 1,
        "moe_intermediate_size": 12,
        "n_routed_experts": 6,
        "num_experts_per_tok": 3,
        "topk_method": "group_limited_greedy",
        "n_group": 3,
        "topk_group": 2,
        "n_shared_experts": 2,
        "routed_scaling_factor": 4.0,
        "rope_parameters": YARN,
    },
    LATENT
    | {
        "moe_intermediate_size": 12,
        "n_routed_experts": 5,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "q_lora_rank": None,
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": True,
        "scoring_func": "softmax",
        "n_group": 1,
        "topk_group": 1,
    },
)
