"""Random input for each op that works on rows by themselves, how to run it on any of its rows, and what must come out."""

import random
from dataclasses import dataclass, replace
from typing import Any, Protocol, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from model.config import Activation, Infinity
from model.kernels import reference
from model.kernels.pack import Kind, Packed, interleave, pack
from model.kernels.reference import Experts, Norm, Weight
from model.mixture.infinity import InfinityMixture
from model.mixture.seam import Use, ranks, sort_calls
from model.native.blocks import ACTIVATIONS, blocks_of
from model.noise import normal_table
from tests.model.tiny import randomise

KINDS: tuple[Kind, ...] = get_args(Kind)
NORMS = ("none", "rms", "layer")
ops = torch.ops.moedial


class Case(Protocol):
    """One op with everything it is given. A row's result must be the same whatever rows it is run with."""

    rows: int
    rounded: bool  # whether numbers that were computed are rounded again, to bfloat16 or int8

    def run(self, rows_r: Tensor) -> Tensor:
        """The op's result for these rows, in this order, as one batch; where a row's is ragged, padded."""
        ...

    def expected(self) -> Tensor:
        """The reference's result for all rows."""
        ...


def assert_close(got: Tensor, want: Tensor, rounded: bool) -> None:
    """float32 sums differ by their order: 1e-5 of the values' size.

    Where a computed number is rounded again, one within 1e-7 of a tie may fall to the other side: about one in 10,000,
    wrong by one step. So the mean square is held to 5e-4 (cutting instead of rounding would give 2e-3), with room for one
    such number in a small result, and no value is far off.
    """
    assert got.shape == want.shape and got.isfinite().all()
    if not want.numel():
        return
    error, size = (got.double() - want).abs(), want.double().square().mean().sqrt()
    assert error.max() <= (5e-2 if rounded else 1e-5) * size, f"{error.max() / size:.1e}"
    if rounded:
        spread = error.square().mean().sqrt()
        assert spread <= (5e-4 + 1e-2 * want.numel() ** -0.5) * size, f"{spread / size:.1e}"


class Make:
    """Random values, all from one seed."""

    def __init__(self, seed: int) -> None:
        self.rng, self.generator = random.Random(seed), torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=self.generator) * scale

    def weight(self, *shape: int) -> Tensor:
        """Keeps the size of what it multiplies."""
        return self.normal(*shape, scale=shape[-1] ** -0.5)

    def whole(self, low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high + 1, shape, generator=self.generator)

    def norm(self, kind: str, width: int) -> Norm:
        if kind == "none":
            return Norm()
        return Norm(1 + self.normal(width, scale=0.1), self.normal(width) if kind == "layer" else None, 1e-5)

    def experts(
        self,
        count: int,
        width: int,
        units: int,
        kind: Kind,
        gated: bool = True,
        activation: Activation = "silu",
        bias: bool = False,
    ) -> "Layer":
        """Feed-forward experts as the kernels read them."""
        up, down = self.weight(count, (2 if gated else 1) * units, width), self.weight(count, width, units)
        packed_up = pack(interleave(up) if gated else up, kind)
        biases = (None, None)
        if bias:
            # Units that are padding get zeros.
            flat = self.normal(up.shape[1], 1, scale=0.5)
            biases = (interleave(flat)[:, 0] if gated else flat[:, 0], self.normal(width, scale=0.5))
        return Layer(packed_up, pack(F.pad(down, (0, -units % 16)), kind), count, units, gated, activation, *biases)


@dataclass(frozen=True)
class Layer:
    """Packed experts. The kernels want the first bias as long as the packed outputs."""

    up: Packed
    down: Packed
    count: int
    units: int
    gated: bool
    activation: Activation
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None

    @property
    def words(self) -> tuple[Tensor | None, ...]:
        return self.up.words, self.up.side, self.down.words, self.down.side

    @property
    def code(self) -> int:
        return ACTIVATIONS[self.activation]

    @property
    def padded_bias(self) -> Tensor | None:
        return None if self.up_bias is None else F.pad(self.up_bias, (0, -len(self.up_bias) % 16))

    def plain(self) -> Experts:
        up = Weight.of(self.up, self.count, self.up_bias)
        return Experts(up, Weight.of(self.down, self.count, self.down_bias), self.gated, self.activation)


