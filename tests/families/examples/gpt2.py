"""Tiny configs of `gpt2` that differ in what matters."""

FOREIGN = {"num_key_value_heads": None, "intermediate_size": None}
EXAMPLES = (
    FOREIGN,
    {"n_inner": 20, "activation_function": "relu", "tie_word_embeddings": False, "layer_norm_epsilon": 1e-3} | FOREIGN,
    {"num_hidden_layers": 3, "scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True} | FOREIGN,
    {"scale_attn_weights": False} | FOREIGN,
)
