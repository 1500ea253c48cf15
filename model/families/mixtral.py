"""Mixtral (arXiv 2401.04088): softmax over the chosen experts' logits, which is softmax over all, normalised."""

from model.config_reader import ConfigReader, activation, attention, decoder, head_width, rope
from model.shapes.decoder import DecoderConfig
from model.shapes.mixtures import Router, TopK

NAMES = {"mlp": "block_sparse_moe", "gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}


def decoder_config(hf_config: ConfigReader) -> DecoderConfig:
    """Read config.json; defaults are those of transformers' MixtralConfig."""
    experts, trained = hf_config.get("num_local_experts", 8), hf_config.get("num_experts_per_tok", 2)
    mixture = TopK(
        experts=experts,
        width=hf_config["intermediate_size"],
        trained=trained,
        router=Router(normalise=True),
        activation=activation(hf_config),
    )
    positions = rope(hf_config, head_width(hf_config), theta=1e6)
    self_attention = attention(hf_config, positions, window=hf_config.get("sliding_window") or 0)
    return decoder(hf_config, self_attention, mixture, norm_eps=hf_config.get("rms_norm_eps", 1e-5))
