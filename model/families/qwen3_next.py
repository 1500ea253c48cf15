"""Qwen3-Next (Qwen, 2025): gated delta layers with gated attention every so often, many experts and a gated shared one.

Norms are stored around zero, but for the one inside a delta layer. What predicts several tokens at once is not read.
"""

from model.config_reader import (
    ConfigReader,
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


def decoder_config(hf_config: ConfigReader) -> DecoderConfig:
    """Read config.json; defaults are those of transformers' Qwen3NextConfig."""
    hf_config.expect("use_sliding_window", False)
    hf_config.expect("hidden_act", "silu")
    mixture = _mixture(hf_config)
    plain = dense(hf_config, hf_config.get("intermediate_size", 5632))
    layers = [mixture if moe else plain for moe in sparse_layers(hf_config)]
    return decoder(hf_config, _attention_layers(hf_config), layers, norm_offset=1.0)


def _mixture(hf_config: ConfigReader) -> TopK:
    experts, trained = hf_config.get("num_experts", 512), hf_config.get("num_experts_per_tok", 10)
    router = Router(normalise=hf_config.get("norm_topk_prob", True))
    kind = activation(hf_config)
    shared = Dense(hf_config.get("shared_expert_intermediate_size", 512), kind)
    return TopK(
        experts=experts,
        width=hf_config.get("moe_intermediate_size", 512),
        trained=trained,
        router=router,
        activation=kind,
        shared=shared,
        shared_gate=True,
    )


def _attention_layers(hf_config: ConfigReader) -> list[AttentionShape]:
    every, linear, full = hf_config.get("full_attention_interval", 4), "linear_attention", "full_attention"
    usual = [linear if (layer + 1) % every else full for layer in range(hf_config["num_hidden_layers"])]
    bias = hf_config.get("attention_bias", False)
    positions = rope(hf_config, hf_config["head_dim"] or head_width(hf_config), share=0.25)
    whole = attention(hf_config, positions, qk_norm="head", gated=True, bias=bias, out_bias=bias)
    delta = _delta(hf_config)
    return [whole if kind == full else delta for kind in layer_kinds(hf_config, usual, linear, full)]


def _delta(hf_config: ConfigReader) -> GatedDeltaNet:
    key_heads, key_width = hf_config.get("linear_num_key_heads", 16), hf_config.get("linear_key_head_dim", 128)
    value_heads, value_width = hf_config.get("linear_num_value_heads", 32), hf_config.get("linear_value_head_dim", 128)
    return GatedDeltaNet(
        key_heads=key_heads,
        value_heads=value_heads,
        key_width=key_width,
        value_width=value_width,
        kernel=hf_config.get("linear_conv_kernel_dim", 4),
    )
