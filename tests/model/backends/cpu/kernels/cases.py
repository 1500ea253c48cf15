"""Random input for each op that works row by row, how to run it on any of its rows, and what must come out."""

import random
from dataclasses import dataclass
from typing import Any, Protocol, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from model.backends.cpu.kernels import reference
from model.backends.cpu.kernels.pack import Kind, Packed, interleave, pack
from model.backends.cpu.kernels.params import ExpertsParams, FeedForwardParams, LinearParams, NormParams
from model.backends.cpu.kernels.reference import Experts, Norm, Weight
from model.grouped import CODES, Grouped, Values, code_bits, packed_codes
from model.moe.base import RoutedPairs, sort_pairs
from model.shapes.mixtures import Activation

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


def assert_close(
    got: Tensor, want: Tensor, rounded: bool, most: float = 5e-2, exact: float = 1e-5, off: float = 0.1
) -> None:
    """float32 sums differ by their order: `exact` of the values' size.

    Where a computed number is rounded again, one within 1e-7 of a tie may fall to the other side: about one in 5,000
    (to bfloat16). So one row, and a share `off` of many, may differ by some steps, `most` of the size; no others.
    """
    assert got.shape == want.shape and got.isfinite().all()
    if not want.numel():
        return
    size = want.double().square().mean().sqrt()
    error_R = ((got.double() - want).abs() / size).flatten(1).amax(1)
    assert error_R.max() <= (most if rounded else exact), f"{error_R.max():.1e}"
    wrong = int((error_R > exact).sum())
    assert wrong <= 1 + off * len(want), f"{wrong} of {len(want)} rows are off"


def check(case: Case) -> None:
    """Values, and that no row's bits depend on the rows beside it: alone, in any order, twice in one batch."""
    full = case.run(torch.arange(case.rows))
    assert_close(full, case.expected(), case.rounded)
    generator = torch.Generator().manual_seed(case.rows)
    some = torch.randint(0, case.rows, (min(case.rows, 6),), generator=generator)
    for rows_r in (*some.split(1), torch.randperm(case.rows, generator=generator), some.repeat(2)):
        assert torch.equal(case.run(rows_r), full[rows_r])


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
            flat = self.normal(*up.shape[:2], 1, scale=0.5)
            biases = ((interleave(flat) if gated else flat)[..., 0], self.normal(count, width, scale=0.5))
        return Layer(packed_up, pack(F.pad(down, (0, -units % 16)), kind), count, units, gated, activation, *biases)


@dataclass(frozen=True)
class Layer:
    """Packed experts, and biases [count, outputs]. The kernels want those as long as the packed outputs."""

    up: Packed
    down: Packed
    count: int
    units: int
    gated: bool
    activation: Activation
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None

    @property
    def params(self) -> ExpertsParams:
        biases = [
            None if bias is None else F.pad(bias, (0, -bias.shape[1] % 16)) for bias in (self.up_bias, self.down_bias)
        ]
        return ExpertsParams(self.up, self.down, self.units, self.gated, self.activation, *biases)

    def plain(self) -> Experts:
        up = Weight.of(self.up, self.count, self.up_bias)
        return Experts(up, Weight.of(self.down, self.count, self.down_bias), self.gated, self.activation)


def norm_params(norm: Norm) -> NormParams:
    return NormParams(norm.weight, norm.bias, norm.eps)


