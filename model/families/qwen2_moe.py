"""Qwen2-MoE (arXiv 2407.10671; Qwen1.5-MoE-A2.7B): a shared expert with a sigmoid gate of its own, weights as they are,
biases of queries, keys and values. Where windows are used, every second layer below `max_window_layers` has one.
"""

from model.config_reader import (
    ConfigReader,
    activation,
    attention,
    decoder,
    dense,
    head_width,
    rope,
    sparse_layers,
    windows,
)
from model.shapes.decoder import DecoderConfig
from model.shapes.mixtures import Router, TopK

NAMES = {"shared_experts": "shared_expert"}


def decoder_config(hf_config: ConfigReader) -> DecoderConfig:
    """Read config.json; defaults are those of transformers' Qwen2MoeConfig."""
    experts = hf_config.either("num_experts", "num_local_experts", default=60)
    width, trained = hf_config.get("moe_intermediate_size", 1408), hf_config.get("num_experts_per_tok", 4)
    router = Router(normalise=hf_config.get("norm_topk_prob", False))
    shared = dense(hf_config, hf_config.get("shared_expert_intermediate_size", 5632))
    mixture = TopK(
        experts=experts,
        width=width,
        trained=trained,
        router=router,
        activation=activation(hf_config),
        shared=shared,
        shared_gate=True,
    )
    positions, bias = rope(hf_config, head_width(hf_config)), hf_config.get("qkv_bias", True)
    self_attention = [attention(hf_config, positions, bias=bias, window=window) for window in _windows(hf_config)]
    plain = dense(hf_config, hf_config.get("intermediate_size", 5632))
    return decoder(hf_config, self_attention, [mixture if moe else plain for moe in sparse_layers(hf_config)])


def _windows(hf_config: ConfigReader) -> list[int]:
    window, below = hf_config.get("sliding_window", 4096), hf_config.get("max_window_layers", 28)
    used = window if hf_config.get("use_sliding_window") else None
    return windows(hf_config, used, lambda layer: layer % 2 == 0 and layer < below)
