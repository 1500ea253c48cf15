"""As `cases`, for the ops that choose: routing, draws, masks, and the blocks of both mixtures."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from model.backends.cpu.infinity import draws_params
from model.backends.cpu.kernels import reference_mixtures
from model.backends.cpu.kernels.pack import DTYPE, Kind, Packed, pack
from model.backends.cpu.kernels.params import (
    NO_REPAIR,
    InfinityParams,
    RepairParams,
    RouterParams,
    RoutingParams,
    TopKParams,
)
from model.backends.cpu.kernels.reference import Norm, Weight
from model.backends.cpu.kernels.rules import rule_arguments
from model.backends.cpu.layout import tiles_of, unit_rows
from model.batch import LayerBudget
from model.budget import RoutingRule
from model.moe.base import ranks
from model.moe.infinity import InfinityMixture
from model.shapes.mixtures import Infinity, Router
from model.step import LayerStep
from tests.model.backends.cpu.kernels.cases import Layer, Make, norm_params, ops
from tests.model.tiny import randomise


@dataclass(frozen=True)
class Rules:
    """The rules of a case's rows; none: each has its family's."""

    distinct: tuple[RoutingRule, ...] = ()
    rule_T: Tensor | None = None

    def budget(self, counts_T: Tensor, rows_r: Tensor) -> LayerBudget:
        """What these rows may use."""
        counts_r = counts_T[rows_r]
        k_max = int(counts_r.amax()) if len(rows_r) else 0
        return LayerBudget(counts_r, k_max, self.distinct, None if self.rule_T is None else self.rule_T[rows_r])


@dataclass
class RouteCase:
    """The choice of a router; as a dense matrix with -1 where an expert is not chosen."""

    logits_TE: Tensor
    counts_T: Tensor
    router: Router
    rules: Rules = Rules()
    trained: int = 1
    selection_bias_E: Tensor | None = None
    rounded = False

    def __post_init__(self) -> None:
        self.rows = len(self.logits_TE)

    def run(self, rows_r: Tensor) -> Tensor:
        budget = self.rules.budget(self.counts_T, rows_r)
        counts = (budget.counts_T, budget.k_max, *rule_arguments(budget))
        routing = RoutingParams.of(self.router, self.trained, self.selection_bias_E)
        token_R, weight_R, ends_E, used_T = ops.route(self.logits_TE[rows_r], *counts, *routing.arguments())
        assert torch.equal(token_R.bincount(minlength=len(rows_r)), used_T)
        sizes_E = ends_E.diff(prepend=ends_E.new_zeros(1))
        expert_R = torch.arange(len(ends_E)).repeat_interleave(sizes_E)
        order = list(zip(expert_R.tolist(), token_R.tolist(), strict=True))
        assert order == sorted(set(order)), "pairs are sorted by expert, then token, and each is there once"
        return torch.full((len(rows_r), len(ends_E)), -1.0).index_put((token_R.long(), expert_R), weight_R)

    def expected(self) -> Tensor:
        budget = self.rules.budget(self.counts_T, torch.arange(self.rows))
        calls = reference_mixtures.route(self.logits_TE, budget, self.router, self.selection_bias_E, self.trained)
        return (
            torch.full(self.logits_TE.shape, -1.0).double().index_put((calls.token_R, calls.expert_R), calls.weight_R)
        )


def route_case(
    make: Make, rows: int, experts: int, router: Router, ties: bool = False, most: int | None = None
) -> RouteCase:
    """`most`: the highest count, where a token cannot choose among all experts."""
    logits = make.whole(-2, 2, rows, experts).float() if ties else make.normal(rows, experts, scale=2)
    bias_E = make.normal(experts, scale=0.3) if router.selection_bias else None
    return RouteCase(logits, make.whole(1, most or experts, rows), router, selection_bias_E=bias_E)


@dataclass
class DrawCase:
    """z of each token's draws, [T, k_max, Z], zeros behind the last."""

    gaussian_TZ: Tensor
    use: LayerStep
    config: Infinity
    rounded = False

    def __post_init__(self) -> None:
        self.rows = len(self.gaussian_TZ)

    def run(self, rows_r: Tensor) -> Tensor:
        draws = draws_params(self.use.moe_layer, self.config)
        z_RZ = ops.draw(self.gaussian_TZ[rows_r], *use_args(part(self.use, rows_r)), *draws.arguments())
        return self.spread(z_RZ, self.use.budget.counts_T[rows_r])

    def spread(self, z_RZ: Tensor, counts_T: Tensor) -> Tensor:
        token_R, sample_R = ranks(LayerBudget(counts_T, self.use.budget.k_max)).nonzero(as_tuple=True)
        empty = z_RZ.new_zeros(len(counts_T), self.use.budget.k_max, z_RZ.shape[1])
        return empty.index_put((token_R, sample_R), z_RZ)

    def expected(self) -> Tensor:
        return self.spread(reference_mixtures.draw(self.gaussian_TZ, self.use, self.config), self.use.budget.counts_T)


