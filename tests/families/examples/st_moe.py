"""Tiny configs: noisy top-k as served, and ST-MoE's rules of what is dropped."""

EXAMPLES = (
    {"num_experts": 6, "num_experts_per_tok": 4, "noisy_gating": True},
    {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "second_expert_policy": "threshold",
        "drop_tokens": True,
        "eval_capacity_factor": 1.25,
        "min_expert_capacity": 2,
        "batch_prioritized_routing": True,
        "hidden_act": "gelu_new",
    },
)
