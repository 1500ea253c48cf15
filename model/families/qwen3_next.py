"""Qwen3-Next (Qwen, 2025): gated delta layers with gated attention every so often, many experts and a gated shared one.

Norms are stored around zero, but for the one inside a delta layer. What predicts several tokens at once is not read.
"""

from typing import Any

from model.config_reader import (
    Fields,
    activation,
    attention,
    decoder,
    dense,
    head_width,
    layer_kinds,
    rope,
    sparse_layers,
)
from model.shapes.attention import AttentionShape, GatedDeltaNet
from model.shapes.decoder import DecoderConfig
from model.shapes.mixtures import Dense, Router, TopK

NAMES = {"shared_experts": "shared_expert"}
EXAMPLES: tuple[dict[str, Any], ...] = (
    {
        "num_experts": 6,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 12,
        "shared_expert_intermediate_size": 20,
        "head_dim": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 6,
        "linear_value_head_dim": 8,
        "layer_types": ["linear_attention", "full_attention"],
    },
    {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 4,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 8,
        "head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 4,
        "linear_conv_kernel_dim": 3,
        "mlp_only_layers": [1],
        "norm_topk_prob": False,
        "attention_bias": True,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0, "partial_rotary_factor": 0.5},
    },
)


def decoder_config(fields: Fields) -> DecoderConfig:
    """Read config.json; defaults are those of transformers' Qwen3NextConfig."""
    fields.expect("use_sliding_window", False)
    fields.expect("hidden_act", "silu")
    mixture = TopK(
        experts=fields.get("num_experts", 512),
        width=fields.get("moe_intermediate_size", 512),
        trained=fields.get("num_experts_per_tok", 10),
        router=Router(normalise=fields.get("norm_topk_prob", True)),
        activation=activation(fields),
        shared=Dense(fields.get("shared_expert_intermediate_size", 512), activation(fields)),
        shared_gate=True,
    )
    plain = dense(fields, fields.get("intermediate_size", 5632))
    layers = [mixture if moe else plain for moe in sparse_layers(fields)]
    return decoder(fields, _attention_layers(fields), layers, norm_offset=1.0)


def _attention_layers(fields: Fields) -> list[AttentionShape]:
    every, linear, full = fields.get("full_attention_interval", 4), "linear_attention", "full_attention"
    usual = [linear if (layer + 1) % every else full for layer in range(fields["num_hidden_layers"])]
    bias = fields.get("attention_bias", False)
    positions = rope(fields, fields["head_dim"] or head_width(fields), share=0.25)
    whole = attention(fields, positions, qk_norm="head", gated=True, bias=bias, out_bias=bias)
    delta = _delta(fields)
    return [whole if kind == full else delta for kind in layer_kinds(fields, usual, linear, full)]


def _delta(fields: Fields) -> GatedDeltaNet:
    return GatedDeltaNet(
        key_heads=fields.get("linear_num_key_heads", 16),
        value_heads=fields.get("linear_num_value_heads", 32),
        key_width=fields.get("linear_key_head_dim", 128),
        value_width=fields.get("linear_value_head_dim", 128),
        kernel=fields.get("linear_conv_kernel_dim", 4),
    )
