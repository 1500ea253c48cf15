"""Soft MoE in the encoder of a T5 (arXiv 2308.00951), in a layout of ours: the decoder is T5's, without experts."""

from model.config_reader import ConfigReader
from model.encoder_reader import t5_dense, t5_layers, t5_like
from model.shapes.decoder import DecoderConfig
from model.shapes.soft import SoftSlots


def decoder_config(hf_config: ConfigReader) -> DecoderConfig:
    """Read config.json: T5's keys, with `num_experts` and `slots_per_expert` (default 1, as published).

    `first_moe_layer` of the encoder is by default that of its second half, as published. Absent `num_experts_per_tok`:
    all experts ran in training. `restriction` is unconfirmed: "renormalise" (default) or "drop".
    """
    layer = t5_dense(hf_config, hf_config.get("feed_forward_proj", "relu"))
    encoder_layers, decoder_layers = t5_layers(hf_config)
    experts, first = hf_config["num_experts"], hf_config.get("first_moe_layer", encoder_layers // 2)
    mixture = SoftSlots(
        experts,
        hf_config.get("slots_per_expert", 1),
        layer.width,
        hf_config.get("num_experts_per_tok") or experts,
        layer.activation,
        layer.gated,
        hf_config.get("restriction", "renormalise"),
    )
    tied = hf_config.get("tie_word_embeddings", True) is not False
    return t5_like(
        hf_config,
        [layer if number < first else mixture for number in range(encoder_layers)],
        [layer] * decoder_layers,
        shared_bias=True,
        tied=tied,
        scaled=tied,
    )
