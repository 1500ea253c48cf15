"""Granite-MoE's tensors: the experts of a layer are stacked, gate and up are one; the rest has the shared names. It
opens no files.
"""

from collections.abc import Iterator

from model.shapes.decoder import DecoderConfig
from model.shapes.mixtures import TopK
from weights.names import hugging_face
from weights.rules import Copy, Rule


def rules(config: DecoderConfig) -> tuple[Rule, ...]:
    """The mixtures under Granite's own names, everything under the shared ones."""
    return (*_mixtures(config), *hugging_face(config))


def _mixtures(config: DecoderConfig) -> Iterator[Rule]:
    for number, ffn in enumerate(config.feed_forward):
        ours, layer = f"layers.{number}.ffn.", f"model.layers.{number}."
        sparse, shared = layer + "block_sparse_moe.", layer + "shared_mlp."
        yield Copy(ours + "router", sparse + "router.layer.weight")
        yield Copy(ours + "gate_up", sparse + "input_linear.weight")
        yield Copy(ours + "down", sparse + "output_linear.weight")
        if isinstance(ffn, TopK) and ffn.shared is not None:
            yield Copy(ours + "shared.up.weight", shared + "input_linear.weight")
            yield Copy(ours + "shared.down.weight", shared + "output_linear.weight")
