"""Llama 4's text part (Meta, 2025): one expert on an input times its sigmoid, a shared expert, attention in chunks.

Every so many layers see everything, without positions and with a temperature that grows with the position.
"""

from dataclasses import replace

from model.config_reader import ConfigReader, activation, attention, decoder, head_width, layer_kinds, rope
from model.shapes.attention import Attention
from model.shapes.decoder import DecoderConfig
from model.shapes.feed_forward import FeedForward
from model.shapes.mixtures import Dense, Router, TopK

NAMES = {"mlp": "feed_forward", "gate": "router", "shared_experts": "shared_expert"}


def decoder_config(hf_config: ConfigReader) -> DecoderConfig:
    """Read config.json; defaults are those of transformers' Llama4TextConfig."""
    hf_config.mark_read("_attn_implementation_autoset", "for_llm_compressor")
    return decoder(
        hf_config, _attention_layers(hf_config), _layers(hf_config), norm_eps=hf_config.get("rms_norm_eps", 1e-5)
    )


def _layers(hf_config: ConfigReader) -> list[FeedForward]:
    count, step = hf_config["num_hidden_layers"], hf_config.get("interleave_moe_layer_step", 1)
    sparse = hf_config.get("moe_layers")
    sparse = range(step - 1, count, step) if sparse is None else sparse
    plain = Dense(hf_config.get("intermediate_size_mlp", 16384), activation(hf_config))
    mixture = _mixture(hf_config)
    return [mixture if layer in sparse else plain for layer in range(count)]


def _mixture(hf_config: ConfigReader) -> TopK:
    width, kind = hf_config["intermediate_size"], activation(hf_config)
    experts, trained = hf_config.get("num_local_experts", 16), hf_config.get("num_experts_per_tok", 1)
    router = Router("sigmoid", weigh_input=True)
    return TopK(
        experts=experts,
        width=width,
        trained=trained,
        router=router,
        activation=kind,
        shared=Dense(width, kind),
        fixed=True,
    )


def _attention_layers(hf_config: ConfigReader) -> list[Attention]:
    count, every = hf_config["num_hidden_layers"], hf_config.get("no_rope_layer_interval", 4)
    usual = [(layer + 1) % every != 0 for layer in range(count)]
    turned = hf_config.get("no_rope_layers") or usual
    chunked, full = "chunked_attention", "full_attention"
    kinds = layer_kinds(hf_config, [chunked if turn else full for turn in turned], chunked, full)
    chunk = hf_config.get("attention_chunk_size", 8192)
    if chunked in kinds and not chunk:
        raise ValueError("layers attend in chunks, but there is no attention_chunk_size")
    near, far = _near(hf_config), _far(hf_config)
    shapes = [near if turn else far for turn in turned]
    chunks = [chunk if kind == chunked else 0 for kind in kinds]
    return [replace(shape, chunk=size) for shape, size in zip(shapes, chunks, strict=False)]


def _near(hf_config: ConfigReader) -> Attention:
    """With rotary positions, normed after they are turned."""
    bias, norm = hf_config.get("attention_bias", False), "unit" if hf_config.get("use_qk_norm", True) else "none"
    positions = rope(hf_config, hf_config["head_dim"] or head_width(hf_config), interleaved=True, theta=500000.0)
    return attention(hf_config, positions, bias=bias, out_bias=bias, qk_norm=norm)


def _far(hf_config: ConfigReader) -> Attention:
    """Without positions: queries grow slowly with theirs instead."""
    floor = hf_config.get("floor_scale", 8192) if hf_config.get("attn_temperature_tuning", True) else None
    bias, scale = hf_config.get("attention_bias", False), hf_config.get("attn_scale", 0.1)
    hf_config.mark_read("floor_scale")
    return attention(hf_config, None, bias=bias, out_bias=bias, floor_scale=floor, attn_scale=scale)
