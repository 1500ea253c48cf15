"""The feed-forward blocks of a decoder layer on native kernels: packed weights, as the parameters that their ops take.

Each is made from the plain-torch module that defines it, whose values it computes. No requests, no files here.
"""

import statistics
import time
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from model.backends.cpu.kernels.groups import OUTPUTS
from model.backends.cpu.kernels.pack import Kind, Packed, interleave, joined, kind_for, pack
from model.backends.cpu.kernels.params import (
    NO_REPAIR,
    BlockParams,
    DrawsParams,
    ExpertsParams,
    FeedForwardParams,
    InfinityParams,
    NormParams,
    RepairParams,
    RouterParams,
    RoutingParams,
    TopKParams,
)
from model.backends.cpu.kernels.rules import NO_RULES
from model.backends.cpu.layout import grouped_units, padded, parted, pieces_of, tiles_of, unit_rows
from model.grouped import Grouped
from model.layers import DenseFFN, RMSNorm
from model.moe.infinity import InfinityMixture
from model.moe.points import fixed_points
from model.moe.repair import RepairTables
from model.moe.topk import TopKMixture
from model.noise import normal_table
from model.options import Quantize
from model.shapes.mixtures import Infinity, TopK

EVERY = 1 << 40  # more units than there are
ops = torch.ops.moedial


@dataclass(frozen=True, slots=True)
class Precision:
    """How the weights are kept: the model's own values, or quantised experts, or quantised everywhere but in routers.

    4-bit experts leave 8 bits to the other matrices: 4 bits in attention cost several times what they cost in experts.
    """

    base: Kind
    quantize: Quantize = "none"
    experts_only: bool = True

    @property
    def experts(self) -> Kind:
        assert self.quantize != "fp8-weights"  # refused
        if self.quantize == "int4":
            return "grouped"
        return self.base if self.quantize == "none" else self.quantize

    @property
    def linears(self) -> Kind:
        if self.experts_only:
            return "int8" if self.quantize == "int4" else self.base
        return self.experts


def precision_for(dtype: torch.dtype, quantize: Quantize = "none", experts_only: bool = True) -> Precision:
    """The precision of a model that is loaded in `dtype`."""
    return Precision(kind_for(dtype), quantize, experts_only)


def norm_params(norm: nn.Module) -> NormParams:
    """A norm in float32; none for the identity."""
    if isinstance(norm, nn.Identity):
        return NormParams()
    bias, eps = getattr(norm, "bias", None), float(norm.eps)  # type: ignore[arg-type]
    return NormParams(norm_weight(norm), None if bias is None else floats(bias), eps)


def norm_weight(norm: nn.Module) -> Tensor:
    """A norm's weights as they multiply."""
    return floats(norm.weight) + getattr(norm, "offset", 0.0)


def floats(weight: object) -> Tensor:
    """A vector in float32."""
    assert isinstance(weight, Tensor)
    return weight.detach().float().contiguous()


def bias_of(layer: nn.Linear) -> Tensor | None:
    """A layer's bias in float32, if it has one."""
    return None if layer.bias is None else floats(layer.bias)


def repair_params(tables: RepairTables | None) -> RepairParams:
    """The tables themselves: what is written to them later counts."""
    return NO_REPAIR if tables is None else RepairParams(tables.scale_KD, tables.shift_KD)


def topk_block(
    norm: nn.Module,
    module: TopKMixture,
    precision: Precision,
    repair: RepairTables | None = None,
    residual_scale: float = 1.0,
) -> TopKParams:
    """Norm, router, ragged experts and their weighted sum."""
    return TopKParams(
        norm=norm_params(norm),
        routing=_router(module, precision),
        **_all_experts(module, precision),
        repair=repair_params(repair),
        residual_scale=residual_scale,
    )


