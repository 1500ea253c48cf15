"""Routing, draws and masks, and the blocks of both mixtures that combine them."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from model.backends.cpu.kernels.pack import Kind
from model.backends.cpu.kernels.params import ACTIVATIONS
from model.moe.infinity import keep_top
from model.noise import normal
from model.shapes.mixtures import Activation, Infinity, Router
from tests.model.backends.cpu.kernels.cases import KINDS, NORMS, Case, Make, check, ops
from tests.model.backends.cpu.kernels.mixture_cases import (
    DrawCase,
    InfinityCase,
    RouteCase,
    TopKCase,
    draw_case,
    infinity_case,
    masks_case,
    random_use,
    route_case,
    topk_case,
)
from tests.model.tiny import infinity

each_router = pytest.mark.parametrize("router", [Router(), Router(normalise=True)], ids=["plain", "normalised"])
each_kind = pytest.mark.parametrize("kind", KINDS)


@each_router
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("rows, experts", [(1, 1), (1, 9), (7, 16), (50, 33), (120, 5), (3, 130)])
def test_routes(router: Router, ties: bool, rows: int, experts: int) -> None:
    check(route_case(Make(rows), rows, experts, router, ties))


def test_equal_logits_go_to_the_lower_index() -> None:
    case = RouteCase(torch.zeros(3, 20), torch.tensor([1, 7, 20]), Router())
    for row, count in zip(case.run(torch.arange(3)), [1, 7, 20], strict=True):
        assert (row >= 0).tolist() == [True] * count + [False] * (20 - count)


@each_router
def test_extreme_logits(router: Router) -> None:
    """Probabilities that vanish are still chosen in order; minus infinity is a probability of 0."""
    logits = torch.tensor([[0.0, -200.0, -300.0, 100.0], [-torch.inf, 3.0, -torch.inf, 1.0]])
    case = RouteCase(logits, torch.tensor([4, 3]), router)
    check(case)
    assert case.run(torch.arange(2))[1].tolist()[2] == -1


def test_no_rows_route_nowhere() -> None:
    assert route_case(Make(1), 3, 5, Router()).run(torch.arange(0)).shape == (0, 5)


CONFIGS = [
    infinity(latent_dim=1),
    infinity(latent_dim=6, draws="antithetic", sigma_min=0.1),
    infinity(latent_dim=16, sigma_link="softplus"),
    infinity(latent_dim=35, draws="antithetic", sigma_link="softplus", sigma_min=0.5),
    infinity(latent_dim=6, draws="points", sigma_min=0.1),
]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("rows", [1, 9, 40])
def test_draws(config: Infinity, rows: int) -> None:
    check(draw_case(Make(rows), rows, config))


def test_spreads_far_from_zero() -> None:
    """Softplus of a large number is the number, of a very negative one nothing."""
    case = draw_case(Make(2), 4, infinity(sigma_link="softplus"))
    case.gaussian_TZ[:, case.config.latent_dim :] = torch.tensor([-50.0, -5, 19.9, 20.1, 60, 1e4])
    check(case)


@pytest.mark.parametrize("draws", ["independent", "antithetic"])
def test_noise_is_that_of_the_model_bit_for_bit(draws: Any) -> None:
    """A mean of 0 and a spread of e^0 leave the noise itself."""
    for width in (1, 4, 6, 33):
        config, make = infinity(latent_dim=width, draws=draws, maximum=9), Make(width)
        use = random_use(make, 60, 9)
        use.seeds_T[:4] = torch.tensor([0, -1, 2**63 - 1, -(2**63)])
        found = DrawCase(torch.zeros(60, 2 * width), use, config).run(torch.arange(60))
        for t, count in enumerate(use.budget.counts_T.tolist()):
            sample_K = torch.arange(count)
            base_K = sample_K // 2 if draws == "antithetic" else sample_K
            key = (use.seeds_T[t].repeat(count), use.moe_layer, use.positions_T[t].repeat(count), base_K)
            sign_K1 = torch.where((sample_K % 2 == 1) & (draws == "antithetic"), -1.0, 1.0)[:, None]
            assert torch.equal(found[t, :count], normal(*key, width) * sign_K1)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("scores, kept", [(1, 1), (12, 3), (16, 16), (37, 1), (64, 17), (300, 299)])
def test_masks(ties: bool, scores: int, kept: int) -> None:
    for rows in (1, 4, 30):
        check(masks_case(Make(scores), rows, scores, kept, ties))


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("replacement, keep_norm", [(False, False), (True, True), (False, True)])
def test_masks_without_replacement_and_with_the_norm_of_their_draws(
    ties: bool, replacement: bool, keep_norm: bool
) -> None:
    for rows, scores, kept in ((1, 6, 1), (4, 37, 2), (30, 96, 3), (9, 300, 50)):
        case = masks_case(Make(scores), rows, scores, kept, ties)
        check(replace(case, replacement=replacement, keep_norm=keep_norm))


def test_more_draws_than_fixed_points_are_refused() -> None:
    config = infinity(draws="points", maximum=3)
    case = draw_case(Make(1), 4, config)
    case.use.budget.counts_T[1] = 3
    with pytest.raises(RuntimeError, match="count 3 is higher than the 2 fixed draws"):
        DrawCase(case.gaussian_TZ, case.use, infinity(draws="points", maximum=2)).run(torch.arange(4))


def test_masks_keep_what_keep_top_keeps() -> None:
    """All that tie with the last that is kept are kept; by value, not by magnitude; the extremes of float32 too."""
    rows = [
        [1.0, 2.0, 2.0, 2.0, 0.0],
        [-1.0, -2.0, -2.0, -3.0, -9.0],
        [torch.inf, -torch.inf, 3e38, -3e38, 1e-45],
        [0.5, -0.5, 0.25, -0.25, 1e-45],
        [-1e-45, -2e-45, -3e-45, -4e-45, -5e-45],
    ]
    for kept in range(1, 6):
        scores = torch.tensor(rows)
        assert torch.equal(
            ops.masks(scores, torch.ones(5, dtype=torch.int64), 1, kept, True, False), keep_top(scores, kept)
        )


def test_the_sign_of_zero_does_not_change_a_mask() -> None:
    scores, one = torch.tensor([[0.0, -0.0, -1.0, -0.0, 0.0, 3.0]]), torch.tensor([1])
    for kept in range(1, 7):
        assert torch.equal(ops.masks(scores, one, 1, kept, True, False), keep_top(scores, kept))


TOPK = [(8, 16, 1), (24, 12, 5), (40, 33, 16), (70, 64, 9)]  # width, expert width, experts


@each_kind
@each_router
@pytest.mark.parametrize("width, units, experts", TOPK)
def test_topk_blocks(kind: Kind, router: Router, width: int, units: int, experts: int) -> None:
    for rows in (1, 6, 110):
        check(topk_case(Make(rows), rows, width, units, experts, kind, router=router))


@each_kind
@pytest.mark.parametrize("norm", NORMS)
def test_topk_blocks_norm_first_and_tell_their_loads(kind: Kind, norm: str) -> None:
    case = topk_case(Make(6), 30, 20, 16, 7, kind, norm)
    check(case)
    load_E = case.block(torch.arange(30))[1]
    assert torch.equal(load_E, case.reference()[1]) and load_E.sum() == case.counts_T.sum()
    assert not case.block(torch.arange(0))[1].any()


@each_kind
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_topk_blocks_activate(kind: Kind, activation: Activation) -> None:
    check(topk_case(Make(7), 8, 20, 32, 4, kind, activation=activation))


# A config, and the units that are one expert of the ragged work: a block each, or runs of several.
RUNS = [
    (infinity(units=512, block=64, keep_ratio=0.12, draws="points", replacement=False, aggregate="norm"), 64),
    (infinity(units=96, block=16), 16),
    (infinity(units=192, block=64, keep_ratio=0.5, draws="antithetic"), 64),
    (infinity(units=96, block=32, activation="gelu_tanh", sigma_link="softplus"), 32),
    (infinity(units=100, block=1, keep_ratio=0.1), 64),
    (infinity(units=144, block=8, keep_ratio=0.3, activation="relu"), 64),
    (infinity(units=50, block=5, activation="silu", latent_dim=9), 80),
    (infinity(units=48, block=3), 48),
    (infinity(units=96, block=4, keep_ratio=0.1, replacement=False), 64),
    (infinity(units=96, block=2, draws="points", aggregate="norm"), 64),
]  # fmt: skip


@each_kind
@pytest.mark.parametrize("config, run", RUNS, ids=str)
def test_infinity_blocks(kind: Kind, config: Infinity, run: int) -> None:
    for rows in (1, 6, 110):
        check(infinity_case(Make(rows), rows, 24, config, run, kind))


@pytest.mark.parametrize("kind", ["float", "bfloat16"])
@pytest.mark.parametrize("config, run", RUNS[4:], ids=str)
@pytest.mark.parametrize("width", [16, 48, 272])
def test_kept_units_read_one_by_one_give_the_bits_of_all_in_one_pass(
    kind: Kind, config: Infinity, run: int, width: int
) -> None:
    """Which of the two runs depends on the batch, so nothing else may."""
    case, all_rows = infinity_case(Make(width), 20, width, config, run, kind), torch.arange(20)
    expected = case.block(all_rows)
    kept = int(expected[1].sum()) * config.block
    for case.crossover_rows in (1, config.kept * config.block, kept // 3, kept - 1, kept, 1 << 40):
        for found, wanted in zip(case.block(all_rows), expected, strict=True):
            assert torch.equal(found, wanted)
        check(case)


@each_kind
@pytest.mark.parametrize("norm", NORMS)
def test_infinity_blocks_norm_first_and_tell_their_loads(kind: Kind, norm: str) -> None:
    case = infinity_case(Make(6), 30, 21, infinity(), 48, kind, norm)
    check(case)
    load_E = case.block(torch.arange(30))[1]
    assert torch.equal(load_E, case.reference()[1]) and load_E.any()
    assert not case.block(torch.arange(0))[1].any()


def test_infinity_blocks_of_more_rows_than_one_piece_of_work_takes() -> None:
    """Every row keeps every block, so that each has them all."""
    check(infinity_case(Make(6), 801, 8, infinity(units=32, block=16, keep_ratio=1.0), 16, "float"))


def test_how_uneven_the_loads_are() -> None:
    """Experts that have any tokens; the sum over the mixtures of the busiest's share over the mean."""
    loads = [torch.tensor([0, 3, 1, 5, 0, 0, 0, 0]), torch.tensor([4, 0, 0, 0, 2, 2, 2, 0])]  # two passes
    distinct, uneven = ops.spread(loads, [3, 1, 4])
    assert distinct == 2 + 1 + 0 + 1 + 0 + 3
    assert uneven == pytest.approx(3 / (4 / 3) + 1 + 0 + 4 / (4 / 3) + 0 + 2 / (6 / 4))
    assert ops.spread([], [3]) == (0, 0.0)


def blocks(kind: Kind) -> list[TopKCase | InfinityCase]:
    return [
        topk_case(Make(3), 25, 40, 33, 6, kind, router=Router(normalise=True)),
        infinity_case(Make(3), 25, 40, *RUNS[4], kind),
    ]


@each_kind
def test_threads_change_nothing(kind: Kind) -> None:
    cases: list[Case] = [
        *blocks(kind),
        route_case(Make(2), 90, 20, Router(normalise=True)),
        draw_case(Make(2), 90, CONFIGS[1]),
    ]
    cases.append(masks_case(Make(2), 90, 30, 7))
    for case in cases:
        results: list[Tensor] = []
        for threads in (1, 2, 3):
            ops.set_threads(threads)
            results.append(case.run(torch.arange(case.rows)))
        assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@each_kind
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_row_that_is_not_finite_harms_no_other(kind: Kind, bad: float) -> None:
    for case in blocks(kind):
        clean, others = case.run(torch.arange(25)), torch.arange(25) != 7
        case.x_TD[7, 39] = bad
        found = case.run(torch.arange(25))
        assert found[7].isnan().all()
        assert torch.equal(found[others], clean[others])
