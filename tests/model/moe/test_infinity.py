"""∞-MoE: one pass equals the mean of K passes, draws are nested and keyed, independent of the batch."""

import dataclasses
import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.batch import LayerBudget
from model.moe.infinity import InfinityMixture, keep_top
from model.moe.points import fixed_points
from model.noise import mix, mix_int, normal, uniform
from model.shapes.mixtures import Infinity
from model.step import LayerStep, Observer
from tests.model.tiny import infinity, randomise, use

WIDTH = 16
KINDS = [
    infinity(block=1),
    infinity(block=4),
    infinity(block=4, draws="antithetic", activation="relu"),
    infinity(block=1, sigma_link="softplus", sigma_min=0.25, keep_ratio=0.1, activation="gelu_tanh"),
    infinity(block=4, draws="points"),
    infinity(block=1, keep_ratio=0.1, replacement=False),
    infinity(block=4, draws="antithetic", aggregate="norm"),
    infinity(block=2, keep_ratio=0.125, draws="points", replacement=False, aggregate="norm"),
]


def mixture(config: Infinity) -> InfinityMixture:
    module = InfinityMixture(WIDTH, config)
    randomise(module)
    return module.requires_grad_(False)


def tokens(count: int) -> Tensor:
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(3))


def counts_of(number: int, largest: int = 8) -> list[int]:
    return [1 + (3 * i) % largest for i in range(number)]


def draw(config: Infinity, given: LayerStep, token: int, sample: int) -> Tensor:
    """ε of one (token, sample) in float64, as the config's rule says."""
    if config.draws == "points":
        return fixed_points(sample + 1, config.latent_dim)[sample].double()
    mirrored = config.draws == "antithetic"
    base = sample // 2 if mirrored else sample
    row = normal(given.seeds_T[token, None], given.moe_layer, given.positions_T[token, None], torch.tensor([base]), 6)[
        0
    ]
    return row.double() * (-1 if mirrored and sample % 2 else 1)


def act(config: Infinity, x: float) -> float:
    match config.activation:
        case "relu":
            return max(x, 0.0)
        case "gelu_tanh":
            return 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
        case _:
            return 0.5 * x * (1 + math.erf(x / math.sqrt(2)))


def k_passes(module: InfinityMixture, x_D: Tensor, given: LayerStep, token: int) -> Tensor:
    """(1/K) Σ_k W2 (Act(W1 x) ⊙ mask(W_z z_k)), step by step in float64 (methods §1.1)."""
    config = module.config
    router, scores, up, down = (p.double() for p in (module.router, module.scores, module.up, module.down))
    mean_Z, raw_Z = (router @ x_D.double()).split(config.latent_dim)
    linked_Z = raw_Z.exp() if config.sigma_link == "exp" else (1 + raw_Z.exp()).log()
    h_F = torch.tensor([act(config, value) for value in (up @ x_D.double()).tolist()], dtype=torch.float64)
    total_D = torch.zeros(WIDTH, dtype=torch.float64)
    total_E, squares, taken = torch.zeros(config.blocks, dtype=torch.float64), 0.0, set[int]()
    count = int(given.budget.counts_T[token])
    for sample in range(count):
        z_Z = mean_Z + (linked_Z + config.sigma_min) * draw(config, given, token, sample)
        score_E = scores @ z_Z
        best = [int(block) for block in score_E.argsort(descending=True)]
        if not config.replacement:
            best = [block for block in best if block not in taken]
        kept = torch.tensor(best[: config.kept])
        taken |= set(kept.tolist())
        mask_E = torch.zeros_like(score_E).index_copy(0, kept, score_E[kept])
        total_D += down @ (h_F * mask_E.repeat_interleave(config.block))
        total_E += mask_E
        squares += float(mask_E.square().sum())
    if config.aggregate == "norm":
        total_D *= math.sqrt(squares / count) / float((total_E / count).norm())
    return total_D / count


class Seen(Observer):
    """Observer that keeps what it was told."""

    def __init__(self) -> None:
        self.pairs, self.loads = 0, torch.zeros(0)

    def routed(self, layer: int, pairs: int, load_E: Tensor, scores_TE: Tensor | None) -> None:
        self.pairs, self.loads = pairs, load_E