def _router(module: TopKMixture, precision: Precision) -> RouterParams:
    config: TopK = module.config
    router = config.router
    selection_bias = floats(module.selection_bias) if router.selection_bias else None
    weight: Tensor = module.router
    if config.shared_gate:
        weight = torch.cat([dense(module.router), dense(module.shared_gate.weight)])
    return RouterParams(
        router=pack(weight, precision.base),
        experts=config.experts,
        routing=RoutingParams.of(router, config.trained, selection_bias),
        logit_bias=_logit_bias(module),
        weigh_input=router.weigh_input,
        shared_gate=config.shared_gate,
    )


def dense(weight: Tensor | Grouped) -> Tensor:
    """The values of a matrix, whatever its form."""
    return weight.dense() if isinstance(weight, Grouped) else weight


def _logit_bias(module: TopKMixture) -> Tensor | None:
    if not module.config.router.logit_bias:
        return None
    return padded(nn.functional.pad(floats(module.router_bias), (0, int(module.config.shared_gate))))


def _all_experts(module: TopKMixture, precision: Precision) -> dict[str, Any]:
    """The routed experts and the shared part: behind them in pieces of their width where its form is theirs, else as a
    layer of its own."""
    routed, config = _experts(module, precision), module.config
    if config.shared is None:
        return {"experts": routed}
    pieces = None
    if not config.shared_gate or not config.router.weigh_input:
        pieces = shared_pieces(module.shared, routed, config.experts, precision)
    if pieces is None:
        return {"experts": routed, "shared": dense_expert(module.shared, precision)}
    up, down, count = pieces
    return {"experts": replace(routed, up=up, down=down), "shared_pieces": count}


def shared_pieces(
    shared: DenseFFN, routed: ExpertsParams, experts: int, precision: Precision
) -> tuple[Packed, Packed, int] | None:
    """The experts with a shared layer behind them, cut into so many pieces, the last of which may have units that are
    zero; None where it is of another form, or quantised in groups."""
    config = shared.config
    alike = config.gated == routed.gated and config.activation == routed.activation
    if not alike or config.bias or routed.up_bias is not None or precision.linears != precision.experts:
        return None
    if isinstance(shared.up.weight, Grouped) or isinstance(shared.down.weight, Grouped):
        return None
    up_PFD, down_PDF = pieces_of(shared, routed.units)
    count = experts + len(up_PFD)
    up = joined(routed.up, pack(interleave(up_PFD), precision.experts), count)
    down = joined(routed.down, pack(padded(down_PDF), precision.experts), count)
    return None if up is None or down is None else (up, down, len(up_PFD))


def _experts(module: TopKMixture, precision: Precision) -> ExpertsParams:
    """The routed experts. Where their gates and ups alternate they are parted first."""
    config: TopK = module.config
    up: Tensor = module.gate_up
    up_bias = module.gate_up_bias[..., None] if config.bias else None
    if config.interleaved:
        up, up_bias = parted(up), None if up_bias is None else parted(up_bias)
    down_bias = module.down_bias if config.bias else None
    return ExpertsParams(
        up=pack(interleave(up), precision.experts),
        down=pack(padded(module.down), precision.experts),
        units=config.width,
        gated=True,
        activation=config.activation,
        up_bias=None if up_bias is None else padded(floats(interleave(up_bias)[..., 0])),
        down_bias=None if down_bias is None else padded(floats(down_bias)),
    )


def infinity_block(
    mixture: int,
    norm: nn.Module,
    module: InfinityMixture,
    precision: Precision,
    repair: RepairTables | None = None,
    residual_scale: float = 1.0,
) -> InfinityParams:
    """Norm, draws, masks and the kept groups of the wide layer."""
    config: Infinity = module.config
    width = module.up.shape[1]
    tile_units = config.block if config.block % OUTPUTS == 0 else grouped_units(config)
    up, down = tiles_of(module, tile_units)
    params = InfinityParams(
        norm=norm_params(norm),
        router=pack(module.router, precision.base),
        scores=pack(module.scores, "float").packed,  # which groups win is decided in float32
        latent_dim=config.latent_dim,
        up=pack(up, precision.experts),
        down=pack(down, precision.experts),
        units=config.units,
        tile_units=tile_units,
        groups=config.blocks,
        kept=config.kept,
        activation=config.activation,
        draws=draws_params(mixture, config),
        replacement=config.replacement,
        keep_norm=config.aggregate == "norm",
        repair=repair_params(repair),
        residual_scale=residual_scale,
    )
    one_kind = precision.experts == precision.base
    narrow = tile_units != config.block and one_kind and width % OUTPUTS == 0
    return with_unit_rows(params, module) if narrow else params


