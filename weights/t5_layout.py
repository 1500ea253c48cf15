"""The tensors of T5 and its kin in Hugging Face's layout: two stacks of blocks, whose sublayers are numbered. It opens
no files.
"""

from collections.abc import Callable, Iterator

from model.shapes.attention import Attention
from model.shapes.decoder import DecoderConfig
from model.shapes.feed_forward import FeedForward
from model.shapes.mixtures import Dense
from weights.rules import Copy, Fuse, Rule

FeedForwardRules = Callable[[FeedForward, str, str], Iterator[Rule]]


def t5_rules(config: DecoderConfig, feed_forward: FeedForwardRules) -> Iterator[Rule]:
    """Every rule; `feed_forward` has those of a feed-forward sublayer, by its shape and both prefixes."""
    encoder = config.encoder
    assert encoder is not None and encoder.bias is not None
    yield Copy("embed.weight", "shared.weight")
    for number, (shape, ffn) in enumerate(zip(config.attention, config.feed_forward, strict=True)):
        assert isinstance(shape, Attention)
        decoded = number >= encoder.layers
        own = number - encoder.layers if decoded else number
        stack = "decoder" if decoded else "encoder"
        ours, theirs = f"layers.{number}.", f"{stack}.block.{own}.layer."
        yield from _attention(shape, ours + "attention.", theirs + "0.SelfAttention.")
        yield Copy(ours + "attention_norm.weight", theirs + "0.layer_norm.weight")
        if own == 0 or not encoder.bias.shared:
            yield Copy(f"{stack}_bias.{own}", theirs + "0.SelfAttention.relative_attention_bias.weight")
        if decoded:
            yield from _cross(shape, ours + "cross.", theirs + "1.EncDecAttention.")
            yield Copy(ours + "cross_norm.weight", theirs + "1.layer_norm.weight")
        last = theirs + ("2." if decoded else "1.")
        yield Copy(ours + "ffn_norm.weight", last + "layer_norm.weight")
        yield from feed_forward(ffn, ours + "ffn.", last)
    yield Copy("encoder_norm.weight", "encoder.final_layer_norm.weight")
    yield Copy("norm.weight", "decoder.final_layer_norm.weight")
    if not config.tied:
        yield Copy("head.weight", "lm_head.weight")
        yield Copy("head.weight", "shared.weight")  # tied, and multiplied without a scale


def dense(ffn: FeedForward, ours: str, theirs: str) -> Iterator[Rule]:
    """T5's own feed-forward layer; `theirs` is where its matrices lie."""
    assert isinstance(ffn, Dense)
    if ffn.gated:
        yield Fuse(ours + "up.weight", (theirs + "wi_0.weight", theirs + "wi_1.weight"), (ffn.width, ffn.width))
    else:
        yield Copy(ours + "up.weight", theirs + "wi.weight")
    yield Copy(ours + "down.weight", theirs + "wo.weight")


def t5_dense(ffn: FeedForward, ours: str, theirs: str) -> Iterator[Rule]:
    """Of a dense model, where the layer has a name that its activation need not have."""
    return dense(ffn, ours, theirs + "DenseReluDense.")


def _attention(shape: Attention, ours: str, theirs: str) -> Iterator[Rule]:
    rows = shape.heads * shape.head_width
    yield Fuse(ours + "qkv.weight", tuple(f"{theirs}{name}.weight" for name in "qkv"), (rows,) * 3)
    yield Copy(ours + "out.weight", theirs + "o.weight")


def _cross(shape: Attention, ours: str, theirs: str) -> Iterator[Rule]:
    rows = shape.heads * shape.head_width
    yield Copy(ours + "query.weight", theirs + "q.weight")
    yield Fuse(ours + "kv.weight", tuple(f"{theirs}{name}.weight" for name in "kv"), (rows,) * 2)
    yield Copy(ours + "out.weight", theirs + "o.weight")
