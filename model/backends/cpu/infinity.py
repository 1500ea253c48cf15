"""An ∞-MoE on native kernels: its packed weights as the parameters of its op, and when units are read one by one."""

import statistics
import time
from dataclasses import replace

import torch
from torch import Tensor, nn

from model.backends.cpu.kernels.groups import OUTPUTS
from model.backends.cpu.kernels.pack import pack
from model.backends.cpu.kernels.params import DrawsParams, InfinityParams
from model.backends.cpu.kernels.rules import NO_RULES
from model.backends.cpu.layout import grouped_units, tiles_of, unit_rows
from model.backends.cpu.weights import Precision, norm_params, repair_params
from model.moe.infinity import InfinityMixture
from model.moe.points import fixed_points
from model.moe.repair import RepairTables
from model.noise import normal_table
from model.shapes.mixtures import Infinity

EVERY = 1 << 40  # more units than there are
ops = torch.ops.moedial


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
