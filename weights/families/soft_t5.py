"""The tensors of T5 with Soft MoE in its encoder: T5's, with all experts of a layer in one piece. It opens no files."""

from collections.abc import Iterator

from model.shapes.decoder import DecoderConfig
from model.shapes.feed_forward import FeedForward
from model.shapes.soft import SoftSlots
from weights.rules import Copy, Rule
from weights.t5_layout import t5_dense, t5_rules


def rules(config: DecoderConfig) -> tuple[Rule, ...]:
    """Every rule."""

    def feed_forward(ffn: FeedForward, ours: str, theirs: str) -> Iterator[Rule]:
        return _soft(ours, theirs + "mlp.") if isinstance(ffn, SoftSlots) else t5_dense(ffn, ours, theirs)

    return tuple(t5_rules(config, feed_forward))


def _soft(ours: str, theirs: str) -> Iterator[Rule]:
    """Slots [experts · slots, width], their scale [1], and the experts: wi [experts, d_ff, width] (with gates 2 · d_ff,
    the gate first), wo [experts, width, d_ff]."""
    yield Copy(ours + "slots", theirs + "router.slots.weight")
    yield Copy(ours + "scale", theirs + "router.scale")
    yield Copy(ours + "up", theirs + "experts.wi.weight")
    yield Copy(ours + "down", theirs + "experts.wo.weight")
