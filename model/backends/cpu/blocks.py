"""The feed-forward blocks of a decoder layer on native kernels: packed weights, as the parameters that their ops take.

Each is made from the plain-torch module that defines it, whose values it computes. No requests, no files here.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from model.backends.cpu.infinity import infinity_block
from model.backends.cpu.kernels.pack import Packed, interleave, joined, pack
from model.backends.cpu.kernels.params import (
    BlockParams,
    ExpertsParams,
    FeedForwardParams,
    RouterParams,
    RoutingParams,
    TopKParams,
)
from model.backends.cpu.layout import padded, parted, pieces_of
from model.backends.cpu.weights import Precision, bias_of, dense, floats, norm_params, repair_params
from model.grouped import Grouped
from model.layers import DenseFFN, RMSNorm
from model.moe.infinity import InfinityMixture
from model.moe.repair import RepairTables
from model.moe.topk import TopKMixture
from model.shapes.mixtures import TopK


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
