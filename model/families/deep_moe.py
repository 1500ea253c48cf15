"""Deep MoE decoders (arXiv 1312.4314), in a layout of ours: every layer is a level whose experts all have a weight."""

from model.config_reader import ConfigReader, attention, decoder, head_width, rope
from model.shapes.decoder import DecoderConfig
from model.shapes.deep import DeepLevel


def decoder_config(hf_config: ConfigReader) -> DecoderConfig:
    """Read config.json: Llama's keys, with `num_experts`, one number or a list of each level's own.

    `intermediate_size` is an expert's width and `gate_intermediate_size` the gate's, which has no default. Not
    confirmed: biases (`mlp_bias`, default true), and what a smaller count does to the weights of those that run
    (`restriction`, "renormalise" by default, or "drop").
    """
    layers, given = hf_config["num_hidden_layers"], hf_config["num_experts"]
    experts = list(given) if isinstance(given, list | tuple) else [given] * layers
    if len(experts) != layers:
        raise ValueError(f"num_experts has {len(experts)} entries, but there are {layers} layers")
    levels = [
        DeepLevel(
            experts=own,
            width=hf_config["intermediate_size"],
            gate_width=hf_config["gate_intermediate_size"],
            most=max(experts),
            even=len({*experts}) == 1,
            bias=hf_config.get("mlp_bias", True),
            restriction=hf_config.get("restriction", "renormalise"),
        )
        for own in experts
    ]
    return decoder(hf_config, attention(hf_config, rope(hf_config, head_width(hf_config))), levels)
