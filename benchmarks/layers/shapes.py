"""The mixture layers that `benchmarks.layer` measures: their shapes, random weights, inputs, and what a call must
move and compute at least. It runs nothing and knows no system."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from model.batch import LayerBudget
from model.registry import LayerModule
from model.shapes.mixtures import Infinity, Router, TopK
from model.step import LayerStep, Observer

Parameters = dict[str, Tensor]
COLD_BYTES = 256 << 20  # copies of a layer that together no cache holds
LARGEST_COUNT = 8


@dataclass(frozen=True, slots=True)
class Shape:
    """One layer; `width` is the model's."""

    name: str
    width: int
    kind: TopK | Infinity

    @property
    def call_weights(self) -> int:
        """Weights of one expert (∞-MoE: of one block)."""
        kind = self.kind
        if isinstance(kind, Infinity):
            return 2 * self.width * kind.block
        return 3 * self.width * kind.width

    @property
    def experts(self) -> int:
        return self.kind.blocks if isinstance(self.kind, Infinity) else self.kind.experts

    @property
    def copies(self) -> int:
        """How many sets of weights take turns, so that none is still in the cache when its turn comes again."""
        return 1 + -(-COLD_BYTES // (2 * self.experts * self.call_weights))


OLMOE = TopK(experts=64, width=512, trained=8, router=Router())
MIXTRAL = TopK(experts=8, width=2048, trained=2, router=Router(normalise=True))
INFINITY = Infinity(units=12288, latent_dim=64, keep_ratio=0.25, trained=2, maximum=LARGEST_COUNT, block=64)
SHAPES = (Shape("olmoe", 1024, OLMOE), Shape("mixtral", 1024, MIXTRAL), Shape("infinity", 768, INFINITY))


def parameters(shape: Shape, seed: int) -> Parameters:
    """bf16 weights of std 1/sqrt(fan-in). ∞-MoE: means of std 1, and exp(0) = 1 as spread of the draws around them."""
    generator = torch.Generator().manual_seed(seed)

    def matrix(*size: int) -> Tensor:
        return (torch.randn(*size, generator=generator) * size[-1] ** -0.5).bfloat16()

    kind, width = shape.kind, shape.width
    if isinstance(kind, TopK):
        gate_up = matrix(kind.experts, 2 * kind.width, width)
        down = matrix(kind.experts, width, kind.width)
        return {"router": matrix(kind.experts, width), "gate_up": gate_up, "down": down}
    spreads = torch.zeros(kind.latent_dim, width).bfloat16()
    router = torch.cat([matrix(kind.latent_dim, width), spreads])
    scores = matrix(kind.blocks, kind.latent_dim)
    up, down = matrix(kind.units, width), matrix(width, kind.units)
    return {"router": router, "scores": scores, "up": up, "down": down}


@dataclass(frozen=True, slots=True)
class Call:
    """The input of one call."""

    x_TD: Tensor
    use: LayerStep


def calls(shape: Shape, tokens: int, count: int) -> list[Call]:
    """Different inputs of so many tokens at one count, so that calls choose different experts."""
    generator = torch.Generator().manual_seed(tokens)
    made = []
    for number in range(max(4, min(64, 4096 // tokens))):
        x_TD = torch.randn(tokens, shape.width, generator=generator).bfloat16()
        budget = LayerBudget(torch.full((tokens,), count), count)
        seeds_T = torch.full((tokens,), number)
        made.append(Call(x_TD, LayerStep(budget, seeds_T, torch.arange(tokens))))
    return made


class Load(Observer):
    """Observes mixtures and sums their routed pairs and distinct experts."""

    def __init__(self) -> None:
        self.distinct, self.pairs = 0, 0

    def routed(self, layer: int, pairs: int, load_E: Tensor, scores_TE: Tensor | None) -> None:
        self.distinct += int(load_E.count_nonzero())
        self.pairs += int(load_E.sum())


@dataclass(frozen=True, slots=True)
class Work:
    """What one call must do, mean over the inputs: experts (blocks) read, bytes moved, floating-point operations."""

    distinct: float
    bytes: float
    flops: float


def work(shape: Shape, reference: LayerModule, inputs: list[Call]) -> Work:
    """Bytes: router, distinct experts, tokens in and out; hidden units may stay in the cache. Operations: router, the
    scores of every draw, and each (token, expert) pair; for ∞-MoE a pair is a token and a block of the union it
    keeps."""
    load = Load()
    for call in inputs:
        use = call.use
        reference(call.x_TD, replace(use, observer=load))
    tokens = len(inputs[0].x_TD)
    count = inputs[0].use.budget.k_max
    kind, each = shape.kind, shape.call_weights
    distinct = load.distinct / len(inputs)
    pairs = load.pairs / len(inputs)
    router = reference.get_parameter("router").numel()
    scores = kind.blocks * kind.latent_dim if isinstance(kind, Infinity) else 0
    routed = tokens * router + tokens * count * scores
    read = router + scores + distinct * each
    moved = 2 * (read + 2 * tokens * shape.width)
    return Work(distinct, moved, 2 * (routed + pairs * each))
