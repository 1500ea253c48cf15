"""µMoE decoders (arXiv 2402.12550), in a layout of ours: experts that are slices of one factorised tensor."""

from model.config_reader import ConfigReader, activation, attention, decoder, head_width, rope
from model.shapes.decoder import DecoderConfig
from model.shapes.mu_moe import MuMoE


def decoder_config(hf_config: ConfigReader) -> DecoderConfig:
    """Read config.json: Llama's keys, with `num_experts`, `factorisation` ("cp" or "tr") and `ranks`, a list.

    `intermediate_size` is the width between the two maps. Absent `num_experts_per_tok`: all experts took part in
    training, as published. `gate_norm`, `gate_bias`, `input_norm`, `mlp_bias` and `hidden_act` are by default what the
    published code has for text; `restriction` is what a count does to the weights that it keeps.
    """
    hf_config.expect("hierarchy", 1)  # of expert modes
    experts, ranks = hf_config["num_experts"], hf_config["ranks"]
    if not isinstance(ranks, list | tuple):
        raise ValueError(f"ranks must be a list, got {ranks!r:.40}")
    mixture = MuMoE(
        experts=experts,
        width=hf_config["intermediate_size"],
        trained=hf_config.get("num_experts_per_tok") or experts,
        factorisation=hf_config["factorisation"],
        ranks=tuple(ranks),
        activation=activation(hf_config) if hf_config.get("hidden_act") else "gelu",
        bias=hf_config.get("mlp_bias", True),
        gate_norm=hf_config.get("gate_norm", "layer"),
        gate_bias=hf_config.get("gate_bias", False),
        input_norm=hf_config.get("input_norm", True),
        restriction=hf_config.get("restriction", "renormalise"),
    )
    return decoder(hf_config, attention(hf_config, rope(hf_config, head_width(hf_config))), mixture)
