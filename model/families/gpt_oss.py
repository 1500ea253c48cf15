"""gpt-oss (arXiv 2508.10925): attention sinks, every other layer with a window, and clamped experts with biases.

A token's weights are a softmax over its chosen experts' logits, which is softmax over all, normalised.
"""

from dataclasses import replace

from model.activation import CLAMP, STEEPNESS
from model.config_reader import ConfigReader, attention, decoder, head_width, rope, windows
from model.shapes.attention import Attention
from model.shapes.decoder import DecoderConfig
from model.shapes.mixtures import Router, TopK

NAMES = {"gate": "router"}


def decoder_config(hf_config: ConfigReader) -> DecoderConfig:
    """Read config.json; defaults are those of transformers' GptOssConfig, but positions must be stated."""
    if not (hf_config.get("rope_parameters") or hf_config.get("rope_scaling")):
        raise KeyError("rope_scaling")
    hf_config.expect("hidden_act", "silu")
    hf_config.expect("swiglu_alpha", STEEPNESS)
    hf_config.expect("swiglu_limit", CLAMP)
    experts = hf_config.either("num_local_experts", "num_experts", default=128)
    trained = hf_config.either("num_experts_per_tok", "experts_per_token", default=4)
    router = Router(normalise=True, logit_bias=True)
    mixture = TopK(
        experts=experts,
        width=hf_config["intermediate_size"],
        trained=trained,
        router=router,
        activation="swiglu_clamped",
        bias=True,
        interleaved=True,
    )
    return decoder(hf_config, _attention_layers(hf_config), mixture, norm_eps=hf_config.get("rms_norm_eps", 1e-5))


def _attention_layers(hf_config: ConfigReader) -> list[Attention]:
    positions = rope(hf_config, hf_config["head_dim"] or head_width(hf_config), theta=150000.0)
    hf_config.expect("initial_context_length", positions.original)
    bias = hf_config.get("attention_bias", True)
    whole = attention(hf_config, positions, bias=bias, out_bias=bias, sinks=True)
    back = windows(hf_config, hf_config.get("sliding_window", 128), lambda layer: layer % 2 == 0)
    return [replace(whole, window=window) for window in back]
