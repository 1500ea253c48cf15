"""The tensors of Soft MoE decoders: a top-k mixture's, and the scale of its logits. It opens no files."""

from collections.abc import Iterator

from model.shapes.decoder import DecoderConfig
from model.shapes.soft import SoftSegments
from weights.names import feed_forward, hugging_face
from weights.rules import Copy, Rule


@feed_forward.register
def _(shape: SoftSegments, width: int, ours: str, theirs: str) -> Iterator[Rule]:
    yield from feed_forward(shape.topk, width, ours, theirs)
    yield Copy(ours + "scale", theirs + "gate.scale")


def rules(config: DecoderConfig) -> tuple[Rule, ...]:
    """Every rule."""
    return hugging_face(config)
