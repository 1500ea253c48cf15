"""Residual additions and norms against the decoder's own modules."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from model.backends.cuda.kernels.norm import Norm, residual_norm
from model.backends.cuda.kernels.repair import Repair
from model.batch import LayerBudget
from model.budget import RoutingRule
from model.layers import RMSNorm
from model.moe.repair import RepairTables, repaired

TOKENS, WIDTH = 5, 48
UNTOUCHED = -77.0


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def expected(x_TD: Tensor, norm: Norm) -> Tensor:
    if norm.layer:
        return F.layer_norm(x_TD, (WIDTH,), norm.weight_D, norm.bias_D, norm.eps)
    module = RMSNorm(WIDTH, norm.eps, norm.offset)
    module.weight.data = norm.weight_D
    return module(x_TD).detach()


NORMS = {
    "rms": Norm(1 + 0.1 * random(WIDTH, seed=1), 1e-5),
    "rms with an offset": Norm(0.1 * random(WIDTH, seed=1), 1e-5, offset=1.0),
    "layer": Norm(random(WIDTH, seed=1), 1e-5, random(WIDTH, seed=2), layer=True),
    "layer without a bias": Norm(random(WIDTH, seed=1), 1e-5, layer=True),
}


@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_row_is_added_and_normed(norm: Norm, dtype: torch.dtype) -> None:
    x_TD, update_TD = 3 + random(TOKENS, WIDTH, seed=3), random(TOKENS, WIDTH, seed=4).to(dtype)
    out_TD = torch.full((TOKENS + 1, WIDTH), UNTOUCHED, dtype=dtype)
    residual_TD = torch.cat([x_TD, torch.full((1, WIDTH), UNTOUCHED)])
    residual_norm(residual_TD[:TOKENS], norm, out_TD[:TOKENS], update_TD, scale=0.5)
    wanted_TD = x_TD + 0.5 * update_TD.float()
    torch.testing.assert_close(residual_TD[:TOKENS], wanted_TD)
    torch.testing.assert_close(out_TD[:TOKENS].float(), expected(wanted_TD, norm), atol=2e-3, rtol=2e-3)
    if dtype == torch.float32:
        torch.testing.assert_close(out_TD[:TOKENS], expected(wanted_TD, norm), atol=1e-5, rtol=1e-5)
    assert (residual_TD[TOKENS:] == UNTOUCHED).all() and (out_TD[TOKENS:] == UNTOUCHED).all()


def test_an_update_is_repaired_where_its_token_wants_it() -> None:
    """The update of an ∞-MoE. A token's count names the row; the last one's is padding."""
    x_TD, update_TD, out_TD = (random(TOKENS, WIDTH, seed=seed) for seed in (3, 4, 5))
    counts_T, wanted_T = torch.tensor([1, 2, 2, 3, 0]), torch.tensor([1, 0, 1, 1, 0], dtype=torch.int32)
    tables = RepairTables(random(4, WIDTH, seed=6), random(4, WIDTH, seed=7))
    given = LayerBudget(counts_T, 3, (RoutingRule(), RoutingRule(repair=True)), wanted_T.long())
    wanted_TD = x_TD + 0.5 * repaired(update_TD, given, tables)
    residual_norm(x_TD, NORMS["rms"], out_TD, update_TD, 0.5, Repair(tables, counts_T, wanted_T))
    torch.testing.assert_close(x_TD, wanted_TD)


def test_the_first_norm_has_nothing_to_add() -> None:
    x_TD, out_TD = random(TOKENS, WIDTH), torch.full((TOKENS, WIDTH), torch.nan)
    before_TD = x_TD.clone()
    residual_norm(x_TD, NORMS["rms"], out_TD)
    assert torch.equal(x_TD, before_TD)
    torch.testing.assert_close(out_TD, expected(x_TD, NORMS["rms"]))


def test_what_is_normed_is_what_was_stored() -> None:
    """A residual in half precision: the norm sees its rounded values, as the next layer will."""
    x_TD, update_TD = (100 * random(TOKENS, WIDTH)).half(), random(TOKENS, WIDTH, seed=4)
    out_TD = torch.full((TOKENS, WIDTH), torch.nan)
    residual_norm(x_TD, NORMS["rms"], out_TD, update_TD)
    torch.testing.assert_close(out_TD, expected(x_TD.float(), NORMS["rms"]), atol=1e-5, rtol=1e-5)
