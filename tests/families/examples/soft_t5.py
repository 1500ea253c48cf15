"""Tiny T5s with Soft MoE in the second half of the encoder, or in all of it, with gates and two slots per expert."""

EXAMPLES = (
    {
        "vocab_size": 61,
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 24,
        "num_layers": 2,
        "num_heads": 4,
        "num_experts": 5,
        "relative_attention_num_buckets": 8,
        "relative_attention_max_distance": 12,
        "decoder_start_token_id": 0,
        "eos_token_id": 1,
    },
    {
        "vocab_size": 61,
        "d_model": 24,
        "d_kv": 8,
        "d_ff": 16,
        "num_layers": 2,
        "num_decoder_layers": 1,
        "num_heads": 3,
        "num_experts": 4,
        "slots_per_expert": 2,
        "first_moe_layer": 0,
        "restriction": "drop",
        "feed_forward_proj": "gated-silu",
        "tie_word_embeddings": False,
        "decoder_start_token_id": 5,
        "eos_token_id": 1,
    },
)