def grouped(make: Make, n: int, k: int, group: int, values: Values, minima: bool, *batch: int) -> Grouped:
    """Random codes and scales of both signs, some zero, some subnormal; "table6" has scales of 8 bits."""
    shape = (*batch, n, k // group)
    scales = make.normal(*shape, scale=0.01).where(make.normal(*shape) < 1.5, 0).half()
    scales[..., 0, 0] = 3e-6
    if values == "table6":
        scales = make.whole(-127, 127, *shape).where(scales != 0, 0).to(torch.int8)
    if values == "bytes":
        codes = make.whole(-128, 127, *batch, n, k).to(torch.int8)
    else:
        codes = packed_codes(make.whole(0, len(CODES[values]) - 1, *batch, n, k), code_bits(values))
    least = make.normal(*shape, scale=0.1).half() if minima else None
    factors = 0.5 + make.normal(*batch, n).abs() if values in ("table6", "e2m1") else None
    return Grouped(codes, scales, group, values, least, factors)


@dataclass
class LinearCase:
    """y = scale · (W norm(x) + bias)."""

    x_TD: Tensor
    norm: Norm
    weight: Packed
    bias: Tensor | None
    scale: float = 1.0

    def __post_init__(self) -> None:
        self.rows, self.rounded = len(self.x_TD), self.norm.weight is not None and self.weight.kind != "float"

    def run(self, rows_r: Tensor) -> Tensor:
        params = LinearParams(norm_params(self.norm), self.weight, self.weight.n, self.bias, self.scale)
        return ops.linear(self.x_TD[rows_r], *params.arguments())

    def expected(self) -> Tensor:
        return reference.linear(self.x_TD, self.norm, Weight.of(self.weight, 1, self.bias), self.scale)


def linear_case(
    make: Make, rows: int, n: int, k: int, kind: Kind, norm: str = "none", bias: bool = False
) -> LinearCase:
    weight, shift = pack(make.weight(n, k), kind), make.normal(n) if bias else None
    return LinearCase(make.normal(rows, k), make.norm(norm, k), weight, shift)


@dataclass
class ArgmaxCase:
    """The index of the highest value of each row; many are equal."""

    x_TD: Tensor

    def __post_init__(self) -> None:
        self.rows, self.rounded = len(self.x_TD), False

    def run(self, rows_r: Tensor) -> Tensor:
        return ops.argmax(self.x_TD[rows_r])[:, None]

    def expected(self) -> Tensor:
        return reference.argmax(self.x_TD)[:, None]


def argmax_case(make: Make, rows: int, width: int) -> ArgmaxCase:
    return ArgmaxCase((make.normal(rows, width) * 3).round())


IMPOSSIBLE = -100.0  # stands for -inf, so that values can be compared


@dataclass
class ConstrainCase:
    """Logits under masks: some rows have none, some share one, some are left without a finite value."""

    x_TD: Tensor
    raw_TD: Tensor
    allowed_MW: Tensor
    mask_of_T: Tensor

    def __post_init__(self) -> None:
        self.rows, self.rounded = len(self.x_TD), False

    def run(self, rows_r: Tensor) -> Tensor:
        y_RD = ops.constrain(self.x_TD[rows_r], self.raw_TD[rows_r], self.allowed_MW, self.mask_of_T[rows_r])
        return y_RD.nan_to_num(neginf=IMPOSSIBLE)

    def expected(self) -> Tensor:
        y_TD = reference.constrain(self.x_TD, self.raw_TD, self.allowed_MW, self.mask_of_T)
        return y_TD.nan_to_num(neginf=IMPOSSIBLE)


def constrain_case(make: Make, rows: int, width: int, share: float = 0.5) -> ConstrainCase:
    """`share` of all tokens are allowed. Some values are not finite, some rows hold nothing else."""
    raw_TD, words, masks = make.normal(rows, width), -(-width // 32), make.rng.randint(0, 4)
    x_TD = raw_TD.where(make.normal(rows, width) < 1, -torch.inf).where(make.normal(rows, 1) < 1, -torch.inf)
    bits_MW32 = torch.rand(masks, words, 32, generator=make.generator) < share
    allowed_MW = (bits_MW32.long() << torch.arange(32)).sum(-1).int()
    return ConstrainCase(x_TD, raw_TD, allowed_MW, make.whole(-1, masks - 1, rows))


@dataclass
class ExpertsCase:
    """Σ weight · expert(x) for a given choice; a row may choose nothing."""

    x_TD: Tensor
    chosen_TE: Tensor  # bool
    weight_TE: Tensor
    layer: Layer

    def __post_init__(self) -> None:
        self.rows, self.rounded = len(self.x_TD), self.layer.up.kind != "float"

    def calls(self, rows_r: Tensor) -> RoutedPairs:
        token_R, expert_R = self.chosen_TE[rows_r].nonzero(as_tuple=True)
        return sort_pairs(token_R, expert_R, self.weight_TE[rows_r][token_R, expert_R], self.layer.count)

    def run(self, rows_r: Tensor) -> Tensor:
        calls = self.calls(rows_r)
        pairs = (calls.token_R.int(), calls.weight_R, calls.ends_E)
        return ops.experts(self.x_TD[rows_r], *pairs, *self.layer.params.arguments())

    def expected(self) -> Tensor:
        return reference.experts(self.x_TD, self.calls(torch.arange(self.rows)), self.layer.plain())


def experts_case(make: Make, chosen_TE: Tensor, width: int, units: int, kind: Kind, **rest: Any) -> ExpertsCase:
    rows, count = chosen_TE.shape
    layer = make.experts(count, width, units, kind, **rest)
    return ExpertsCase(make.normal(rows, width), chosen_TE, 0.1 + make.normal(rows, count).abs(), layer)


def chosen(make: Make, rows: int, experts: int, share: float = 0.4) -> Tensor:
    """Each row's experts, at random: some rows may have none, and so may some experts."""
    return torch.rand(rows, experts, generator=make.generator) < share


@dataclass
class FFNCase:
    """x += residual_scale · feed-forward(norm(x))."""

    x_TD: Tensor
    norm: Norm
    layer: Layer
    residual_scale: float = 1.0

    def __post_init__(self) -> None:
        self.rows, self.rounded = len(self.x_TD), self.layer.up.kind != "float"

    def run(self, rows_r: Tensor) -> Tensor:
        x_TD = self.x_TD[rows_r]
        params = FeedForwardParams(norm_params(self.norm), self.layer.params, self.residual_scale)
        ops.ffn_block(x_TD, *params.arguments())
        return x_TD

    def expected(self) -> Tensor:
        return reference.ffn_block(self.x_TD, self.norm, self.layer.plain(), self.residual_scale)


def ffn_case(
    make: Make, rows: int, width: int, units: int, kind: Kind, norm: str = "rms", **rest: Any
) -> FFNCase:  # fmt: skip
    return FFNCase(make.normal(rows, width), make.norm(norm, width), make.experts(1, width, units, kind, **rest))
