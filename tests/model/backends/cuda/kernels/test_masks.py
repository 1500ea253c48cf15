"""Draws and mean masks of ∞-MoE against the decoder's own module: every kind of draw, mixed counts, poisoned rows."""

from typing import Any

import pytest
import torch
from torch import Tensor

from model.backends.cuda.kernels.draws import draw, noise_table
from model.backends.cuda.kernels.masks import keep
from model.moe.infinity import InfinityMixture, mean_masks
from tests.model.tiny import infinity, randomise, use

COUNTS = [1, 4, 2, 3]
WIDTH = 24


def mixture(**changes: Any) -> InfinityMixture:
    module = InfinityMixture(WIDTH, infinity(**changes))
    randomise(module)
    return module.requires_grad_(False)


def rows_of(counts: list[int], k_max: int) -> Tensor:
    """Rows of the draws that run, in a table of k_max rows for each token."""
    return torch.tensor([token * k_max + k for token, count in enumerate(counts) for k in range(count)])


@pytest.mark.parametrize("draws", ["independent", "antithetic", "points"])
@pytest.mark.parametrize("link", ["exp", "softplus"])
def test_draws_are_the_decoders(draws: str, link: str) -> None:
    module = mixture(draws=draws, sigma_link=link, sigma_min=0.25)
    x_TD, step, k_max = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(1)), use(COUNTS, layer=3), 5
    mean_TZ, sigma_TZ = module.gaussian(x_TD)
    token_R = torch.tensor([token for token, count in enumerate(COUNTS) for _ in range(count)])
    sample_R = torch.cat([torch.arange(count) for count in COUNTS])
    wanted_RZ = mean_TZ[token_R] + sigma_TZ[token_R] * module.noise(token_R, sample_R, step)
    z_RZ = torch.full((4 * k_max, 6), torch.nan)
    given = (x_TD @ module.router.T, step.seeds_T, step.positions_T, torch.tensor(COUNTS), 3)
    draw(*given, module.config, noise_table(module.config, x_TD), z_RZ)
    rows_R = rows_of(COUNTS, k_max)
    torch.testing.assert_close(z_RZ[rows_R], wanted_RZ, atol=1e-6, rtol=1e-6)
    assert int(z_RZ.isnan().all(1).sum()) == 4 * k_max - len(rows_R)  # no other was written


@pytest.mark.parametrize("replacement", [False, True])
@pytest.mark.parametrize("aggregate", ["mean", "norm"])
def test_masks_are_the_decoders(replacement: bool, aggregate: str) -> None:
    """12 groups, of which a draw keeps 3, or more where there are ties: in the draws of every other token."""
    shape, k_max = infinity(replacement=replacement, aggregate=aggregate, maximum=4), 4
    score_RE = torch.randn(4 * k_max, 12, generator=torch.Generator().manual_seed(2))
    for tied_RE in score_RE.split(k_max)[::2]:
        tied_RE.copy_((2 * tied_RE).round() / 2)  # zeros of both signs too
    rows_R = rows_of(COUNTS, k_max)
    wanted_TE = mean_masks(score_RE[rows_R], torch.tensor(COUNTS), max(COUNTS), shape)
    beyond = torch.ones(len(score_RE), dtype=torch.bool)
    beyond[rows_R] = False
    score_RE[beyond] = torch.nan
    mask_TE = torch.full((5, 12), torch.nan)
    keep(score_RE, torch.tensor(COUNTS), shape, mask_TE[:4])
    torch.testing.assert_close(mask_TE[:4], wanted_TE, atol=1e-6, rtol=1e-6)
    assert torch.equal(mask_TE[:4] != 0, wanted_TE != 0)
    assert mask_TE[4:].isnan().all()


def test_zeros_of_both_signs_are_equal() -> None:
    """The first draw keeps both, so that the second may keep neither."""
    shape = infinity(units=16, block=4, keep_ratio=0.5, maximum=2, replacement=False)
    score_RE = torch.tensor([[1.0, -0.0, 0.0, -1.0], [3.0, 5.0, 4.0, -2.0]])
    mask_TE = torch.full((1, 4), torch.nan)
    keep(score_RE, torch.tensor([2]), shape, mask_TE)
    assert mask_TE.tolist() == [[0.5, 0.0, 0.0, -1.0]]


def test_a_tokens_mask_depends_on_no_other() -> None:
    shape = infinity(aggregate="norm")
    score_RE = torch.randn(16, 12, generator=torch.Generator().manual_seed(2))
    together_TE, alone_1E = torch.full((4, 12), torch.nan), torch.full((1, 12), torch.nan)
    keep(score_RE, torch.tensor(COUNTS), shape, together_TE)
    for token, count in enumerate(COUNTS):
        keep(score_RE[token * 4 : token * 4 + count], torch.tensor([count]), shape, alone_1E)
        assert torch.equal(alone_1E[0], together_TE[token])


def test_no_draw_keeps_nothing() -> None:
    """A row that only fills a bucket of a graph."""
    mask_TE = torch.full((1, 12), torch.nan)
    keep(torch.full((2, 12), torch.nan), torch.tensor([0]), infinity(aggregate="norm"), mask_TE)
    assert (mask_TE == 0).all()
