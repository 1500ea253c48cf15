"""What the tensors of `RunningMean` are called; everything else has the shared names."""

from collections.abc import Iterator

from model.shapes.decoder import DecoderConfig
from tests.new_kind.shape import RunningMean
from weights.names import feed_forward, hugging_face
from weights.rules import Copy, Rule


@feed_forward.register
def _(shape: RunningMean, width: int, ours: str, theirs: str) -> Iterator[Rule]:
    for name in ("router", "up", "down"):
        yield Copy(ours + name, f"{theirs}{name}.weight")


def rules(config: DecoderConfig) -> tuple[Rule, ...]:
    """The shared layout, which now knows the kind."""
    return hugging_face(config)
