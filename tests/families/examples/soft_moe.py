"""Tiny decoders with soft mixtures over segments: in the second half of the layers, or in all."""

EXAMPLES = (
    {"num_experts": 5, "segment_length": 4},
    {
        "num_experts": 4,
        "segment_length": 3,
        "first_moe_layer": 0,
        "num_experts_per_tok": 3,
        "restriction": "renormalise",
        "tie_word_embeddings": True,
    },
)
