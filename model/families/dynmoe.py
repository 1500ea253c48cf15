"""DynMoE (arXiv 2405.14297), in a layout of ours: each expert has a threshold, and those that a token reaches run."""

from model.config_reader import ConfigReader, activation, attention, decoder, head_width, rope
from model.shapes.decoder import DecoderConfig
from model.shapes.mixtures import Router, Score, TopK


def decoder_config(hf_config: ConfigReader) -> DecoderConfig:
    """Read config.json: Llama's keys, with `num_experts` and `intermediate_size` of one expert.

    Beside the tensors of a top-k mixture a layer has mlp.gate.temperature [1], which multiplies the cosines as it is,
    and mlp.gate.thresholds [E].
    """
    return gated(hf_config, "top_any")


def gated(hf_config: ConfigReader, score: Score) -> DecoderConfig:
    """Experts with gates. `num_experts_per_tok`: how many a token could run in training; absent: all."""
    experts = hf_config["num_experts"]
    mixture = TopK(
        experts=experts,
        width=hf_config["intermediate_size"],
        trained=hf_config.get("num_experts_per_tok") or experts,
        router=Router(score),
        activation=activation(hf_config),
    )
    return decoder(hf_config, attention(hf_config, rope(hf_config, head_width(hf_config))), mixture)