def draws_params(mixture: int, config: Infinity) -> DrawsParams:
    """How the points of the mixture with this number are drawn."""
    points = None
    if config.draws == "points":
        points = fixed_points(config.maximum, config.latent_dim)
    exponential, antithetic = config.sigma_link == "exp", config.draws == "antithetic"
    return DrawsParams(
        quantiles=normal_table(),
        layer=mixture,
        exponential=exponential,
        sigma_min=config.sigma_min,
        antithetic=antithetic,
        points=points,
    )


def with_unit_rows(params: InfinityParams, module: InfinityMixture) -> InfinityParams:
    """The block with its units as rows as well, which are read where few are kept."""
    up_rows, down_rows = unit_rows(module)
    both = replace(params, up_rows=up_rows, down_rows=down_rows)
    return replace(both, crossover_rows=crossover(both, module.up.shape[1]))


def crossover(params: InfinityParams, width: int) -> int:
    """How many kept units cost as much one by one as all units in one pass. Both give the same bits."""
    one, x_TD = torch.ones(1, dtype=torch.int64), torch.ones(1, width)
    one_pass, by_rows = (replace(params, crossover_rows=rows).arguments() for rows in (0, EVERY))

    def run(way: tuple[object, ...]) -> Tensor:
        load_E: Tensor = ops.infinity_block(x_TD.clone(), one, one, one, 1, *NO_RULES, *way)
        return load_E

    def seconds(way: tuple[object, ...]) -> float:
        started = time.perf_counter()
        run(way)
        return time.perf_counter() - started

    kept = int(run(one_pass).sum()) * (params.units // params.groups)
    pass_s = statistics.median(seconds(one_pass) for _ in range(5))
    rows_s = statistics.median(seconds(by_rows) for _ in range(5))
    return int(kept * pass_s / rows_s)


def ffn_block(
    norm: nn.Module, module: DenseFFN, precision: Precision, residual_scale: float = 1.0
) -> FeedForwardParams:
    """Norm and a dense feed-forward layer: a single expert that every token uses."""
    return FeedForwardParams(norm_params(norm), dense_expert(module, precision), residual_scale)


def dense_expert(module: DenseFFN, precision: Precision) -> ExpertsParams:
    """A dense feed-forward layer as one expert."""
    config = module.config
    up: Tensor = interleave(module.up.weight) if config.gated else module.up.weight
    up_bias, down_bias = bias_of(module.up), bias_of(module.down)
    if up_bias is not None and config.gated:
        up_bias = interleave(up_bias[:, None])[:, 0]
    return ExpertsParams(
        up=pack(up, precision.linears),
        down=pack(padded(module.down.weight), precision.linears),
        units=config.width,
        gated=config.gated,
        activation=config.activation,
        up_bias=None if up_bias is None else padded(up_bias),
        down_bias=None if down_bias is None else padded(down_bias),
    )


def feed_forward_block(
    norm: nn.Module,
    module: nn.Module,
    mixture: int,
    precision: Precision,
    repair: RepairTables | None = None,
    residual_scale: float = 1.0,
) -> BlockParams:
    """The native form of one layer's feed-forward part; `mixture` is its number among the MoE layers."""
    if isinstance(module, TopKMixture):
        return topk_block(norm, module, precision, repair, residual_scale)
    if isinstance(module, InfinityMixture):
        return infinity_block(mixture, norm, module, precision, repair, residual_scale)
    assert isinstance(module, DenseFFN) and isinstance(norm, RMSNorm | nn.LayerNorm)
    return ffn_block(norm, module, precision, residual_scale)
