"""Llama 4's text part (Meta, 2025): one expert on an input times its sigmoid, a shared expert, attention in chunks.

Every so many layers see everything, without positions and with a temperature that grows with the position.
"""

from dataclasses import replace
from typing import Any

from model.config_reader import Fields, activation, attention, decoder, head_width, layer_kinds, rope
from model.shapes.attention import Attention
from model.shapes.decoder import DecoderConfig
from model.shapes.mixtures import Dense, FeedForward, Router, TopK

NAMES = {"mlp": "feed_forward", "gate": "router", "shared_experts": "shared_expert"}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
EXAMPLES: tuple[dict[str, Any], ...] = (
    {
        "num_local_experts": 4,
        "num_hidden_layers": 4,
        "head_dim": 8,
        "intermediate_size_mlp": 20,
        "interleave_moe_layer_step": 2,
        "attention_chunk_size": 6,
        "no_rope_layer_interval": 2,
        "floor_scale": 5,
        "attn_scale": 0.5,
        "rope_parameters": LLAMA3,
    },
    {
        "num_local_experts": 3,
        "num_hidden_layers": 3,
        "num_experts_per_tok": 2,
        "head_dim": 10,
        "intermediate_size_mlp": 20,
        "moe_layers": [0, 2],
        "no_rope_layers": [1, 0, 1],
        "attention_chunk_size": 4,
        "use_qk_norm": False,
        "attn_temperature_tuning": False,
        "attention_bias": True,
        "tie_word_embeddings": True,
    },
)


def decoder_config(fields: Fields) -> DecoderConfig:
    """Read config.json; defaults are those of transformers' Llama4TextConfig."""
    fields.knows("_attn_implementation_autoset", "for_llm_compressor")
    return decoder(fields, _attention_layers(fields), _layers(fields), norm_eps=fields.get("rms_norm_eps", 1e-5))


def _layers(fields: Fields) -> list[FeedForward]:
    count, step = fields["num_hidden_layers"], fields.get("interleave_moe_layer_step", 1)
    sparse = fields.get("moe_layers")
    sparse = range(step - 1, count, step) if sparse is None else sparse
    plain = Dense(fields.get("intermediate_size_mlp", 16384), activation(fields))
    mixture = TopK(
        experts=fields.get("num_local_experts", 16),
        width=fields["intermediate_size"],
        trained=fields.get("num_experts_per_tok", 1),
        router=Router("sigmoid", weigh_input=True),
        activation=activation(fields),
        shared=Dense(fields["intermediate_size"], activation(fields)),
        fixed=True,
    )
    return [mixture if layer in sparse else plain for layer in range(count)]


def _attention_layers(fields: Fields) -> list[Attention]:
    count, every = fields["num_hidden_layers"], fields.get("no_rope_layer_interval", 4)
    turned = fields.get("no_rope_layers") or [(layer + 1) % every != 0 for layer in range(count)]
    chunked, full = "chunked_attention", "full_attention"
    kinds = layer_kinds(fields, [chunked if turn else full for turn in turned], chunked, full)
    chunk = fields.get("attention_chunk_size", 8192)
    if chunked in kinds and not chunk:
        raise ValueError("layers attend in chunks, but there is no attention_chunk_size")
    near, far = _near(fields), _far(fields)
    return [
        replace(near if turn else far, chunk=chunk if kind == chunked else 0)
        for turn, kind in zip(turned, kinds, strict=False)
    ]


def _near(fields: Fields) -> Attention:
    """With rotary positions, normed after they are turned."""
    bias, norm = fields.get("attention_bias", False), "unit" if fields.get("use_qk_norm", True) else "none"
    positions = rope(fields, fields["head_dim"] or head_width(fields), interleaved=True, theta=500000.0)
    return attention(fields, positions, bias=bias, out_bias=bias, qk_norm=norm)


def _far(fields: Fields) -> Attention:
    """Without positions: queries grow slowly with theirs instead."""
    floor = fields.get("floor_scale", 8192) if fields.get("attn_temperature_tuning", True) else None
    bias, scale = fields.get("attention_bias", False), fields.get("attn_scale", 0.1)
    fields.knows("floor_scale")
    return attention(fields, None, bias=bias, out_bias=bias, floor_scale=floor, attn_scale=scale)