def norm_args(norm: Norm) -> tuple[Any, ...]:
    return norm.weight, norm.bias, norm.eps


def present(norm: Norm, width: int) -> Norm:
    """The blocks always have a norm."""
    return norm if norm.weight is not None else replace(norm, weight=torch.ones(width))


@dataclass
class LinearCase:
    """y = W norm(x) + bias."""

    x_TD: Tensor
    norm: Norm
    weight: Packed
    bias: Tensor | None

    def __post_init__(self) -> None:
        self.rows, self.rounded = len(self.x_TD), self.norm.weight is not None and self.weight.kind != "float"

    def run(self, rows_r: Tensor) -> Tensor:
        weight = self.weight
        return ops.linear(
            self.x_TD[rows_r], *norm_args(self.norm), weight.words, weight.side, weight.n, self.bias
        )  # fmt: skip

    def expected(self) -> Tensor:
        return reference.linear(self.x_TD, self.norm, Weight.of(self.weight, 1, self.bias))


def linear_case(
    make: Make, rows: int, n: int, k: int, kind: Kind, norm: str = "none", bias: bool = False
) -> LinearCase:
    weight, shift = pack(make.weight(n, k), kind), make.normal(n) if bias else None
    return LinearCase(make.normal(rows, k), make.norm(norm, k), weight, shift)


@dataclass
class ExpertsCase:
    """Σ weight · expert(x) for a given choice; a row may choose nothing."""

    x_TD: Tensor
    chosen_TE: Tensor  # bool
    weight_TE: Tensor
    layer: Layer

    def __post_init__(self) -> None:
        self.rows, self.rounded = len(self.x_TD), self.layer.up.kind != "float"

    def calls(self, rows_r: Tensor) -> Any:
        token_R, expert_R = self.chosen_TE[rows_r].nonzero(as_tuple=True)
        return sort_calls(token_R, expert_R, self.weight_TE[rows_r][token_R, expert_R], self.layer.count)

    def run(self, rows_r: Tensor) -> Tensor:
        calls, layer = self.calls(rows_r), self.layer
        pairs = (calls.token_R.int(), calls.weight_R, calls.ends_E)
        return ops.experts(self.x_TD[rows_r], *pairs, *layer.words, layer.units, layer.gated, layer.code)

    def expected(self) -> Tensor:
        return reference.experts(self.x_TD, self.calls(torch.arange(self.rows)), self.layer.plain())


def experts_case(make: Make, chosen_TE: Tensor, width: int, units: int, kind: Kind, **rest: Any) -> ExpertsCase:
    rows, count = chosen_TE.shape
    layer = make.experts(count, width, units, kind, **rest)
    return ExpertsCase(make.normal(rows, width), chosen_TE, 0.1 + make.normal(rows, count).abs(), layer)


@dataclass
class FFNCase:
    """x += feed-forward(norm(x))."""

    x_TD: Tensor
    norm: Norm
    layer: Layer

    def __post_init__(self) -> None:
        self.rows, self.rounded = len(self.x_TD), self.layer.up.kind != "float"

    def run(self, rows_r: Tensor) -> Tensor:
        x_TD, layer = self.x_TD[rows_r], self.layer
        up, up_side, down, down_side = layer.words
        biased = (up, up_side, layer.padded_bias, down, down_side, layer.down_bias)
        ops.ffn_block(x_TD, *norm_args(self.norm), *biased, layer.units, layer.gated, layer.code)
        return x_TD

    def expected(self) -> Tensor:
        return reference.ffn_block(self.x_TD, self.norm, self.layer.plain())


def ffn_case(
    make: Make, rows: int, width: int, units: int, kind: Kind, norm: str = "rms", **rest: Any
) -> FFNCase:  # fmt: skip
    return FFNCase(
        make.normal(rows, width), present(make.norm(norm, width), width), make.experts(1, width, units, kind, **rest)
    )


