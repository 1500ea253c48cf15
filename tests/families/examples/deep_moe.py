"""Tiny Deep MoE configs: levels of equal and of different numbers of experts."""

EXAMPLES = (
    {"num_experts": 5, "gate_intermediate_size": 12},
    {"num_experts": [3, 6], "gate_intermediate_size": 8, "mlp_bias": False, "restriction": "drop"},
)
