"""gpt-oss (arXiv 2508.10925): attention sinks, every other layer with a window, and clamped experts with biases.

A token's weights are a softmax over its chosen experts' logits, which is softmax over all, normalised.
"""

from dataclasses import replace
from typing import Any

from model.activation import CLAMP, STEEPNESS
from model.config_reader import Fields, attention, decoder, head_width, rope, windows
from model.shapes.attention import Attention
from model.shapes.decoder import DecoderConfig
from model.shapes.mixtures import Router, TopK

NAMES = {"gate": "router"}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1000.0,
    "factor": 4.0,
    "beta_fast": 8.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 16,
}
EXAMPLES: tuple[dict[str, Any], ...] = (
    {"num_local_experts": 6, "num_experts_per_tok": 3, "head_dim": 8, "sliding_window": 5, "rope_parameters": YARN},
    {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 3,
        "head_dim": 12,
        "sliding_window": 3,
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
        "attention_bias": False,
        "tie_word_embeddings": True,
        "rope_parameters": YARN | {"truncate": True, "beta_fast": 32.0},
    },
)


def decoder_config(fields: Fields) -> DecoderConfig:
    """Read config.json; defaults are those of transformers' GptOssConfig, but positions must be stated."""
    if not (fields.get("rope_parameters") or fields.get("rope_scaling")):
        raise KeyError("rope_scaling")
    fields.expect("hidden_act", "silu")
    fields.expect("swiglu_alpha", STEEPNESS)
    fields.expect("swiglu_limit", CLAMP)
    mixture = TopK(
        experts=fields.either("num_local_experts", "num_experts", default=128),
        width=fields["intermediate_size"],
        trained=fields.either("num_experts_per_tok", "experts_per_token", default=4),
        router=Router(normalise=True, logit_bias=True),
        activation="swiglu_clamped",
        bias=True,
        interleaved=True,
    )
    return decoder(fields, _attention_layers(fields), mixture, norm_eps=fields.get("rms_norm_eps", 1e-5))


def _attention_layers(fields: Fields) -> list[Attention]:
    positions = rope(fields, fields["head_dim"] or head_width(fields), theta=150000.0)
    fields.expect("initial_context_length", positions.original)
    bias = fields.get("attention_bias", True)
    whole = attention(fields, positions, bias=bias, out_bias=bias, sinks=True)
    back = windows(fields, fields.get("sliding_window", 128), lambda layer: layer % 2 == 0)
    return [replace(whole, window=window) for window in back]
