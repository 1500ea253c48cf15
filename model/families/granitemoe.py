"""Granite-MoE (IBM Granite 3; Power scheduler, arXiv 2408.13359): softmax over the chosen experts' logits, which is
softmax over all, normalised; and multipliers of embeddings, attention, residuals and logits.
"""

from model.config_reader import ConfigReader, activation, attention, decoder, head_width, rope
from model.shapes.decoder import DecoderConfig
from model.shapes.mixtures import Dense, Router, TopK


def decoder_config(hf_config: ConfigReader) -> DecoderConfig:
    """Read config.json; defaults are those of transformers' GraniteMoeConfig."""
    return granite(hf_config, None)


def granite(hf_config: ConfigReader, shared: Dense | None) -> DecoderConfig:
    """A Granite decoder whose mixtures have this shared part."""
    experts, trained = hf_config.get("num_local_experts", 8), hf_config.get("num_experts_per_tok", 2)
    kind = activation(hf_config)
    mixture = TopK(
        experts=experts,
        width=hf_config["intermediate_size"],
        trained=trained,
        router=Router(normalise=True),
        activation=kind,
        shared=shared,
    )
    bias, scale = hf_config.get("attention_bias", False), hf_config.get("attention_multiplier", 1.0)
    self_attention = attention(hf_config, rope(hf_config, head_width(hf_config)), scale=scale, bias=bias, out_bias=bias)
    scales = {
        "embed_scale": hf_config.get("embedding_multiplier", 1.0),
        "residual_scale": hf_config.get("residual_multiplier", 1.0),
    }
    logit_scale = 1 / hf_config.get("logits_scaling", 1.0)
    return decoder(hf_config, self_attention, mixture, logit_scale=logit_scale, **scales)
