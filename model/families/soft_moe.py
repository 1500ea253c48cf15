"""Soft MoE decoders (arXiv 2308.00951, made causal after Lory, arXiv 2405.03133), in a layout of ours: the tokens of a
segment share the weights of their experts, which follow from the segment before it.
"""

from model.config_reader import ConfigReader, activation, attention, decoder, dense, head_width, rope
from model.shapes.decoder import DecoderConfig
from model.shapes.soft import segments


def decoder_config(hf_config: ConfigReader) -> DecoderConfig:
    """Read config.json: Llama's keys, with `num_experts`, and `intermediate_size` of one expert or dense layer.

    `first_moe_layer` is by default that of the second half, as published. `segment_length` has no default. Absent
    `num_experts_per_tok`: all experts ran in training. `restriction` is unconfirmed: "drop" (default, by
    measurement) or "renormalise".
    """
    layers, experts = hf_config["num_hidden_layers"], hf_config["num_experts"]
    first = hf_config.get("first_moe_layer", layers // 2)
    mixture = segments(
        experts,
        hf_config["intermediate_size"],
        hf_config.get("num_experts_per_tok") or experts,
        hf_config["segment_length"],
        hf_config["hidden_size"],
        restriction=hf_config.get("restriction", "drop"),
        activation=activation(hf_config),
    )
    below = dense(hf_config, hf_config["intermediate_size"])
    feed_forward = [below if layer < first else mixture for layer in range(layers)]
    return decoder(hf_config, attention(hf_config, rope(hf_config, head_width(hf_config))), feed_forward)
