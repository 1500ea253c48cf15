"""Granite-MoE with a shared part beside the experts, of `shared_intermediate_size` hidden units; 0: none."""

from model.config_reader import ConfigReader, dense
from model.families.granitemoe import granite
from model.shapes.decoder import DecoderConfig


def decoder_config(hf_config: ConfigReader) -> DecoderConfig:
    """Read config.json; defaults are those of transformers' GraniteMoeSharedConfig."""
    width = hf_config.get("shared_intermediate_size", 0)
    return granite(hf_config, dense(hf_config, width) if width else None)
