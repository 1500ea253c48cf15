"""Tiny µMoE configs: both factorisations."""

EXAMPLES = (
    {"num_experts": 6, "factorisation": "cp", "ranks": [20]},
    {
        "num_experts": 5,
        "factorisation": "tr",
        "ranks": [3, 2, 10],
        "mlp_bias": False,
        "gate_norm": "none",
        "gate_bias": True,
        "input_norm": False,
        "restriction": "drop",
        "hidden_act": "relu",
    },
)
