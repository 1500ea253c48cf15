"""The tensors of NLLB-MoE in Hugging Face's layout: M2M100's, with each expert under a number of its own. It opens no
files.
"""

from collections.abc import Iterator

from model.shapes.attention import Attention
from model.shapes.decoder import DecoderConfig
from model.shapes.feed_forward import FeedForward
from model.shapes.mixtures import Dense, TopK
from weights.names import norm
from weights.rules import Copy, Fuse, Rule, Stack

PARTS = ("weight", "bias")


def rules(config: DecoderConfig) -> tuple[Rule, ...]:
    """Every rule."""
    return tuple(_rules(config))


def _rules(config: DecoderConfig) -> Iterator[Rule]:
    assert config.encoder is not None
    yield Copy("embed.weight", "model.shared.weight")
    for number, (shape, ffn) in enumerate(zip(config.attention, config.feed_forward, strict=True)):
        assert isinstance(shape, Attention)
        decoded = number >= config.encoder.layers
        own, stack = (number - config.encoder.layers, "decoder") if decoded else (number, "encoder")
        ours, theirs = f"layers.{number}.", f"model.{stack}.layers.{own}."
        yield from _attention(shape, ours + "attention.", theirs + "self_attn.")
        yield from norm(config, ours + "attention_norm", theirs + "self_attn_layer_norm")
        if decoded:
            yield from _cross(shape, ours + "cross.", theirs + "cross_attention.")
            yield from norm(config, ours + "cross_norm", theirs + "cross_attention_layer_norm")
        yield from _feed_forward(ffn, config.width, ours + "ffn.", theirs + "ffn.")
        yield from norm(config, ours + "ffn_norm", theirs + "ff_layer_norm")
    yield from norm(config, "encoder_norm", "model.encoder.layer_norm")
    yield from norm(config, "norm", "model.decoder.layer_norm")
    if not config.tied:
        yield Copy("head.weight", "lm_head.weight")


def _attention(shape: Attention, ours: str, theirs: str) -> Iterator[Rule]:
    rows = shape.heads * shape.head_width
    for part in PARTS:
        yield Fuse(f"{ours}qkv.{part}", tuple(f"{theirs}{name}_proj.{part}" for name in "qkv"), (rows,) * 3)
        yield Copy(f"{ours}out.{part}", f"{theirs}out_proj.{part}")


def _cross(shape: Attention, ours: str, theirs: str) -> Iterator[Rule]:
    rows = shape.heads * shape.head_width
    for part in PARTS:
        yield Copy(f"{ours}query.{part}", f"{theirs}q_proj.{part}")
        yield Fuse(f"{ours}kv.{part}", tuple(f"{theirs}{name}_proj.{part}" for name in "kv"), (rows,) * 2)
        yield Copy(f"{ours}out.{part}", f"{theirs}out_proj.{part}")


def _feed_forward(ffn: FeedForward, width: int, ours: str, theirs: str) -> Iterator[Rule]:
    if isinstance(ffn, TopK):
        yield from _mixture(ffn, width, ours, theirs)
        return
    assert isinstance(ffn, Dense)
    for part in PARTS:
        yield Copy(f"{ours}up.{part}", f"{theirs}fc1.{part}")
        yield Copy(f"{ours}down.{part}", f"{theirs}fc2.{part}")


def _mixture(ffn: TopK, width: int, ours: str, theirs: str) -> Iterator[Rule]:
    yield Copy(ours + "router", theirs + "router.classifier.weight")
    if ffn.router.logit_bias:
        yield Copy(ours + "router_bias", theirs + "router.classifier.bias")
    expert = theirs + "experts.expert_{e}."
    yield Stack(ours + "gate_up", (expert + "fc1.weight",), (ffn.width,), ffn.experts)
    yield Stack(ours + "gate_up_bias", (expert + "fc1.bias",), (ffn.width,), ffn.experts)
    yield Stack(ours + "down", (expert + "fc2.weight",), (width,), ffn.experts)
    yield Stack(ours + "down_bias", (expert + "fc2.bias",), (width,), ffn.experts)
