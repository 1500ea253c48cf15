"""∞-MoE from kernels against the decoder's own module: what is kept, what is skipped, and a row's bits in a batch."""

from typing import Any

import pytest
import torch
from torch import Tensor

from model.backends.cuda.infinity import InfinityLayer, infinity_layer
from model.backends.cuda.kernels.grouped import kept_steps, masked_down, masked_up
from model.backends.cuda.kernels.operands import Tile
from model.batch import LayerBudget
from model.moe.infinity import InfinityMixture
from model.step import LayerStep
from tests.model.tiny import infinity, randomise, use

WIDTH = 24
COUNTS = [1, 4, 2, 3, 1]


@pytest.fixture(autouse=True)
def poisoned(poison: None) -> None:
    """Nothing may be read that was not written."""


def mixture(dtype: torch.dtype = torch.float32, **changes: Any) -> InfinityMixture:
    module = InfinityMixture(WIDTH, infinity(units=320, block=32, keep_ratio=0.1, **changes))
    randomise(module)
    return module.requires_grad_(False).to(dtype)


def tokens(count: int = len(COUNTS)) -> Tensor:
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(3))


KINDS = [
    {},
    {"draws": "antithetic", "sigma_link": "softplus", "activation": "relu"},
    {"draws": "points", "replacement": False, "aggregate": "norm"},
]


@pytest.mark.parametrize("changes", KINDS)
def test_mixed_counts_as_the_decoder_computes_them(changes: dict[str, Any]) -> None:
    module, x_TD = mixture(**changes), tokens()
    step = use(COUNTS, layer=2)
    layer = infinity_layer(module)
    assert torch.equal(layer.masks(x_TD, step) != 0, module.masks(x_TD, step) != 0)
    torch.testing.assert_close(layer(x_TD, step), module(x_TD, step), atol=1e-5, rtol=1e-5)


def test_half_precision() -> None:
    module, step = mixture(), use(COUNTS)
    mask_TE = module.masks(tokens(), step)
    wanted_TD = module.run_masked(tokens(), mask_TE)
    found_TD = infinity_layer(module.half()).run_masked(tokens().half(), mask_TE)
    torch.testing.assert_close(found_TD, wanted_TD, atol=5e-3, rtol=5e-3)


def alone(layer: InfinityLayer, x_TD: Tensor, step: LayerStep, token: int) -> Tensor:
    """The output of one token in a batch of its own."""
    one = slice(token, token + 1)
    budget = LayerBudget(step.budget.counts_T[one], COUNTS[token])
    return layer(x_TD[one], LayerStep(budget, step.seeds_T[one], step.positions_T[one], step.moe_layer))[0]


def test_rows_alone_have_the_bits_that_they_have_in_a_batch(chains: None) -> None:
    layer, x_TD, step = infinity_layer(mixture(aggregate="norm")), tokens(), use(COUNTS)
    together_TD = layer(x_TD, step)
    mask_TE = layer.masks(x_TD, step)
    assert torch.equal(layer.run_masked(x_TD.repeat(4, 1), mask_TE.repeat(4, 1))[-5:], together_TD)  # taller tiles
    for token in range(len(COUNTS)):
        assert torch.equal(alone(layer, x_TD, step, token), together_TD[token])


def test_what_no_row_of_a_tile_keeps_is_skipped() -> None:
    """10 groups of 32 units, two to a step; rows 0 to 15 are a tile, row 16 another."""
    mask_TE = torch.zeros(17, 10)
    mask_TE[3, 9], mask_TE[5, 2], mask_TE[16, 7] = 1.0, -2.0, 0.5
    steps = kept_steps(mask_TE, 320, 16)
    assert steps.count_N.tolist() == [2, 1]
    assert steps.step_NS[0, :2].tolist() == [1, 4] and steps.step_NS[1, 0] == 3
    h_TF, up_FD = torch.full((17, 320), torch.nan), torch.randn(320, WIDTH)
    up_FD[:64] = torch.nan  # of a step that is skipped
    masked_up(tokens(17), up_FD, mask_TE, steps, "relu", Tile(64, 16), h_TF)
    assert torch.equal(~h_TF.isnan(), mask_TE.repeat_interleave(32, dim=1) != 0)
    y_TD = torch.full((18, WIDTH), torch.nan)
    masked_down(h_TF, torch.randn(WIDTH, 320), mask_TE, steps, Tile(64, 16), y_TD[:17])
    assert (y_TD[[0, 1, 2, 4]] == 0).all() and y_TD[3].abs().sum() > 0 and y_TD[17].isnan().all()
