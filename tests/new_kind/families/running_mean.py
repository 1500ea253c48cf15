"""A family with mixtures of the kind `RunningMean`."""

from model.config_reader import Fields, attention, decoder, head_width, rope
from model.shapes.decoder import DecoderConfig
from tests.new_kind.shape import RunningMean


def decoder_config(fields: Fields) -> DecoderConfig:
    """Read config.json."""
    mixture = RunningMean(
        width=fields["hidden_size"],
        experts=fields["num_experts"],
        hidden=fields["intermediate_size"],
        trained=fields["num_experts_per_tok"],
    )
    return decoder(fields, attention(fields, rope(fields, head_width(fields))), mixture)
