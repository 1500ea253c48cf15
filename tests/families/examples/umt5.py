"""UMT5: a bias table in every layer; a head of its own, and one that is the embedding."""

EXAMPLES = (
    {
        "vocab_size": 61,
        "d_model": 32,
        "d_kv": 6,
        "d_ff": 24,
        "num_layers": 2,
        "num_decoder_layers": 3,
        "num_heads": 4,
        "relative_attention_num_buckets": 8,
        "relative_attention_max_distance": 12,
        "decoder_start_token_id": 0,
        "eos_token_id": 1,
    },
    {
        "vocab_size": 61,
        "d_model": 24,
        "d_kv": 8,
        "d_ff": 40,
        "num_layers": 3,
        "num_heads": 3,
        "feed_forward_proj": "relu",
        "decoder_start_token_id": 0,
        "eos_token_id": 1,
    },
)
