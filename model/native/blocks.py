"""The blocks of a decoder layer on native kernels: packed weights, and one op for each x += f(norm(x)).

Each is made from the plain-torch module that defines it, whose values it computes. No requests, no files here.
"""

import statistics
import time
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from model.batch import Batch
from model.config import Activation, Infinity, TopK
from model.kernels.pack import INPUTS, OUTPUTS, Kind, Packed, interleave, kind_for, pack
from model.layers import DenseFFN, RMSNorm, SelfAttention
from model.mixture.infinity import InfinityMixture
from model.mixture.seam import Observer
from model.mixture.topk import TopKMixture
from model.native.cache import NativePages
from model.noise import normal_table

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
    weight, bias = norm.weight, getattr(norm, "bias", None)
    return _float(weight), None if bias is None else _float(bias), float(norm.eps)  # type: ignore[arg-type]


def _float(weight: object) -> Tensor:
    assert isinstance(weight, Tensor)
    return weight.detach().float().contiguous()


def _words(packed: Packed) -> tuple[Tensor, Tensor | None]:
    return packed.words, packed.side


class NativeBlock(Protocol):
    """x += f(norm(x)), in place, for the rows of a step."""

    def __call__(self, x_TD: Tensor, batch: Batch, pages: NativePages, observer: Observer | None) -> None: ...


class NativeAttention:
    """Norm, queries, keys and values, rotary positions, cache, attention and output projection in one op."""

    def __init__(
        self, layer: int, norm: nn.Module, module: SelfAttention, rotary: Tensor | None, precision: Precision
    ) -> None:
        config = module.config
        norms = [getattr(module, name, None) for name in ("q_norm", "k_norm")]
        self.layer, self.op = layer, ops.attention_block.default  # resolved once: a look-up takes as long as a small op
        self.args = (
            *norm_args(norm),
            *_words(pack(module.qkv.weight, precision.linears)),
            None if module.qkv.bias is None else _float(module.qkv.bias),
            *(None if n is None else _float(n.weight) for n in norms),
            False,
            config.clip_qkv or 0.0,
            rotary,
            *_words(pack(module.out.weight, precision.linears)),
            None if module.out.bias is None else _float(module.out.bias),
            config.heads,
            config.head_width**-0.5,
            0,
            0.0,
            None,
        )

    def __call__(self, x_TD: Tensor, batch: Batch, pages: NativePages, observer: Observer | None) -> None:
        cache = pages.cache
        self.op(x_TD, cache.layers[self.layer], pages.spans_B3, pages.tables_BP, cache.block_size, *self.args)


class NativeTopK:
    """Norm, router, ragged experts and their weighted sum in one op."""

    def __init__(self, mixture: int, norm: nn.Module, module: TopKMixture, precision: Precision) -> None:
        config: TopK = module.config
        self.mixture, self.op = mixture, ops.topk_block.default
        self.args = (
            *norm_args(norm),
            *_words(pack(module.router, precision.base)),
            *_words(pack(interleave(module.gate_up), precision.experts)),
            *_words(pack(padded(module.down), precision.experts)),
            config.experts,
            config.width,
            ACTIVATIONS[config.activation],
            config.normalise,
        )

    def __call__(self, x_TD: Tensor, batch: Batch, pages: NativePages, observer: Observer | None) -> None:
        load_E = self.op(x_TD, batch.experts_LT[self.mixture], batch.k_max, *self.args)
        if observer is not None:
            observer.routed(self.mixture, batch.pairs_L[self.mixture], load_E, None)


class NativeInfinity:
    """Norm, draws, masks and the kept blocks of the wide layer in one op."""

    def __init__(self, mixture: int, norm: nn.Module, module: InfinityMixture, precision: Precision) -> None:
        config: Infinity = module.config
        units = config.block if config.block % 16 == 0 else grouped_units(config)
        up, down = blocks_of(module, units)
        narrow = units != config.block and precision.experts == precision.base and module.up.shape[1] % OUTPUTS == 0
        rows = unit_rows(module) if narrow else (None, None)
        self.op = ops.infinity_block.default
        self.mixture, self.width, self.share = mixture, module.up.shape[1], config.block
        self.args = (
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
            *rows,
        )
        self.few = self._crossover() if rows[0] is not None else 0

    def __call__(self, x_TD: Tensor, batch: Batch, pages: NativePages, observer: Observer | None) -> None:
        counts_T = batch.experts_LT[self.mixture]
        load_E = self._run(x_TD, counts_T, batch.seeds_T, batch.positions_T, batch.k_max, self.few)
        if observer is not None:
            observer.routed(self.mixture, batch.pairs_L[self.mixture], load_E, None)

    def _run(
        self, x_TD: Tensor, counts_T: Tensor, seeds_T: Tensor, positions_T: Tensor, k_max: int, few: int
    ) -> Tensor:
        load_E: Tensor = self.op(x_TD, counts_T, seeds_T, positions_T, k_max, *self.args, few)
        return load_E

    def _crossover(self) -> int:
        """How many kept units cost as much one by one as all units in one pass. Both give the same bits."""
        one, x_TD = torch.ones(1, dtype=torch.int64), torch.ones(1, self.width)

        def seconds(few: int) -> float:
            started = time.perf_counter()
            self._run(x_TD.clone(), one, one, one, 1, few)
            return time.perf_counter() - started

        kept = int(self._run(x_TD.clone(), one, one, one, 1, 0).sum()) * self.share
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


class NativeFFN:
    """Norm and a dense feed-forward layer in one op: a single expert that every token uses."""

    def __init__(self, norm: nn.Module, module: DenseFFN, precision: Precision) -> None:
        config = module.config
        up: Tensor = interleave(module.up.weight) if config.gated else module.up.weight
        up_bias: Tensor | None = module.up.bias
        if up_bias is not None:
            up_bias = interleave(up_bias[:, None])[:, 0] if config.gated else up_bias
            up_bias = nn.functional.pad(_float(up_bias), (0, -len(up_bias) % 16))
        down_bias = module.down.bias
        self.op = ops.ffn_block.default
        self.args = (
            *norm_args(norm),
            *_words(pack(up, precision.linears)),
            up_bias,
            *_words(pack(padded(module.down.weight), precision.linears)),
            None if down_bias is None else _float(down_bias),
            config.width,
            config.gated,
            ACTIVATIONS[config.activation],
        )

    def __call__(self, x_TD: Tensor, batch: Batch, pages: NativePages, observer: Observer | None) -> None:
        self.op(x_TD, *self.args)


def feed_forward_block(norm: nn.Module, module: nn.Module, mixture: int, precision: Precision) -> NativeBlock:
    """The native form of one layer's feed-forward part; `mixture` is its number among the MoE layers."""
    if isinstance(module, TopKMixture):
        return NativeTopK(mixture, norm, module, precision)
    if isinstance(module, InfinityMixture):
        return NativeInfinity(mixture, norm, module, precision)
    assert isinstance(module, DenseFFN) and isinstance(norm, RMSNorm | nn.LayerNorm)
    return NativeFFN(norm, module, precision)
