"""Tiny ReMoE configs."""

EXAMPLES = (
    {"num_experts": 6},
    {"num_experts": 5, "num_experts_per_tok": 3, "tie_word_embeddings": True, "head_dim": 10},
)
