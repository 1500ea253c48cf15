"""OLMoE (arXiv 2409.02060), Hugging Face layout: norms over all query and key heads, softmax over all experts."""

from collections.abc import Mapping
from typing import Any

from model.config import DecoderConfig, TopK


def decoder_config(config: Mapping[str, Any]) -> DecoderConfig:
    """Read config.json; defaults are those of transformers' OlmoeConfig. Raises KeyError for a missing size."""
    mixture = TopK(
        experts=config.get("num_experts", 64),
        width=config["intermediate_size"],
        trained=config.get("num_experts_per_tok", 8),
        normalise=config.get("norm_topk_prob", False),
        activation=config.get("hidden_act", "silu"),
    )
    return DecoderConfig(
        vocabulary=config["vocab_size"],
        width=config["hidden_size"],
        heads=config["num_attention_heads"],
        kv_heads=config.get("num_key_value_heads") or config["num_attention_heads"],
        head_width=config["hidden_size"] // config["num_attention_heads"],
        context=config.get("max_position_embeddings", 4096),
        layers=(mixture,) * config["num_hidden_layers"],
        norm_eps=config.get("rms_norm_eps", 1e-5),
        rope_theta=rope_theta(config),
        qk_norm="full",
        clip_qkv=config.get("clip_qkv"),
        attention_bias=config.get("attention_bias", False),
        tied=config.get("tie_word_embeddings", False),
    )


def rope_theta(config: Mapping[str, Any]) -> float:
    """The base, from `rope_parameters` (transformers 5) or `rope_theta`. Only unscaled rotary positions are known.

    Raises:
        ValueError: a RoPE scaling that would change the mathematics.
    """
    parameters = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind != "default":
        raise ValueError(f"rope_type {kind!r} is not supported; only 'default' is")
    return float(parameters.get("rope_theta", config.get("rope_theta", 10000.0)))
