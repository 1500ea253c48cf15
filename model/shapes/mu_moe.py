"""The shape of a multilinear mixture of experts, whose experts share the factors of one tensor.

A frozen value that families build from a checkpoint's config.json; what no model can have is a ValueError.
"""

from dataclasses import dataclass
from math import prod
from typing import Literal

from model.shapes.checks import counts, one_of, sizes
from model.shapes.feed_forward import TokenLocal
from model.shapes.mixtures import MAX_EXPERTS, Activation
from model.shapes.soft import Restriction
from model.shapes.work import TokenWork

Factorisation = Literal["cp", "tr"]
GateNorm = Literal["layer", "none"]
RANKS = {"cp": 1, "tr": 3}  # how many ranks each has


@dataclass(frozen=True, slots=True)
class MuMoE(TokenLocal):
    """Two factorised maps with an activation between them (µMoE, arXiv 2402.12550), and one sparse gate for both.

    The gate gives many experts exactly zero, so that a count is an upper bound. Whatever the count, all factors are
    read and multiplied. Errors name the keys of config.json.
    """

    experts: int
    width: int  # between the two maps
    trained: int
    factorisation: Factorisation
    ranks: tuple[int, ...]  # "cp": one; "tr": r1, r2, r3, where experts join r1 and r2, inputs r2 and r3
    activation: Activation = "gelu"
    bias: bool = True  # of the maps: a further input that is 1
    gate_norm: GateNorm = "layer"  # of the gate's logits, without parameters
    gate_bias: bool = False
    input_norm: bool = True  # a layer norm of what the first map reads; the gate reads its input
    restriction: Restriction = "renormalise"
    experts_per_draw = 0
    shared_experts = 0
    fixed = False

    def __post_init__(self) -> None:
        sizes(num_experts=self.experts, intermediate_size=self.width)
        if self.experts > MAX_EXPERTS:
            raise ValueError(f"num_experts must be at most {MAX_EXPERTS}, got {self.experts}")
        counts(self.trained, self.experts)
        one_of("factorisation", self.factorisation, Factorisation)
        one_of("hidden_act", self.activation, Activation)
        one_of("gate_norm", self.gate_norm, GateNorm)
        one_of("restriction", self.restriction, Restriction)
        if len(self.ranks) != RANKS[self.factorisation]:
            raise ValueError(
                f"factorisation {self.factorisation!r} has {RANKS[self.factorisation]} ranks, got {self.ranks!r:.60}"
            )
        for rank in self.ranks:
            sizes(ranks=rank)

    @property
    def num_experts(self) -> int:
        """All experts of the gate."""
        return self.experts

    @property
    def maximum(self) -> int:
        """All of them: the model as published."""
        return self.experts

    @property
    def adaptive(self) -> bool:
        """A token uses no expert of weight zero."""
        return True

    @property
    def rule_refusal(self) -> str:
        """A rule is for experts that run or not."""
        return "a µMoE takes counts alone"

    def factor_shapes(self, inputs: int, outputs: int) -> tuple[tuple[int, ...], ...]:
        """The shapes of a map's factors, of its experts, its inputs and its outputs."""
        columns = inputs + self.bias
        if self.factorisation == "cp":
            (rank,) = self.ranks
            return (self.experts, rank), (columns, rank), (outputs, rank)
        first, second, third = self.ranks
        return (first, self.experts, second), (second, columns, third), (third, outputs, first)

    def token_work(self, width: int, count: float) -> TokenWork:
        """The gate and all factors, whatever the count; what joins the ranks has no weights."""
        both = (*self.factor_shapes(width, self.width), *self.factor_shapes(self.width, width))
        weights = self.experts * width + sum(map(prod, both))
        return TokenWork(weights, 0, weights + 2 * prod(self.ranks))
