"""ERNIE 4.5's tensors: the shared names, but for the biases that choose experts, which are stored as one row."""

from model.shapes.decoder import DecoderConfig
from model.shapes.mixtures import TopK
from weights.names import hugging_face
from weights.rules import Copy, Rule


def rules(config: DecoderConfig) -> tuple[Rule, ...]:
    """The rows first: of several rules for a parameter, the first whose tensors exist is used."""
    layers = enumerate(config.feed_forward)
    rows = tuple(_row(number, ffn.experts) for number, ffn in layers if isinstance(ffn, TopK))
    return rows + hugging_face(config)


def _row(number: int, experts: int) -> Copy:
    return Copy(
        f"layers.{number}.ffn.selection_bias",
        f"model.layers.{number}.mlp.moe_statics.e_score_correction_bias",
        stored=(1, experts),
    )
