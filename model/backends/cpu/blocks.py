"""The blocks of a decoder layer on native kernels: packed weights, in the order in which the kernels take them.

Each is made from the plain-torch module that defines it, whose values it computes. No requests, no files here.
"""

import statistics
import time
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from model.attention.attention import SelfAttention
from model.backends.cpu.kernels.pack import INPUTS, OUTPUTS, Kind, Packed, interleave, kind_for, pack
from model.layers import DenseFFN, RMSNorm
from model.moe.infinity import InfinityMixture
from model.moe.topk import TopKMixture
from model.noise import normal_table
from model.shapes.decoder import Activation, Infinity, TopK

Quantize = Literal["none", "int8", "int8-weights"]
ACTIVATIONS: dict[Activation, int] = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3}  # as in csrc/kernels.h
GROUPED_UNITS = 64  # a mixture whose blocks are narrower is run in groups of so many units
EVERY = 1 << 40  # more units than there are
ops = torch.ops.moedial


@dataclass(frozen=True, slots=True)
class Precision:
    """How the weights are kept: the model's own values, int8 experts, or int8 everywhere but in routers."""

    base: Kind
    quantize: Quantize = "none"
    experts_only: bool = True

    @property
    def experts(self) -> Kind:
        return self.base if self.quantize == "none" else self.quantize

    @property
    def linears(self) -> Kind:
        return self.base if self.experts_only else self.experts


def precision_for(dtype: torch.dtype, quantize: Quantize = "none", experts_only: bool = True) -> Precision:
    """The precision of a model that is loaded in `dtype`."""
    return Precision(kind_for(dtype), quantize, experts_only)


def norm_args(norm: nn.Module) -> tuple[Tensor | None, Tensor | None, float]:
    """Weight, bias and epsilon in float32; without a weight for the identity."""
    if isinstance(norm, nn.Identity):
        return None, None, 0.0
    bias = getattr(norm, "bias", None)
    return _weight(norm), None if bias is None else _float(bias), float(norm.eps)  # type: ignore[arg-type]


def _weight(norm: nn.Module) -> Tensor:
    """A norm's weights as they multiply."""
    return _float(norm.weight) + getattr(norm, "offset", 0.0)


def _float(weight: object) -> Tensor:
    assert isinstance(weight, Tensor)
    return weight.detach().float().contiguous()


def _words(packed: Packed) -> tuple[Tensor, Tensor | None]:
    return packed.words, packed.side


@dataclass(frozen=True, slots=True)
class Block:
    """x += f(norm(x)): a method of `Program` (csrc/program.h) and its arguments. The op of that name, `_block` behind,
    takes them after a step's rows."""

    kind: Literal["attention", "topk", "infinity", "ffn"]
    args: tuple[object, ...]


def attention_block(norm: nn.Module, module: SelfAttention, rotary: Tensor | None, precision: Precision) -> Block:
    """Norm, queries, keys and values, rotary positions, cache, attention and output projection."""
    shape, rule = module.shape, module.rule
    norms = [getattr(module, name, None) for name in ("q_norm", "k_norm")]
    args = (
        *norm_args(norm),
        *_words(pack(module.qkv.weight, precision.linears)),
        None if module.qkv.bias is None else _float(module.qkv.bias),
        *(None if n is None else _weight(n) for n in norms),
        shape.qk_norm == "head",
        shape.clip or 0.0,
        rotary,
        *_words(pack(module.out.weight, precision.linears)),
        None if module.out.bias is None else _float(module.out.bias),
        shape.heads,
        rule.scale,
        rule.window,
        0.0,
        None if rule.sinks_H is None else _float(rule.sinks_H),
    )
    return Block("attention", args)


def topk_block(norm: nn.Module, module: TopKMixture, precision: Precision) -> Block:
    """Norm, router, ragged experts and their weighted sum."""
    config: TopK = module.config
    args = (
        *norm_args(norm),
        *_words(pack(module.router, precision.base)),
        *_words(pack(interleave(module.gate_up), precision.experts)),
        *_words(pack(padded(module.down), precision.experts)),
        config.experts,
        config.width,
        ACTIVATIONS[config.activation],
        config.router.normalise,
    )
    return Block("topk", args)