def part(use: LayerStep, rows_r: Tensor) -> LayerStep:
    counts_T, rule_T = use.budget.counts_T[rows_r], use.budget.rule_T
    return replace(
        use,
        budget=replace(use.budget, counts_T=counts_T, rule_T=None if rule_T is None else rule_T[rows_r]),
        seeds_T=use.seeds_T[rows_r],
        positions_T=use.positions_T[rows_r],
    )


def use_args(use: LayerStep) -> tuple[Any, ...]:
    return use.budget.counts_T, use.seeds_T, use.positions_T, use.budget.k_max


def random_use(make: Make, rows: int, most: int) -> LayerStep:
    """Rows of several requests at any positions."""
    counts_T, positions_T = make.whole(1, most, rows), make.whole(0, 100_000, rows)
    layer, seeds_T = make.rng.randrange(5), make.whole(-(2**62), 2**62, rows)
    return LayerStep(LayerBudget(counts_T, most), seeds_T, positions_T, layer)


def draw_case(make: Make, rows: int, config: Infinity) -> DrawCase:
    return DrawCase(make.normal(rows, 2 * config.latent_dim), random_use(make, rows, config.maximum), config)


@dataclass
class MasksCase:
    """The mean mask of each token; `first` is where each token's scores begin."""

    scores_RE: Tensor
    counts_T: Tensor
    kept: int
    replacement: bool = True
    keep_norm: bool = False
    rounded = False

    def __post_init__(self) -> None:
        self.rows = len(self.counts_T)

    def run(self, rows_r: Tensor) -> Tensor:
        parts = self.scores_RE.split(self.counts_T.tolist())
        scores_RE = torch.cat([self.scores_RE[:0], *(parts[row] for row in rows_r.tolist())])
        return ops.masks(scores_RE, self.counts_T[rows_r], 1 << 40, self.kept, self.replacement, self.keep_norm)

    def expected(self) -> Tensor:
        return reference_mixtures.masks(self.scores_RE, self.counts_T, self.kept, self.replacement, self.keep_norm)


def masks_case(make: Make, rows: int, scores: int, kept: int, ties: bool = False) -> MasksCase:
    counts_T = make.whole(1, 6, rows)
    shape = (int(counts_T.sum()), scores)
    return MasksCase(make.whole(-2, 2, *shape).float() if ties else make.normal(*shape), counts_T, kept)


@dataclass
class TopKCase:
    """x += residual_scale · top-k mixture(norm(x))."""

    x_TD: Tensor
    counts_T: Tensor
    norm: Norm
    router: Packed
    layer: Layer
    shape: Router
    rules: Rules = Rules()
    trained: int = 1
    repair: RepairParams = NO_REPAIR
    residual_scale: float = 1.0

    def __post_init__(self) -> None:
        self.rows, self.rounded = len(self.x_TD), self.layer.up.kind != "float"

    def block(self, rows_r: Tensor) -> tuple[Tensor, Tensor]:
        x_TD, layer = self.x_TD[rows_r], self.layer
        routing = RouterParams(
            self.router,
            layer.count,
            RoutingParams.of(self.shape, self.trained),
            weigh_input=self.shape.weigh_input,
        )
        params = TopKParams(
            norm_params(self.norm), routing, layer.params, repair=self.repair, residual_scale=self.residual_scale
        )
        budget = self.rules.budget(self.counts_T, rows_r)
        counts = (budget.counts_T, layer.count, *rule_arguments(budget))
        return x_TD, ops.topk_block(x_TD, *counts, *params.arguments())

    def run(self, rows_r: Tensor) -> Tensor:
        return self.block(rows_r)[0]

    def reference(self) -> tuple[Tensor, Tensor]:
        router, layer = Weight.of(self.router), replace(self.layer.plain(), weigh_input=self.shape.weigh_input)
        budget = self.rules.budget(self.counts_T, torch.arange(self.rows))
        parts = (self.x_TD, budget, self.norm, router, layer, self.shape, self.residual_scale)
        return reference_mixtures.topk_block(*parts)

    def expected(self) -> Tensor:
        return self.reference()[0]


