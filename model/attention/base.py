"""The seam behind which tokens see each other: a mixer computes, an `Attend` knows where a sequence's past is kept.

A mixer never learns whether a step is a whole sequence or a chunk of one over a paged cache. No requests, no blocks
here.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from model.attention.rope import Tables
from model.shapes.attention import Rope


@dataclass(frozen=True, slots=True)
class Rule:
    """What a query sees beside causality, and how strongly. `sinks_H`: logits that take weight and give nothing."""

    scale: float
    window: int = 0  # positions, itself included; 0: all
    chunk: int = 0  # only within the same run of so many positions; 0: all
    sinks_H: Tensor | None = None


class Attend(Protocol):
    """One step's access to the past of its sequences."""

    def __call__(self, layer: int, q_THC: Tensor, k_TGC: Tensor, v_TGV: Tensor | int, rule: Rule) -> Tensor:
        """Returns [T, H, V]. Keys and values of this step are included; G divides H. Values that are a number are the
        first so many columns of the keys."""

    def states(self, layer: int, rows: int, size: int) -> Iterator[tuple[slice, Tensor, bool]]:
        """For each sequence of the step's `rows` tokens: its rows, the layer's state of `size` values, written in
        place, and whether the sequence starts with this step, so that the state is still anybody's."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a step's tokens are, for one layer: the rotary tables of every kind that the decoder uses, positions, and
    the past."""

    layer: int
    positions_T: Tensor
    tables: dict[Rope, Tables]
    attend: Attend


class MixerModule(nn.Module):
    """y_TD = f(x_TD), tokens of a sequence seeing those before them.

    `reusable`: the past is pages, so that a prefix can be shared; False gives up the prefix cache.
    """

    reusable: bool = True

    def forward(self, x_TD: Tensor, place: Place) -> Tensor:
        raise NotImplementedError
