"""MoE++ (arXiv 2410.07348), in a layout of ours: some experts compute nothing, and routers read the one before them."""

from dataclasses import replace

from model.config_reader import ConfigReader, activation, attention, decoder, head_width, rope
from model.shapes.decoder import DecoderConfig
from model.shapes.mixtures import Router
from model.shapes.moe_plus_plus import MoEPlusPlus


def decoder_config(hf_config: ConfigReader) -> DecoderConfig:
    """Read config.json: Llama's keys, with `num_experts` feed-forward experts of `intermediate_size`, and how many
    others there are: `num_constant_experts`, `num_copy_experts` and `num_zero_experts`, in this order.

    Beside the tensors of a top-k mixture, whose router is that of the whole pool P, a layer has mlp.constants.value
    [C, D] and mlp.constants.mix [C, 2, D], and mlp.gate.residual.weight [P, P] unless it is the first, or
    `gating_residual` is false.
    """
    first = MoEPlusPlus(
        experts=hf_config["num_experts"],
        width=hf_config["intermediate_size"],
        trained=hf_config.get("num_experts_per_tok", 2),
        router=Router(normalise=True),
        activation=activation(hf_config),
        constant=hf_config.get("num_constant_experts", 2),
        copy=hf_config.get("num_copy_experts", 1),
        zero=hf_config.get("num_zero_experts", 1),
    )
    later = replace(first, residual=hf_config.get("gating_residual", True))
    layers = [first, *[later] * (hf_config["num_hidden_layers"] - 1)]
    return decoder(hf_config, attention(hf_config, rope(hf_config, head_width(hf_config))), layers)
