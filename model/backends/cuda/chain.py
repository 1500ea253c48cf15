"""Makes the sublayers of a decoder's chain from its loaded layers: on kernels where `refusal.py` lets a shape pass,
else in plain torch. Weights are not copied, unless they are to have 8 bits.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

from torch import nn

from model.attention.attention import SelfAttention
from model.attention.gated_delta_net import GatedDeltaNetAttention
from model.attention.mla import MLAAttention
from model.backends.cuda.attention import attention_layer
from model.backends.cuda.delta import delta_layer
from model.backends.cuda.infinity import infinity_layer
from model.backends.cuda.kernels.norm import Norm
from model.backends.cuda.kernels.operands import Weight
from model.backends.cuda.latent import latent_layer
from model.backends.cuda.layer import SharedExpert, moe_layer
from model.backends.cuda.quantise import Precision
from model.backends.cuda.refusal import layer_refusal
from model.backends.cuda.sublayers import (
    DenseLayer,
    InfiniteMixture,
    LatentAttention,
    PagedAttention,
    PlainLayer,
    RecurrentLayer,
    SparseMixture,
    Sublayer,
)
from model.decoder import Layer
from model.layers import DenseFFN, RMSNorm
from model.moe.infinity import InfinityMixture
from model.moe.topk import TopKMixture
from model.shapes.decoder import DecoderConfig

Kept = TypeVar("Kept")  # the weights of a layer: a dataclass


def norm_of(module: nn.Module) -> Norm:
    """The norm of a module of `norm_layer`."""
    if isinstance(module, RMSNorm):
        return Norm(module.weight, module.eps, offset=module.offset)
    assert isinstance(module, nn.LayerNorm)
    return Norm(module.weight, module.eps, module.bias, layer=True)


def attention_of(layer: Layer, config: DecoderConfig, at: int, precision: Precision) -> Sublayer:
    """The attention of layer `at`."""
    module, linear = layer.attention, precision.linear
    if layer_refusal(config.attention[at]) is not None:
        return PlainLayer(module, at)
    if isinstance(module, GatedDeltaNetAttention):
        return RecurrentLayer(_converted(delta_layer(module), linear, "project", "rates", "out"), at)
    if isinstance(module, MLAAttention):
        return LatentAttention(_converted(latent_layer(module), linear, "query_down", "query", "down", "out"), at)
    assert isinstance(module, SelfAttention)
    made = attention_layer(module, config.norm_eps, config.norm_offset)
    return PagedAttention(_converted(made, linear, "qkv", "out"), at)


def feed_forward_of(layer: Layer, config: DecoderConfig, at: int, precision: Precision) -> Sublayer:
    """What follows the attention of layer `at`."""
    shapes, module = config.feed_forward, layer.ffn
    shape, before = shapes[at], shapes[:at]
    number = sum(one.num_experts > 0 for one in before)
    if layer_refusal(shape) is not None:
        memory = len(config.attention) + sum(one.memory is not None for one in before)  # if it keeps something
        return PlainLayer(module, memory, number if shape.num_experts > 0 else None, layer.repair)
    if isinstance(module, TopKMixture):
        made = _converted(moe_layer(module, layer.repair), precision.experts, "gate_up", "down")
        shared = None if made.shared is None else _converted(made.shared, precision.linear, "up", "down")
        return SparseMixture(replace(made, shared=shared), shape.trained, number)
    if isinstance(module, InfinityMixture):
        return InfiniteMixture(infinity_layer(module), number, layer.repair)
    assert isinstance(module, DenseFFN)
    return DenseLayer(_converted(_dense_layer(module), precision.linear, "up", "down"))


def _dense_layer(module: DenseFFN) -> SharedExpert:
    shape = module.config
    up_bias, down_bias = (linear.bias[None] if shape.bias else None for linear in (module.up, module.down))
    up = Weight(module.up.weight[None], up_bias, shape.activation, gated=shape.gated)
    return SharedExpert(up, Weight(module.down.weight[None], down_bias))


def _converted(layer: Kept, convert: Callable[[Weight], Weight], *names: str) -> Kept:
    """The layer with these weights, where it has them, as they are to be kept."""
    there = {name: weight for name in names if (weight := getattr(layer, name)) is not None}
    return replace(layer, **{name: convert(weight) for name, weight in there.items()})  # type: ignore[type-var]