def topk_case(
    make: Make, rows: int, width: int, units: int, experts: int, kind: Kind, norm: str = "rms", **rest: Any
) -> TopKCase:
    """The router keeps the model's own kind where experts are int8."""
    router = pack(make.weight(experts, width) * 2, "bfloat16" if kind != "float" else kind)
    shape = rest.pop("router", Router())
    layer, norms = make.experts(experts, width, units, kind, **rest), make.norm(norm, width)
    return TopKCase(make.normal(rows, width), make.whole(1, experts, rows), norms, router, layer, shape)


@dataclass
class InfinityCase:
    """x += residual_scale · ∞-MoE(norm(x))."""

    x_TD: Tensor
    use: LayerStep
    config: Infinity
    norm: Norm
    router: Packed
    scores: Packed
    layer: Layer
    rows_of_units: tuple[Tensor, Tensor] | tuple[None, None] = (None, None)
    crossover_rows: int = 0  # up to so many kept units are read one by one
    repair: RepairParams = NO_REPAIR
    residual_scale: float = 1.0

    def __post_init__(self) -> None:
        self.rows, self.rounded = len(self.x_TD), self.layer.up.kind != "float"

    def block(self, rows_r: Tensor) -> tuple[Tensor, Tensor]:
        x_TD, c, layer = self.x_TD[rows_r], self.config, self.layer
        up_rows, down_rows = self.rows_of_units
        params = InfinityParams(
            norm=norm_params(self.norm),
            router=self.router,
            scores=self.scores.packed,
            latent_dim=c.latent_dim,
            up=layer.up,
            down=layer.down,
            units=c.units,
            tile_units=layer.units,
            groups=c.blocks,
            kept=c.kept,
            activation=layer.activation,
            draws=draws_params(self.use.moe_layer, c),
            replacement=c.replacement,
            keep_norm=c.aggregate == "norm",
            up_rows=up_rows,
            down_rows=down_rows,
            crossover_rows=self.crossover_rows,
            repair=self.repair,
            residual_scale=self.residual_scale,
        )
        use = part(self.use, rows_r)
        return x_TD, ops.infinity_block(x_TD, *use_args(use), *rule_arguments(use.budget), *params.arguments())

    def run(self, rows_r: Tensor) -> Tensor:
        return self.block(rows_r)[0]

    def reference(self) -> tuple[Tensor, Tensor]:
        weights = (Weight.of(self.router), Weight.of(self.scores), self.layer.plain())
        shape = (self.x_TD, self.use, self.config, self.norm, *weights, self.repair, self.residual_scale)
        return reference_mixtures.infinity_block(*shape)

    def expected(self) -> Tensor:
        return self.reference()[0]


def infinity_case(
    make: Make, rows: int, width: int, config: Infinity, run: int, kind: Kind, norm: str = "rms"
) -> InfinityCase:
    """`run` units, a multiple of 16 and of the config's block, are one expert of the ragged work."""
    module = InfinityMixture(width, config)
    randomise(module, make.rng.randrange(1 << 30))
    up, down = (part.detach() for part in tiles_of(module, run))
    layer = Layer(pack(up, kind), pack(down, kind), len(up), run, False, config.activation)
    router = pack(module.router.detach(), "bfloat16" if kind != "float" else kind)
    scores, norms = pack(module.scores.detach(), "float"), make.norm(norm, width)
    x_TD, use = make.normal(rows, width), random_use(make, rows, config.maximum)
    narrow = kind in ("float", "bfloat16") and width % 16 == 0
    of_units = tuple(part.detach().to(DTYPE[kind]) for part in unit_rows(module)) if narrow else (None, None)
    return InfinityCase(x_TD, use, config, norms, router, scores, layer, of_units)