@pytest.mark.parametrize("config", KINDS, ids=str)
def test_one_pass_equals_k_passes(config: Infinity) -> None:
    module, x_TD, given_use = mixture(config), tokens(20), use(counts_of(20))
    y_TD = module(x_TD, given_use)
    expected_TD = torch.stack([k_passes(module, x_D, given_use, t) for t, x_D in enumerate(x_TD)])
    torch.testing.assert_close(y_TD.double(), expected_TD, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("config", KINDS, ids=str)
def test_ragged_calls_equal_the_masked_pass(config: Infinity) -> None:
    module, x_TD = mixture(config), tokens(20)
    mask_TE = module.masks(x_TD, use(counts_of(20)))
    pairs = module.pairs(mask_TE)
    assert len(pairs.token_R) == int((mask_TE != 0).sum()) < mask_TE.numel()
    torch.testing.assert_close(module.run_pairs(x_TD, pairs), module.run_masked(x_TD, mask_TE), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("config", KINDS, ids=str)
def test_one_draw_keeps_exactly_the_share(config: Infinity) -> None:
    mask_TE = mixture(config).masks(tokens(50), use([1] * 50))
    assert config.kept == max(1, round(config.blocks * config.keep_ratio))
    assert ((mask_TE != 0).sum(-1) == config.kept).all()


def test_the_largest_values_are_kept_raw_and_negative_ones_are_not_large() -> None:
    kept_RE = keep_top(torch.tensor([[-5.0, 1.0, 3.0, 2.0], [-4.0, -1.0, -2.0, -3.0]]), 2)
    assert kept_RE.tolist() == [[0, 0, 3, 2], [0, -1, -2, 0]]


@pytest.mark.parametrize("draws", ["independent", "antithetic"])
def test_fewer_draws_are_a_prefix_of_more(draws: Any) -> None:
    """8 · m̄(8) − 7 · m̄(7) is the eighth draw's own mask; so on down to one, and K=2 is the mean of the first two."""
    config = infinity(draws=draws, block=1)
    module, x_TD = mixture(config), tokens(9)
    sums = [module.masks(x_TD, use([k] * 9)).double() * k for k in range(1, 9)]
    for shorter, longer in pairwise(sums):
        added = (longer - shorter).abs() > 1e-5
        assert (added.sum(-1) == config.kept).all()


@pytest.mark.parametrize("draws", ["independent", "antithetic"])
def test_noise_of_two_is_the_start_of_eight(draws: Any) -> None:
    module = mixture(infinity(draws=draws))
    token_R, sample_R = torch.zeros(8, dtype=torch.int64), torch.arange(8)
    eight, two = (module.noise(token_R[:k], sample_R[:k], use([8])) for k in (8, 2))
    assert torch.equal(eight[:2], two)
    assert torch.equal(eight[1], -eight[0]) == (draws == "antithetic")
    assert len({tuple(row.abs().tolist()) for row in eight}) == (4 if draws == "antithetic" else 8)


def test_work_is_the_sum_of_the_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    module, counts, seen, drawn = mixture(infinity()), counts_of(20), Seen(), []
    monkeypatch.setattr(module, "noise", lambda token_R, *rest: drawn.append(len(token_R)) or torch.ones(1, 6))
    module(tokens(20), use(counts, observer=seen))
    assert sum(drawn) == seen.pairs == sum(counts) < 20 * max(counts)
    assert seen.loads.shape == (12,)


@pytest.mark.parametrize("config", KINDS, ids=str)
def test_a_tokens_mask_does_not_depend_on_its_batch(config: Infinity) -> None:
    """Bit for bit among any others; alone too, but for how the matrix library sums a product of one row."""
    module, x_TD, full = mixture(config), tokens(40), use(counts_of(40))
    mask_TE = module.masks(x_TD, full)
    for rows_r in (torch.randperm(40, generator=torch.Generator().manual_seed(1)), torch.arange(0, 40, 3)):
        counts_r = full.budget.counts_T[rows_r]
        part = LayerStep(LayerBudget(counts_r, int(counts_r.max())), full.seeds_T[rows_r], full.positions_T[rows_r])
        assert torch.equal(module.masks(x_TD[rows_r], part), mask_TE[rows_r])
    for t in range(40):
        alone = LayerStep(
            LayerBudget(full.budget.counts_T[t, None], int(full.budget.counts_T[t])),
            full.seeds_T[t, None],
            full.positions_T[t, None],
        )
        mask_1E = module.masks(x_TD[t, None], alone)
        assert torch.equal(mask_1E != 0, mask_TE[t, None] != 0)
        torch.testing.assert_close(mask_1E, mask_TE[t, None], atol=1e-6, rtol=1e-5)


def rows(count: int, **fixed: int) -> tuple[Tensor, Tensor, Tensor]:
    """(seed, position, sample) rows; what is not fixed counts up in the last of them."""
    return tuple(torch.full((count,), fixed[name]) for name in ("seed", "position", "sample"))  # type: ignore[return-value]


def test_noise_is_standard_normal() -> None:
    seed_R, _, sample_R = rows(20_000, seed=1, position=0, sample=0)
    noise = normal(seed_R, 0, torch.arange(20_000), sample_R, 8).double()
    assert abs(noise.mean()) < 0.01
    assert abs(noise.var() - 1) < 0.02
    assert abs((noise**3).mean()) < 0.05
    assert abs((noise**4).mean() - 3) < 0.1
    assert (torch.corrcoef(noise.T) - torch.eye(8)).abs().max() < 0.04  # between the widths of one draw


def test_noise_of_neighbours_is_independent() -> None:
    seed_R, position_R, sample_R = torch.full((20_000,), 7), torch.arange(20_000), torch.full((20_000,), 2)
    base = normal(seed_R, 1, position_R, sample_R, 4).flatten()
    others = [
        normal(seed_R, 2, position_R, sample_R, 4),
        normal(seed_R + 1, 1, position_R, sample_R, 4),
        normal(seed_R, 1, position_R + 1, sample_R, 4),
        normal(seed_R, 1, position_R, sample_R + 1, 4),
        normal(-seed_R, 1, position_R, sample_R, 4),
    ]
    for other in others:
        assert abs(torch.corrcoef(torch.stack([base, other.flatten()]))[0, 1]) < 0.02


def test_any_seed_works_and_no_two_agree() -> None:
    seeds = torch.tensor([0, 1, -1, 2**32, -(2**32), 2**63 - 1, -(2**63)])
    noise = normal(seeds, 0, torch.zeros(7, dtype=torch.int64), torch.zeros(7, dtype=torch.int64), 5)
    assert noise.shape == (7, 5)
    assert noise.isfinite().all()
    assert len({tuple(row.tolist()) for row in noise}) == 7


def test_a_row_of_noise_does_not_depend_on_the_others() -> None:
    seeds, positions, samples = torch.arange(50) % 3, torch.arange(50), torch.arange(50) % 5
    noise = normal(seeds, 4, positions, samples, 6)
    for t in (0, 7, 49):
        assert torch.equal(normal(seeds[t, None], 4, positions[t, None], samples[t, None], 6)[0], noise[t])


def test_noise_never_changes_between_versions() -> None:
    """An answer is named by its seed: other bits here are other answers to old seeds."""
    row = normal(torch.tensor([42]), 3, torch.tensor([17]), torch.tensor([2]), 4)[0]
    assert [round(value, 5) for value in row.tolist()] == [-1.0264, 0.75934, -1.78254, 0.31367]
    assert round(uniform(42, 17), 10) == 0.4471518261


def test_the_hash_is_splitmix64() -> None:
    golden, published = 0x9E3779B97F4A7C15, [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert [mix_int(1234567 + n * golden) for n in (1, 2, 3)] == published


@settings(deadline=None)
@given(st.integers(-(2**63), 2**63 - 1))
def test_mix_equals_mix_int(value: int) -> None:
    assert int(mix(torch.tensor([value]))[0]) % 2**64 == mix_int(value)


def test_uniform_is_uniform() -> None:
    draws = torch.tensor([uniform(9, position) for position in range(20_000)])
    assert draws.min() >= 0 and draws.max() < 1
    assert (draws.histc(10, 0, 1) / 20_000 - 0.1).abs().max() < 0.01


def test_draws_without_replacement_keep_different_blocks() -> None:
    config = infinity(block=1, keep_ratio=0.1, replacement=False)
    mask_TE = mixture(config).masks(tokens(16), use(counts_of(16)))
    assert ((mask_TE != 0).sum(-1) == torch.tensor(counts_of(16)) * config.kept).all()


def test_fixed_points_know_no_seed_and_no_position() -> None:
    module = mixture(infinity(draws="points"))
    given_use = use([3] * 4)
    other_use = dataclasses.replace(given_use, seeds_T=given_use.seeds_T + 7, positions_T=given_use.positions_T + 9)
    assert torch.equal(module.masks(tokens(4), given_use), module.masks(tokens(4), other_use))
    assert not module.config.draws_noise
    assert infinity().draws_noise


def test_the_mean_mask_gets_the_norm_of_its_draws() -> None:
    plain = infinity(block=1, keep_ratio=0.1, replacement=False)
    module = mixture(plain)
    mean_TE = module.masks(tokens(6), use([4] * 6))
    module.config = dataclasses.replace(plain, aggregate="norm")
    norm_TE = module.masks(tokens(6), use([4] * 6))
    # Draws that share no block: |mean|² = Σ|draw|² / K², so that the norm grows by √K.
    torch.testing.assert_close(norm_TE, mean_TE * 2, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"draws": "points", "latent_dim": 2, "maximum": 4}, "4 draws are more than the 3 points of width 2"),
        ({"replacement": False, "maximum": 5}, "5 draws without replacement cannot keep 3 each of 12 groups"),
        ({"aggregate": "sum"}, "aggregate"),
    ],
)
def test_impossible_draws_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        infinity(**changes)
