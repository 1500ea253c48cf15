"""The tensors of Switch Transformers: T5's, with each expert under a number of its own. It opens no files."""

from collections.abc import Iterator

from model.shapes.decoder import DecoderConfig
from model.shapes.feed_forward import FeedForward
from model.shapes.mixtures import TopK
from weights.rules import Copy, Rule, Stack
from weights.t5_layout import dense, t5_rules


def rules(config: DecoderConfig) -> tuple[Rule, ...]:
    """Every rule."""

    def feed_forward(ffn: FeedForward, ours: str, theirs: str) -> Iterator[Rule]:
        theirs += "mlp."
        return _mixture(ffn, config.width, ours, theirs) if isinstance(ffn, TopK) else dense(ffn, ours, theirs)

    return tuple(t5_rules(config, feed_forward))


def _mixture(ffn: TopK, width: int, ours: str, theirs: str) -> Iterator[Rule]:
    yield Copy(ours + "router", theirs + "router.classifier.weight")
    if ffn.router.logit_bias:
        yield Copy(ours + "router_bias", theirs + "router.classifier.bias")
    expert = theirs + "experts.expert_{e}."
    yield Stack(ours + "gate_up", (expert + "wi.weight",), (ffn.width,), ffn.experts)
    yield Stack(ours + "down", (expert + "wo.weight",), (width,), ffn.experts)
