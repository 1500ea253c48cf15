"""The layout of routed pairs against a list of lists: mixed counts, empty experts, several steps, every bound."""

import pytest
import torch
from torch import Tensor

from model.backends.cuda.kernels import align as kernels
from model.backends.cuda.kernels import reference
from model.backends.cuda.kernels.align import align, empty_tiles, tile_bound
from model.backends.cuda.kernels.operands import PairTiles

EXPERTS = 6
UNTOUCHED = -77


def routed(tokens: int, k_max: int, seed: int = 0) -> Tensor:
    """Counts from 0 to k_max in turn; expert 3 is chosen by no token."""
    order_TE = torch.rand(tokens, EXPERTS, generator=torch.Generator().manual_seed(seed)).argsort(-1)
    order_TE[order_TE == 3] = EXPERTS
    expert_TK = order_TE[:, :k_max].clone()
    counts_T = torch.arange(tokens) % (k_max + 1)
    expert_TK[torch.arange(k_max)[None] >= counts_T[:, None]] = EXPERTS
    return expert_TK.int()


def run(expert_TK: Tensor, rows: int) -> tuple[PairTiles, Tensor]:
    tiles = empty_tiles(expert_TK.numel(), EXPERTS, rows, expert_TK)
    tiles.expert_N.fill_(UNTOUCHED)
    tiles.pair_NR.fill_(UNTOUCHED)
    loads_E = torch.full((EXPERTS,), UNTOUCHED, dtype=torch.int32)
    align(expert_TK, tiles, loads_E)
    return tiles, loads_E


def same_as_the_reference(expert_TK: Tensor, rows: int) -> None:
    tiles, loads_E = run(expert_TK, rows)
    chosen = reference.pairs_of(expert_TK, EXPERTS)
    made = reference.tiles_of(chosen, rows)
    bound = tile_bound(expert_TK.numel(), EXPERTS, rows)
    expert_N, pair_NR = reference.laid_out(made, bound, rows, EXPERTS, expert_TK.numel())
    assert loads_E.tolist() == [len(pairs) for pairs in chosen]
    assert torch.equal(tiles.expert_N, expert_N)
    assert torch.equal(tiles.pair_NR[: len(made)], pair_NR[: len(made)])
    assert (tiles.pair_NR[len(made) :] == UNTOUCHED).all()


@pytest.mark.parametrize(("tokens", "k_max", "rows"), [(1, 1, 16), (1, 6, 16), (21, 3, 16), (70, 6, 32), (40, 1, 128)])
def test_mixed_counts(tokens: int, k_max: int, rows: int) -> None:
    same_as_the_reference(routed(tokens, k_max), rows)


def test_pairs_are_read_in_several_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "STEP", 32)
    same_as_the_reference(routed(50, 4), 16)


def test_no_pair_at_all() -> None:
    tiles, loads_E = run(torch.full((3, 2), EXPERTS, dtype=torch.int32), 16)
    assert (loads_E == 0).all() and (tiles.expert_N == EXPERTS).all()


def test_all_tokens_at_one_expert() -> None:
    same_as_the_reference(torch.full((33, 1), 5, dtype=torch.int32), 16)


def test_no_loads_need_more_tiles_than_the_bound() -> None:
    for rows in (1, 3, 16):
        for pairs in range(1, 60):
            spread = [pairs - min(pairs, EXPERTS) + 1] + [1] * (min(pairs, EXPERTS) - 1)
            assert sum(-(-load // rows) for load in spread) <= tile_bound(pairs, EXPERTS, rows)
    assert tile_bound(12, EXPERTS, 16) == 6  # one each
    assert tile_bound(2, EXPERTS, 16) == 2


def test_too_few_tiles_are_an_error() -> None:
    tiles = PairTiles(torch.zeros(1, dtype=torch.int32), torch.zeros(1, 16, dtype=torch.int32), 21)
    with pytest.raises(ValueError, match="1 tiles of 16 rows may be too few for 21 pairs of 6 experts"):
        align(routed(7, 3), tiles, torch.zeros(EXPERTS, dtype=torch.int32))
