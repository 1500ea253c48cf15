"""Tiny configs of `granitemoe` that differ in what matters."""

SCALES = {
    "embedding_multiplier": 3.0,
    "attention_multiplier": 0.2,
    "residual_multiplier": 0.4,
    "logits_scaling": 0.7,
}
EXAMPLES = (
    {"num_local_experts": 5, "tie_word_embeddings": True, "num_key_value_heads": None} | SCALES,
    {"num_local_experts": 4, "num_experts_per_tok": 3, "attention_bias": True, "attention_multiplier": 0.35},
)
