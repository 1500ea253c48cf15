"""The tensors of dense UMT5 models. It opens no files."""

from model.shapes.decoder import DecoderConfig
from weights.rules import Rule
from weights.t5_layout import t5_dense, t5_rules


def rules(config: DecoderConfig) -> tuple[Rule, ...]:
    """Every rule."""
    return tuple(t5_rules(config, t5_dense))