@dataclass
class RouteCase:
    """Softmax and choice; as a dense matrix with -1 where an expert is not chosen."""

    logits_TE: Tensor
    counts_T: Tensor
    normalise: bool
    rounded = False

    def __post_init__(self) -> None:
        self.rows = len(self.logits_TE)

    def run(self, rows_r: Tensor) -> Tensor:
        counts_T = self.counts_T[rows_r]
        k_max = int(counts_T.amax()) if len(counts_T) else 0
        token_R, weight_R, ends_E = ops.route(self.logits_TE[rows_r], counts_T, k_max, self.normalise)
        sizes_E = ends_E.diff(prepend=ends_E.new_zeros(1))
        expert_R = torch.arange(len(ends_E)).repeat_interleave(sizes_E)
        order = list(zip(expert_R.tolist(), token_R.tolist(), strict=True))
        assert order == sorted(set(order)), "pairs are sorted by expert, then token, and each is there once"
        return torch.full((len(rows_r), len(ends_E)), -1.0).index_put((token_R.long(), expert_R), weight_R)

    def expected(self) -> Tensor:
        calls = reference.route(self.logits_TE, self.counts_T, self.normalise)
        return torch.full(self.logits_TE.shape, -1.0).double().index_put((calls.token_R, calls.expert_R), calls.weight_R)


def route_case(make: Make, rows: int, experts: int, normalise: bool, ties: bool = False) -> RouteCase:
    logits = make.whole(-2, 2, rows, experts).float() if ties else make.normal(rows, experts, scale=2)
    return RouteCase(logits, make.whole(1, experts, rows), normalise)


@dataclass
class DrawCase:
    """z of each token's draws, [T, k_max, Z], zeros behind the last."""

    gaussian_TZ: Tensor
    use: Use
    config: Infinity
    rounded = False

    def __post_init__(self) -> None:
        self.rows = len(self.gaussian_TZ)

    def run(self, rows_r: Tensor) -> Tensor:
        z_RZ = ops.draw(self.gaussian_TZ[rows_r], *use_args(part(self.use, rows_r)), *draw_args(self.use, self.config))
        return self.spread(z_RZ, self.use.counts_T[rows_r])

    def spread(self, z_RZ: Tensor, counts_T: Tensor) -> Tensor:
        token_R, sample_R = ranks(counts_T, self.use.k_max).nonzero(as_tuple=True)
        empty = z_RZ.new_zeros(len(counts_T), self.use.k_max, z_RZ.shape[1])
        return empty.index_put((token_R, sample_R), z_RZ)

    def expected(self) -> Tensor:
        return self.spread(reference.draw(self.gaussian_TZ, self.use, self.config), self.use.counts_T)


def part(use: Use, rows_r: Tensor) -> Use:
    counts_T = use.counts_T[rows_r]
    return replace(use, counts_T=counts_T, seeds_T=use.seeds_T[rows_r], positions_T=use.positions_T[rows_r])


def use_args(use: Use) -> tuple[Any, ...]:
    return use.counts_T, use.seeds_T, use.positions_T, use.k_max


def draw_args(use: Use, config: Infinity) -> tuple[Any, ...]:
    return normal_table(), use.layer, config.sigma_link == "exp", config.sigma_min, config.draws == "antithetic"


def random_use(make: Make, rows: int, most: int) -> Use:
    """Rows of several requests at any positions."""
    counts_T, positions_T = make.whole(1, most, rows), make.whole(0, 100_000, rows)
    return Use(make.rng.randrange(5), counts_T, most, make.whole(-(2**62), 2**62, rows), positions_T)


def draw_case(make: Make, rows: int, config: Infinity) -> DrawCase:
    return DrawCase(make.normal(rows, 2 * config.space), random_use(make, rows, config.maximum), config)


@dataclass
class MasksCase:
    """The mean mask of each token; `first` is where each token's scores begin."""

    scores_RE: Tensor
    counts_T: Tensor
    kept: int
    rounded = False

    def __post_init__(self) -> None:
        self.rows = len(self.counts_T)

    def run(self, rows_r: Tensor) -> Tensor:
        parts = self.scores_RE.split(self.counts_T.tolist())
        scores_RE = torch.cat([self.scores_RE[:0], *(parts[row] for row in rows_r.tolist())])
        return ops.masks(scores_RE, self.counts_T[rows_r], 1 << 40, self.kept)

    def expected(self) -> Tensor:
        return reference.masks(self.scores_RE, self.counts_T, self.kept)


