"""The text part's tensors inside a Llama 4 checkpoint. It does not read config.json."""

from model.shapes.decoder import DecoderConfig
from weights.families import llama4_text
from weights.rules import Rule, renamed


def rules(config: DecoderConfig) -> tuple[Rule, ...]:
    """Every rule of the decoder."""
    return tuple(renamed(rule, "language_model.{}".format) for rule in llama4_text.rules(config))
