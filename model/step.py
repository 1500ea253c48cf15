"""What a sublayer (attention or feed-forward) sees of a step: expert counts, positions and noise seeds of its tokens,
and the cache of their past.

Attention and feed-forward modules take the same value, a `LayerStep`, so that a mixture may look at other tokens of its
sequences as attention does. How the past is kept (whole sequences, pages, states) is a backend's business. No requests,
no blocks here.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from torch import Tensor

from model.batch import LayerBudget, Part, Span
from model.noise import normal
from model.shapes.rope import Rope

Tables = tuple[Tensor, Tensor]  # cosines and sines of rotary positions


@dataclass(frozen=True, slots=True)
class DistanceBias:
    """A bias on the score of a query and a key by their distance, query - key. `bias_HX` has the values from the
    distance `least` on; a distance beyond its ends gets the value of the nearer end."""

    bias_HX: Tensor
    least: int

    def at(self, query: Tensor, key: Tensor) -> Tensor:
        """[H, …] float32 for the positions of queries and keys, which broadcast."""
        distance = (query - key - self.least).clamp(0, self.bias_HX.shape[1] - 1)
        return self.bias_HX[:, distance].float()


@dataclass(frozen=True, slots=True)
class MaskSpec:
    """Which keys a query sees, and how scores are changed. `sinks_H`: a further logit of each head in the softmax,
    without a value."""

    scale: float
    window: int = 0  # positions, itself included; 0: all
    chunk: int = 0  # only within the same run of so many positions; 0: all
    sinks_H: Tensor | None = None
    causal: bool = True  # nothing after itself
    bias: DistanceBias | None = None


class Past(Protocol):
    """One step's access to what is kept of its sequences, over all layers. `memory`: index in `config.memory`."""

    def attend(self, memory: int, q_THC: Tensor, k_TGC: Tensor, v_TGV: Tensor | int, spec: MaskSpec) -> Tensor:
        """Attention [T, H, V]. Keys and values of this step are included; G divides H. Values that are a number are the
        first so many columns of the keys. A negative memory keeps nothing: keys and values are those of this step."""

    def part(self, parts: Sequence[Part]) -> "Past":
        """Access for a layer that runs on some rows only, or whose rows attend to other positions than those before
        them."""

    def spans(self, rows: int) -> tuple[Span, ...]:
        """Each sequence's part of the step's `rows` tokens."""

    def states(self, memory: int, rows: int, size: int) -> Iterator[tuple[slice, Tensor, bool]]:
        """For each sequence of the step's `rows` tokens: its rows, the state of `size` values, written in place, and
        whether the sequence starts with this step, so that the state is still another sequence's. A sequence comes in
        parts where copies of its state are wanted between them."""


class Observer(Protocol):
    """Gets a report of each MoE layer's work: for metrics while serving, for balance losses while training.

    A subclass must define `routed`; by default the other reports are dropped.
    """

    def routed(self, layer: int, pairs: int, load_E: Tensor, scores_TE: Tensor | None) -> None:
        """`pairs`: how many were computed, or an upper bound where `used` is reported too; `load_E`: tokens per expert
        (∞-MoE: per group); `scores_TE`: router probabilities."""

    def routed_all(self, pairs_L: Sequence[int], load_N: Tensor, experts: Sequence[int]) -> None:
        """`routed` of all mixtures at once, without scores. `load_N` has their loads one after the other, `experts` how
        many values each has."""
        for layer, (pairs, load_E) in enumerate(zip(pairs_L, load_N.split(list(experts)), strict=True)):
            self.routed(layer, pairs, load_E, None)

    def used(self, layer: int, used_T: Tensor) -> None:
        """Int64: how many pairs each token ran, 0 if it does not run this layer. Reported only if that does not follow
        from the counts: with adaptive rules, dropped choices, or layers that not all tokens run."""
        return None

    def routes(self, layer: int, expert_TK: Tensor) -> None:
        """Int32: each token's experts, best first, then -1 if it ran fewer; ∞-MoE: the groups that it kept, in rising
        order. Reported only with `Batch.routes`."""
        return None


@dataclass(frozen=True, slots=True)
class LayerStep:
    """One sublayer's view of a step of T tokens. Dense layers have no counts."""

    budget: LayerBudget  # what each token may use in this layer
    seeds_T: Tensor  # noise seeds
    positions_T: Tensor
    moe_layer: int = 0  # its number among the MoE layers: keys noise, and names the layer to the observer
    observer: Observer | None = None
    past: Past | None = None
    memory: int = -1  # index of its cache in `config.memory` and `Cache.layers`; -1: it keeps nothing
    rotary: Mapping[Rope, Tables] = field(default_factory=dict)  # of every kind that the decoder uses
    bias: DistanceBias | None = None  # of this layer's attention
    routes: bool = False  # whether the observer wants every token's experts
    router_logits: list[Tensor] = field(default_factory=list)  # of the mixtures before this one, [T, E] each

    def attend(self, q_THC: Tensor, k_TGC: Tensor, v_TGV: Tensor | int, spec: MaskSpec) -> Tensor:
        """`Past.attend` with this sublayer's cache."""
        assert self.past is not None
        biased = spec if self.bias is None else replace(spec, bias=self.bias)
        return self.past.attend(self.memory, q_THC, k_TGC, v_TGV, biased)

    def states(self, size: int) -> Iterator[tuple[slice, Tensor, bool]]:
        """`Past.states` of this sublayer."""
        assert self.past is not None
        return self.past.states(self.memory, len(self.positions_T), size)

    @property
    def spans(self) -> tuple[Span, ...]:
        """The rows of each sequence."""
        assert self.past is not None
        return self.past.spans(len(self.positions_T))

    def noise(self, token_R: Tensor, sample_R: Tensor, width: int) -> Tensor:
        """ε_RZ ~ N(0, I) for (token, sample) rows; the same for a token whatever the batch."""
        return normal(self.seeds_T[token_R], self.moe_layer, self.positions_T[token_R], sample_R, width)
