"""The ordered sum over a token's experts: poisoned rows of pairs that never ran, mixed counts, the order itself."""

import pytest
import torch
from torch import Tensor

from model.backends.cuda.kernels import reference
from model.backends.cuda.kernels.combine import combine
from model.backends.cuda.kernels.norm import Norm, residual_norm

EXPERTS, WIDTH = 6, 40


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def routed(counts: list[int], k_max: int) -> tuple[Tensor, Tensor]:
    """Experts and weights [T, K]; the weights of ranks beyond a count are no numbers."""
    counts_T = torch.tensor(counts)
    expert_TK = torch.rand(len(counts), EXPERTS, generator=torch.Generator().manual_seed(1)).argsort(-1)[:, :k_max]
    weight_TK = random(len(counts), k_max, seed=2)
    beyond_TK = torch.arange(k_max)[None] >= counts_T[:, None]
    return expert_TK.masked_fill(beyond_TK, EXPERTS).int(), weight_TK.masked_fill(beyond_TK, torch.nan)


def rows_of(expert_TK: Tensor, dtype: torch.dtype) -> Tensor:
    """What the experts gave; rows of pairs that did not run hold what memory held."""
    pair_RD = random(expert_TK.numel(), WIDTH, seed=3).to(dtype)
    pair_RD[expert_TK.flatten() == EXPERTS] = torch.nan
    return pair_RD


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("counts", "k_max"), [([1, 6, 3, 2, 0], 6), ([1], 1), ([2, 1, 2], 2)])
@pytest.mark.parametrize("shared", [False, True])
def test_mixed_counts(dtype: torch.dtype, counts: list[int], k_max: int, shared: bool) -> None:
    expert_TK, weight_TK = routed(counts, k_max)
    pair_RD, x_TD = rows_of(expert_TK, dtype), random(len(counts), WIDTH, seed=5)
    shared_TD = random(len(counts), WIDTH, seed=6).to(dtype) if shared else None
    gate_T1 = random(len(counts), 1, seed=8) if shared and dtype == torch.float16 else None
    wanted_TD = reference.combine(pair_RD, expert_TK, weight_TK, EXPERTS)
    if shared_TD is not None:
        wanted_TD += shared_TD if gate_T1 is None else shared_TD * gate_T1.sigmoid()
    wanted_TD = x_TD + 0.5 * wanted_TD
    norm, out_TD = Norm(1 + random(WIDTH, seed=7), 1e-6), torch.full((len(counts), WIDTH), torch.nan)
    combine(pair_RD, expert_TK, weight_TK, EXPERTS, x_TD, norm, out_TD, shared_TD, gate_T1, scale=0.5)
    torch.testing.assert_close(x_TD.double(), wanted_TD.double(), atol=1e-5, rtol=1e-5)
    again_TD = torch.full_like(out_TD, torch.nan)
    residual_norm(x_TD, norm, again_TD)
    assert torch.equal(out_TD, again_TD)


def test_experts_are_added_in_their_order_and_not_by_rank() -> None:
    """1e8 + 1 - 1e8 is 0 in float32, 1e8 - 1e8 + 1 is 1."""
    expert_TK = torch.tensor([[4, 0, 2], [2, 0, 4]], dtype=torch.int32)
    pair_RD = torch.tensor([[1.0], [1e8], [-1e8], [-1e8], [1e8], [1.0]])
    x_TD = torch.zeros(2, 1)
    combine(pair_RD, expert_TK, torch.ones(2, 3), EXPERTS, x_TD)
    assert x_TD.tolist() == [[1.0], [1.0]]


def test_a_tokens_bits_depend_on_no_other() -> None:
    expert_TK, weight_TK = routed([3, 1, 6, 2], 6)
    pair_RD, x_TD = rows_of(expert_TK, torch.float32), random(4, WIDTH, seed=5)
    together_TD = x_TD.clone()
    combine(pair_RD, expert_TK, weight_TK, EXPERTS, together_TD)
    for token, count in enumerate([3, 1, 6, 2]):
        pairs = slice(token * 6, token * 6 + count)
        alone_1D = x_TD[token, None].clone()
        combine(pair_RD[pairs], expert_TK[token, None, :count], weight_TK[token, None, :count], EXPERTS, alone_1D)
        assert torch.equal(alone_1D[0], together_TD[token])