def infinity_block(mixture: int, norm: nn.Module, module: InfinityMixture, precision: Precision) -> Block:
    """Norm, draws, masks and the kept blocks of the wide layer."""
    config: Infinity = module.config
    width = module.up.shape[1]
    units = config.block if config.block % 16 == 0 else grouped_units(config)
    up, down = blocks_of(module, units)
    narrow = units != config.block and precision.experts == precision.base and width % OUTPUTS == 0
    args = (
        *norm_args(norm),
        *_words(pack(module.router, precision.base)),
        pack(module.scores, "float").words,  # which blocks win is decided in float32
        config.space,
        *_words(pack(up, precision.experts)),
        *_words(pack(down, precision.experts)),
        config.units,
        units,
        config.blocks,
        config.kept,
        ACTIVATIONS[config.activation],
        normal_table(),
        mixture,
        config.sigma_link == "exp",
        config.sigma_min,
        config.draws == "antithetic",
        *(unit_rows(module) if narrow else (None, None)),
    )
    return Block("infinity", (*args, crossover(args, width, config.block) if narrow else 0))


def crossover(args: tuple[object, ...], width: int, share: int) -> int:
    """How many kept units cost as much one by one as all units in one pass. Both give the same bits."""
    one, x_TD = torch.ones(1, dtype=torch.int64), torch.ones(1, width)

    def run(few: int) -> Tensor:
        load_E: Tensor = ops.infinity_block(x_TD.clone(), one, one, one, 1, *args, few)
        return load_E

    def seconds(few: int) -> float:
        started = time.perf_counter()
        run(few)
        return time.perf_counter() - started

    kept = int(run(0).sum()) * share
    pass_s, rows_s = (statistics.median(seconds(few) for _ in range(5)) for few in (0, EVERY))
    return int(kept * pass_s / rows_s)


def padded(down: Tensor) -> Tensor:
    """Down [..., D, F] with as many units as the panels of up have outputs: a multiple of 16."""
    return nn.functional.pad(down, (0, -down.shape[-1] % OUTPUTS))


def unit_rows(module: InfinityMixture) -> tuple[Tensor, Tensor]:
    """Up [F, D'] and down [F, D], unit by unit, D' padded to what the kernels read."""
    width = module.up.shape[1]
    return nn.functional.pad(module.up, (0, -width % INPUTS)).contiguous(), module.down.T.contiguous()


def grouped_units(config: Infinity) -> int:
    """The narrowest multiple of 16 and of the block that is not under `GROUPED_UNITS`."""
    units = config.block
    while units % 16 or units < GROUPED_UNITS:
        units += config.block
    return units


def blocks_of(module: InfinityMixture, units: int) -> tuple[Tensor, Tensor]:
    """Up [B, units, D] and down [B, D, units] of each run of `units` units, the last padded with zeros."""
    pad = -module.config.units % units
    up = nn.functional.pad(module.up, (0, 0, 0, pad)).unflatten(0, (-1, units))
    down = nn.functional.pad(module.down, (0, pad)).unflatten(1, (-1, units)).transpose(0, 1)
    return up, down


def ffn_block(norm: nn.Module, module: DenseFFN, precision: Precision) -> Block:
    """Norm and a dense feed-forward layer: a single expert that every token uses."""
    config = module.config
    up: Tensor = interleave(module.up.weight) if config.gated else module.up.weight
    up_bias: Tensor | None = module.up.bias
    if up_bias is not None:
        up_bias = interleave(up_bias[:, None])[:, 0] if config.gated else up_bias
        up_bias = nn.functional.pad(_float(up_bias), (0, -len(up_bias) % 16))
    down_bias = module.down.bias
    args = (
        *norm_args(norm),
        *_words(pack(up, precision.linears)),
        up_bias,
        *_words(pack(padded(module.down.weight), precision.linears)),
        None if down_bias is None else _float(down_bias),
        config.width,
        config.gated,
        ACTIVATIONS[config.activation],
    )
    return Block("ffn", args)


def feed_forward_block(norm: nn.Module, module: nn.Module, mixture: int, precision: Precision) -> Block:
    """The native form of one layer's feed-forward part; `mixture` is its number among the MoE layers."""
    if isinstance(module, TopKMixture):
        return topk_block(norm, module, precision)
    if isinstance(module, InfinityMixture):
        return infinity_block(mixture, norm, module, precision)
    assert isinstance(module, DenseFFN) and isinstance(norm, RMSNorm | nn.LayerNorm)
    return ffn_block(norm, module, precision)
