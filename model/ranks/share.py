"""Which experts of each MoE layer a rank holds, and which decoders can be divided so.

A rank is a process of one engine: rank 0 has everything but experts, and each rank, 0 included, an equal run of every
layer's experts. Not here: what ranks say to each other (`transport.py`), and how a part is loaded (`weights/share.py`).
"""

from dataclasses import dataclass

from model.shapes.decoder import DecoderConfig
from model.shapes.mixtures import TopK

MAX_RANKS = 64


@dataclass(frozen=True, slots=True)
class Share:
    """The part of rank `rank` of `ranks`."""

    rank: int
    ranks: int

    def experts(self, total: int) -> range:
        """Those of a layer with `total` experts: Share(1, 2).experts(5) == range(2, 5)."""
        return range(total * self.rank // self.ranks, total * (self.rank + 1) // self.ranks)


def refusal(config: DecoderConfig, ranks: int) -> str | None:
    """Why a decoder's experts cannot be divided among so many ranks, or None."""
    if config.encoder is not None:
        return f"{ranks} ranks: an encoder-decoder runs in one process"
    if not config.mixtures:
        return f"{ranks} ranks: no layer has experts to divide"
    for shape in config.mixtures:
        if not isinstance(shape, TopK):
            kind = type(shape).__name__
            return f"{ranks} ranks: layers of the kind {kind} run in one process; only experts of top-k routers divide"
        if shape.experts < ranks:
            return f"{ranks} ranks: a layer has {shape.experts} experts, fewer than ranks"
    return None
