"""Phi-3.5-MoE (arXiv 2404.14219): layer norms, biases, and a sparse mixer (2409.12136) that is made for two experts.

One expert is the first of its two, with its weight; transformers always runs both. Beyond the original context
transformers 5.23 keeps LongRoPE's short factors; the long ones are used here, as in the model's published code.
"""

from typing import Any

from model.config_reader import Fields, activation, attention, decoder, head_width, rope
from model.shapes.decoder import DecoderConfig
from model.shapes.mixtures import Router, TopK

NAMES = {"mlp": "block_sparse_moe", "gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
LONGROPE: dict[str, Any] = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.4, 2.0],
    "long_factor": [1.5, 2.0, 3.0, 8.0],
    "short_mscale": 1.2,
    "long_mscale": 1.3,
    "original_max_position_embeddings": 40,
}
EXAMPLES: tuple[dict[str, Any], ...] = (
    {
        "num_local_experts": 6,
        "attention_bias": True,
        "lm_head_bias": True,
        "router_jitter_noise": 0.3,
        "rope_parameters": LONGROPE,
    },
    {"num_local_experts": 4, "tie_word_embeddings": True, "sliding_window": 7, "num_key_value_heads": 4},
)


def decoder_config(fields: Fields) -> DecoderConfig:
    """Read config.json; defaults are those of transformers' PhimoeConfig."""
    fields.expect("num_experts_per_tok", 2)
    mixture = TopK(
        experts=fields.get("num_local_experts", 16),
        width=fields["intermediate_size"],
        trained=2,
        router=Router("sparse_mixer", jitter=fields.get("router_jitter_noise", 0.01)),
        activation=activation(fields),
        fixed=True,
    )
    positions = rope(fields, head_width(fields), theta=1e6)
    if positions.scaling not in ("default", "longrope"):
        raise ValueError(f"rope_type is {positions.scaling!r}, but phimoe knows 'longrope' alone")
    bias = fields.get("attention_bias", False)
    window = fields.get("sliding_window") or 0
    self_attention = attention(fields, positions, bias=bias, out_bias=bias, window=window)
    head_bias = bool(fields.get("lm_head_bias", False))
    return decoder(
        fields, self_attention, mixture, norm="layer", norm_eps=fields.get("rms_norm_eps", 1e-5), head_bias=head_bias
    )
