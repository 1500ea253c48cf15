"""A family with mixtures of the kind `RunningMean`."""

from model.config_reader import ConfigReader, attention, decoder, head_width, rope
from model.shapes.decoder import DecoderConfig
from tests.new_kind.shape import RunningMean


def decoder_config(hf_config: ConfigReader) -> DecoderConfig:
    """Read config.json."""
    mixture = RunningMean(
        width=hf_config["hidden_size"],
        experts=hf_config["num_experts"],
        hidden=hf_config["intermediate_size"],
        trained=hf_config["num_experts_per_tok"],
    )
    return decoder(hf_config, attention(hf_config, rope(hf_config, head_width(hf_config))), mixture)
