"""The tensors of Deep MoE decoders. It opens no files."""

from collections.abc import Iterator

from model.shapes.decoder import DecoderConfig
from model.shapes.deep import DeepLevel
from weights.names import feed_forward, hugging_face
from weights.rules import Copy, Rule, Stack


@feed_forward.register
def _(shape: DeepLevel, width: int, ours: str, theirs: str) -> Iterator[Rule]:
    for part in ("weight", "bias") if shape.bias else ("weight",):
        yield Copy(f"{ours}gate_hidden.{part}", f"{theirs}gate.hidden.{part}")
        yield Copy(f"{ours}gate.{part}", f"{theirs}gate.out.{part}")
        yield Copy(f"{ours}out.{part}", f"{theirs}down_proj.{part}")
    yield Stack(ours + "experts", (theirs + "experts.{e}.up_proj.weight",), (shape.width,), shape.experts)
    if shape.bias:
        yield Stack(ours + "expert_bias", (theirs + "experts.{e}.up_proj.bias",), (shape.width,), shape.experts)


def rules(config: DecoderConfig) -> tuple[Rule, ...]:
    """Every rule."""
    return hugging_face(config)
