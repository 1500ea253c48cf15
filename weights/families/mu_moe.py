"""The tensors of µMoE decoders. It opens no files."""

from collections.abc import Iterator

from model.shapes.decoder import DecoderConfig
from model.shapes.mu_moe import MuMoE
from weights.names import feed_forward, hugging_face
from weights.rules import Copy, Rule


@feed_forward.register
def _(shape: MuMoE, width: int, ours: str, theirs: str) -> Iterator[Rule]:
    parts = ["gate.weight"]
    if shape.gate_bias:
        parts.append("gate.bias")
    if shape.input_norm:
        parts += ["input_norm.weight", "input_norm.bias"]
    for part in parts:
        yield Copy(ours + part, theirs + part)
    for name in ("up", "down"):
        for mode in ("experts", "inputs", "outputs"):
            yield Copy(f"{ours}{name}.{mode}", f"{theirs}{name}_proj.{mode}")


def rules(config: DecoderConfig) -> tuple[Rule, ...]:
    """Every rule."""
    return hugging_face(config)
