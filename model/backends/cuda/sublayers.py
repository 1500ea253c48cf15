"""The two halves of a decoder's layer as steps of a chain: each adds its output to the residual and norms the sum for
the next one. On kernels where a layer has them, else its own module in plain torch over the same cache.

Not here: what the kernels of a layer are (`attention.py`, `layer.py`, `infinity.py`), and which layers have none
(`refusal.py`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol

from torch import Tensor, nn

from model.attention.attention import SelfAttention
from model.attention.mla import MLAAttention
from model.backends.cuda.attention import AttentionLayer, attention_layer
from model.backends.cuda.infinity import InfinityLayer, infinity_layer
from model.backends.cuda.inputs import StepInputs
from model.backends.cuda.kernels.norm import Norm, residual_norm
from model.backends.cuda.kernels.operands import Weight
from model.backends.cuda.latent import LatentLayer, latent_layer
from model.backends.cuda.layer import MoELayer, SharedExpert, moe_layer
from model.backends.cuda.outputs import Chosen, ChosenExperts, ChosenGroups, Told
from model.backends.cuda.places import Places
from model.backends.cuda.refusal import layer_refusal
from model.batch import Batch, LayerBudget
from model.decoder import Layer
from model.layers import DenseFFN, RMSNorm
from model.moe.infinity import InfinityMixture
from model.moe.repair import RepairTables, repaired
from model.moe.topk import TopKMixture
from model.registry import LayerModule
from model.shapes.decoder import DecoderConfig
from model.shapes.rope import Rope
from model.step import LayerStep, Past, Tables


@dataclass(frozen=True, slots=True)
class PlainStep:
    """What layers in plain torch need of a step beside the inputs of the kernels."""

    batch: Batch  # on the device
    past: Past


@dataclass(frozen=True, slots=True)
class Stream:
    """What the sublayers of one step share. Residual and norm are written in place."""

    inputs: StepInputs
    places: Places
    rotary: Mapping[Rope, Tables]
    k_max: int
    x_TD: Tensor  # the residual
    normed_TD: Tensor
    scale: float  # of what is added to it
    chosen: list[Chosen]  # of the mixtures so far
    plain: PlainStep | None = None

    def add(self, y_TD: Tensor, next_norm: Norm) -> None:
        """Add a sublayer's output to the residual, and norm it."""
        residual_norm(self.x_TD, next_norm, self.normed_TD, y_TD, self.scale)


class Sublayer(Protocol):
    """Attention, or what follows it."""

    def __call__(self, stream: Stream, next_norm: Norm) -> None:
        """Add its output of `stream.normed_TD` to the residual, and write the next norm."""
        ...


@dataclass(frozen=True, slots=True)
class PagedAttention:
    """Grouped-query attention over pages."""

    layer: AttentionLayer
    memory: int

    def __call__(self, stream: Stream, next_norm: Norm) -> None:
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

    def __call__(self, stream: Stream, next_norm: Norm) -> None:
        """See `Sublayer`."""
        rotary, cache_PSGC = stream.rotary[self.layer.shape.rope], stream.inputs.cache.layers[self.memory]
        rows = (stream.x_TD, next_norm, stream.normed_TD, stream.scale)
        self.layer(stream.normed_TD, rotary, stream.places, cache_PSGC, *rows)


@dataclass(frozen=True, slots=True)
class SparseMixture:
    """Routed experts, and a shared part."""

    layer: MoELayer
    trained: int
    number: int  # among the MoE layers

    def __call__(self, stream: Stream, next_norm: Norm) -> None:
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

    def __call__(self, stream: Stream, next_norm: Norm) -> None:
        """See `Sublayer`."""
        inputs = stream.inputs
        budget = LayerBudget(inputs.counts_LT[self.number], stream.k_max)
        step = LayerStep(budget, inputs.seeds_T, inputs.positions_T, self.number)
        mask_TE = self.layer.masks(stream.normed_TD, step)
        stream.chosen.append(ChosenGroups(mask_TE))
        stream.add(self.layer.run_masked(stream.normed_TD, mask_TE), next_norm)


@dataclass(frozen=True, slots=True)
class DenseLayer:
    """An ordinary feed-forward layer, which every token uses."""

    layer: SharedExpert

    def __call__(self, stream: Stream, next_norm: Norm) -> None:
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

    def __call__(self, stream: Stream, next_norm: Norm) -> None:
        """See `Sublayer`."""
        assert stream.plain is not None
        batch, told = stream.plain.batch, Told()
        no_counts = LayerBudget(batch.ids_T.new_empty(0), 0)
        budget = no_counts if self.number is None else batch.budget.layer(self.number)
        step = LayerStep(
            budget=budget,
            seeds_T=batch.seeds_T,
            positions_T=batch.positions_T,
            moe_layer=self.number or 0,
            observer=told,
            past=stream.plain.past,
            memory=self.memory,
            rotary=stream.rotary,
            routes=batch.routes,
        )
        y_TD = repaired(self.module(stream.normed_TD, step), budget, self.repair)
        if self.number is not None:
            stream.chosen.append(told)
        stream.add(y_TD.contiguous(), next_norm)


def norm_of(module: nn.Module) -> Norm:
    """The norm of a module of `norm_layer`."""
    if isinstance(module, RMSNorm):
        return Norm(module.weight, module.eps, offset=module.offset)
    assert isinstance(module, nn.LayerNorm)
    return Norm(module.weight, module.eps, module.bias, layer=True)


def attention_of(layer: Layer, config: DecoderConfig, memory: int) -> Sublayer:
    """A layer's attention. `memory` is its index in `config.memory`."""
    module = layer.attention
    if layer_refusal(config.attention[memory]) is not None:
        return PlainLayer(module, memory)
    if isinstance(module, MLAAttention):
        return LatentAttention(latent_layer(module), memory)
    assert isinstance(module, SelfAttention)
    return PagedAttention(attention_layer(module, config.norm_eps, config.norm_offset), memory)


def feed_forward_of(layer: Layer, config: DecoderConfig, at: int) -> Sublayer:
    """What follows the attention of layer `at`."""
    shapes, module = config.feed_forward, layer.ffn
    shape, before = shapes[at], shapes[:at]
    number = sum(one.num_experts > 0 for one in before)
    if layer_refusal(shape) is not None:
        memory = len(config.attention) + sum(one.memory is not None for one in before)  # if it keeps something
        return PlainLayer(module, memory, number if shape.num_experts > 0 else None, layer.repair)
    if isinstance(module, TopKMixture):
        return SparseMixture(moe_layer(module), shape.trained, number)
    if isinstance(module, InfinityMixture):
        return InfiniteMixture(infinity_layer(module), number)
    assert isinstance(module, DenseFFN)
    return DenseLayer(_dense_layer(module))


def _dense_layer(module: DenseFFN) -> SharedExpert:
    shape = module.config
    up_bias, down_bias = (linear.bias[None] if shape.bias else None for linear in (module.up, module.down))
    up = Weight(module.up.weight[None], up_bias, shape.activation, gated=shape.gated)
    return SharedExpert(up, Weight(module.down.weight[None], down_bias))