def masks_case(make: Make, rows: int, scores: int, kept: int, ties: bool = False) -> MasksCase:
    counts_T = make.whole(1, 6, rows)
    shape = (int(counts_T.sum()), scores)
    return MasksCase(make.whole(-2, 2, *shape).float() if ties else make.normal(*shape), counts_T, kept)


@dataclass
class TopKCase:
    """x += top-k mixture(norm(x))."""

    x_TD: Tensor
    counts_T: Tensor
    norm: Norm
    router: Packed
    layer: Layer
    normalise: bool

    def __post_init__(self) -> None:
        self.rows, self.rounded = len(self.x_TD), "float" != self.layer.up.kind

    def block(self, rows_r: Tensor) -> tuple[Tensor, Tensor]:
        x_TD, layer, router = self.x_TD[rows_r], self.layer, (self.router.words, self.router.side)
        shape = (layer.count, layer.units, layer.code, self.normalise)
        counts = (self.counts_T[rows_r], layer.count)
        return x_TD, ops.topk_block(x_TD, *counts, *norm_args(self.norm), *router, *layer.words, *shape)

    def run(self, rows_r: Tensor) -> Tensor:
        return self.block(rows_r)[0]

    def reference(self) -> tuple[Tensor, Tensor]:
        router, layer = Weight.of(self.router), self.layer.plain()
        return reference.topk_block(self.x_TD, self.counts_T, self.norm, router, layer, self.normalise)

    def expected(self) -> Tensor:
        return self.reference()[0]


def topk_case(
    make: Make, rows: int, width: int, units: int, experts: int, kind: Kind, norm: str = "rms", **rest: Any
) -> TopKCase:
    """The router keeps the model's own kind where experts are int8."""
    router = pack(make.weight(experts, width) * 2, "bfloat16" if kind != "float" else kind)
    normalise = rest.pop("normalise", False)
    layer, norms = make.experts(experts, width, units, kind, **rest), present(make.norm(norm, width), width)
    return TopKCase(make.normal(rows, width), make.whole(1, experts, rows), norms, router, layer, normalise)


@dataclass
class InfinityCase:
    """x += ∞-MoE(norm(x))."""

    x_TD: Tensor
    use: Use
    config: Infinity
    norm: Norm
    router: Packed
    scores: Packed
    layer: Layer

    def __post_init__(self) -> None:
        self.rows, self.rounded = len(self.x_TD), "float" != self.layer.up.kind

    def block(self, rows_r: Tensor) -> tuple[Tensor, Tensor]:
        x_TD, c, layer = self.x_TD[rows_r], self.config, self.layer
        route = (self.router.words, self.router.side, self.scores.words, c.space)
        shape = (c.units, layer.units, c.blocks, c.kept, layer.code)
        use = use_args(part(self.use, rows_r))
        fixed = (*norm_args(self.norm), *route, *layer.words, *shape, *draw_args(self.use, c))
        return x_TD, ops.infinity_block(x_TD, *use, *fixed)

    def run(self, rows_r: Tensor) -> Tensor:
        return self.block(rows_r)[0]

    def reference(self) -> tuple[Tensor, Tensor]:
        weights = (Weight.of(self.router), Weight.of(self.scores), self.layer.plain())
        return reference.infinity_block(self.x_TD, self.use, self.config, self.norm, *weights)

    def expected(self) -> Tensor:
        return self.reference()[0]


def infinity_case(
    make: Make, rows: int, width: int, config: Infinity, run: int, kind: Kind, norm: str = "rms"
) -> InfinityCase:
    """`run` units, a multiple of 16 and of the config's block, are one expert of the ragged work."""
    module = InfinityMixture(width, config)
    randomise(module, make.rng.randrange(1 << 30))
    up, down = (part.detach() for part in blocks_of(module, run))
    layer = Layer(pack(up, kind), pack(down, kind), len(up), run, False, config.activation)
    router = pack(module.router.detach(), "bfloat16" if kind != "float" else kind)
    scores, norms = pack(module.scores.detach(), "float"), present(make.norm(norm, width), width)
    x_TD, use = make.normal(rows, width), random_use(make, rows, config.maximum)
    return InfinityCase(x_TD, use, config, norms, router, scores, layer)
