"""Tiny configs of `olmoe` that differ in what matters."""

EXAMPLES = (
    {"num_key_value_heads": 2},
    {"tie_word_embeddings": True, "norm_topk_prob": True, "clip_qkv": 0.5, "attention_bias": True},
)
