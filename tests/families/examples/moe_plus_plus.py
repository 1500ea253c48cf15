"""Tiny MoE++ configs."""

EXAMPLES = (
    {"num_experts": 5, "num_hidden_layers": 3},
    {
        "num_experts": 4,
        "num_experts_per_tok": 3,
        "num_constant_experts": 0,
        "num_zero_experts": 2,
        "gating_residual": False,
        "tie_word_embeddings": True,
        "head_dim": 10,
    },
)
