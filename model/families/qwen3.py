"""Qwen3, the dense ones (arXiv 2505.09388): norms of each query and key head; no experts to count. Where windows are
used, the layers from `max_window_layers` on have one.
"""

from dataclasses import replace

from model.config_reader import ConfigReader, attention, decoder, dense, rope, windows
from model.shapes.decoder import DecoderConfig


def decoder_config(hf_config: ConfigReader) -> DecoderConfig:
    """Read config.json; defaults are those of transformers' Qwen3Config."""
    width, bias = hf_config.get("head_dim", 128), hf_config.get("attention_bias", False)
    positions = rope(hf_config, width)
    window, first = hf_config.get("sliding_window", 4096), hf_config.get("max_window_layers", 28)
    used = window if hf_config.get("use_sliding_window") else None
    whole = attention(hf_config, positions, head_width=width, qk_norm="head", bias=bias, out_bias=bias)
    back = windows(hf_config, used, lambda layer: layer >= first)
    self_attention = [replace(whole, window=each) for each in back]
    return decoder(hf_config, self_attention, dense(hf_config, hf_config["intermediate_size"]))
