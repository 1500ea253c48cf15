"""Qwen3, the dense ones (arXiv 2505.09388): norms of each query and key head; no experts to count. Where windows are
used, the layers from `max_window_layers` on have one.
"""

from model.config_reader import Fields, attention, decoder, dense, rope, windows
from model.shapes.decoder import DecoderConfig

YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 16}
EXAMPLES = (
    {"head_dim": 12, "tie_word_embeddings": True, "rope_parameters": YARN},
    {
        "head_dim": 8,
        "attention_bias": True,
        "num_hidden_layers": 3,
        "use_sliding_window": True,
        "sliding_window": 5,
        "max_window_layers": 1,
    },
)


def decoder_config(fields: Fields) -> DecoderConfig:
    """Read config.json; defaults are those of transformers' Qwen3Config."""
    width, bias = fields.get("head_dim", 128), fields.get("attention_bias", False)
    positions = rope(fields, width)
    window, first = fields.get("sliding_window", 4096), fields.get("max_window_layers", 28)
    used = window if fields.get("use_sliding_window") else None
    self_attention = [
        attention(fields, positions, head_width=width, qk_norm="head", bias=bias, out_bias=bias, window=each)
        for each in windows(fields, used, lambda layer: layer >= first)
    ]
    return decoder(fields, self_attention, dense(fields, fields["intermediate_size"]))
