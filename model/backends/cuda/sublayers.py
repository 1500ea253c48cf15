"""The two halves of a decoder's layer as steps of a chain: each adds its output to the residual and norms the sum for
the next one. On kernels where a layer has them, else its own module in plain torch over the same cache.

Not here: what the kernels of a layer are (`attention.py`, `layer.py`, `infinity.py`), and how a sublayer is made of a
decoder's layer (`chain.py`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol

from torch import Tensor

from model.backends.cuda.attention import AttentionLayer
from model.backends.cuda.delta import DeltaLayer
from model.backends.cuda.infinity import InfinityLayer
from model.backends.cuda.inputs import StepInputs
from model.backends.cuda.kernels.norm import Norm, residual_norm
from model.backends.cuda.kernels.repair import Repair
from model.backends.cuda.latent import LatentLayer
from model.backends.cuda.layer import MoELayer, SharedExpert, repair_of
from model.backends.cuda.outputs import Chosen, ChosenExperts, ChosenGroups, ReportedChoice
from model.backends.cuda.places import Places
from model.batch import Batch, LayerBudget
from model.moe.repair import RepairTables, repaired
from model.registry import LayerModule
from model.shapes.rope import Rope
from model.step import LayerStep, Past, Tables


@dataclass(frozen=True, slots=True)
class PlainStep:
    """The inputs that layers in plain torch need in addition to those of the kernels."""

    batch: Batch  # on the device
    past: Past


@dataclass(frozen=True, slots=True)
class ResidualStream:
    """The residual of one step, the norm of it that the next sublayer reads, and the inputs that all sublayers share.
    Residual and norm are written in place."""

    inputs: StepInputs
    places: Places
    rotary: Mapping[Rope, Tables]
    k_max: int
    x_TD: Tensor  # the residual
    normed_TD: Tensor
    scale: float  # of what is added to it
    chosen: list[Chosen]  # of the mixtures so far
    plain: PlainStep | None = None

    def add(self, y_TD: Tensor, next_norm: Norm, repair: Repair | None = None) -> None:
        """Add a sublayer's output, repaired, to the residual, and norm the sum."""
        residual_norm(self.x_TD, next_norm, self.normed_TD, y_TD, self.scale, repair)


class Sublayer(Protocol):
    """Attention, or the feed-forward layer or mixture after it."""

    def __call__(self, stream: ResidualStream, next_norm: Norm) -> None:
        """Compute from `stream.normed_TD`, add the output to the residual, and write the norm for the next sublayer."""
        ...


@dataclass(frozen=True, slots=True)
class PagedAttention:
    """Grouped-query attention over pages."""

    layer: AttentionLayer
    memory: int

    def __call__(self, stream: ResidualStream, next_norm: Norm) -> None:
        """See `Sublayer`."""
        inputs, rope = stream.inputs, self.layer.shape.rope
        rotary = None if rope is None else stream.rotary[rope]
        given = (stream.normed_TD, rotary, stream.places, inputs.cache.layers[self.memory], stream.x_TD)
        self.layer(*given, next_norm, stream.normed_TD, stream.scale, inputs.positions_T)


@dataclass(frozen=True, slots=True)
class LatentAttention:
    """Multi-head latent attention over pages."""

    layer: LatentLayer
    memory: int

    def __call__(self, stream: ResidualStream, next_norm: Norm) -> None:
        """See `Sublayer`."""
        rotary, cache_PSGC = stream.rotary[self.layer.shape.rope], stream.inputs.cache.layers[self.memory]
        rows = (stream.x_TD, next_norm, stream.normed_TD, stream.scale)
        self.layer(stream.normed_TD, rotary, stream.places, cache_PSGC, *rows)


@dataclass(frozen=True, slots=True)
class RecurrentLayer:
    """A gated delta net, and the states of its sequences."""

    layer: DeltaLayer
    memory: int

    def __call__(self, stream: ResidualStream, next_norm: Norm) -> None:
        """See `Sublayer`."""
        inputs = stream.inputs
        assert inputs.states_B is not None
        given = (stream.normed_TD, inputs.spans_B3, inputs.states_B, inputs.cache.layers[self.memory], stream.x_TD)
        self.layer(*given, next_norm, stream.normed_TD, stream.scale)


@dataclass(frozen=True, slots=True)
class SparseMixture:
    """Routed experts, and a shared part."""

    layer: MoELayer
    trained: int
    number: int  # among the MoE layers

    def __call__(self, stream: ResidualStream, next_norm: Norm) -> None:
        """See `Sublayer`."""
        inputs = stream.inputs
        rules = None if inputs.rules is None else replace(inputs.rules, trained=self.trained)
        counts_T, rows = inputs.counts_LT[self.number], (stream.x_TD, next_norm, stream.normed_TD, stream.scale)
        stream.chosen.append(ChosenExperts(self.layer(stream.normed_TD, counts_T, stream.k_max, *rows, rules)))


@dataclass(frozen=True, slots=True)
class InfiniteMixture:
    """The draws of an ∞-MoE."""

    layer: InfinityLayer
    number: int  # among the MoE layers
    repair: RepairTables | None = None

    def __call__(self, stream: ResidualStream, next_norm: Norm) -> None:
        """See `Sublayer`."""
        inputs, counts_T = stream.inputs, stream.inputs.counts_LT[self.number]
        step = LayerStep(LayerBudget(counts_T, stream.k_max), inputs.seeds_T, inputs.positions_T, self.number)
        mask_TE = self.layer.masks(stream.normed_TD, step)
        stream.chosen.append(ChosenGroups(mask_TE))
        repair = repair_of(self.repair, counts_T, inputs.rules)
        stream.add(self.layer.run_masked(stream.normed_TD, mask_TE), next_norm, repair)


@dataclass(frozen=True, slots=True)
class DenseLayer:
    """An ordinary feed-forward layer, which every token uses."""

    layer: SharedExpert

    def __call__(self, stream: ResidualStream, next_norm: Norm) -> None:
        """See `Sublayer`."""
        y_TD, _ = self.layer(stream.normed_TD)
        stream.add(y_TD, next_norm)


@dataclass(frozen=True, slots=True)
class PlainLayer:
    """A sublayer's module in plain torch. `number` is that of a mixture among the MoE layers; None: it is none."""

    module: LayerModule
    memory: int
    number: int | None = None
    repair: RepairTables | None = None

    def __call__(self, stream: ResidualStream, next_norm: Norm) -> None:
        """See `Sublayer`."""
        assert stream.plain is not None
        batch, reported = stream.plain.batch, ReportedChoice()
        no_counts = LayerBudget(batch.ids_T.new_empty(0), 0)
        budget = no_counts if self.number is None else batch.budget.layer(self.number)
        step = LayerStep(
            budget=budget,
            seeds_T=batch.seeds_T,
            positions_T=batch.positions_T,
            moe_layer=self.number or 0,
            observer=reported,
            past=stream.plain.past,
            memory=self.memory,
            rotary=stream.rotary,
            routes=batch.routes,
        )
        y_TD = repaired(self.module(stream.normed_TD, step), budget, self.repair)
        if self.number is not None:
            stream.chosen.append(reported)
        stream.add(y_TD.contiguous(), next_norm)
