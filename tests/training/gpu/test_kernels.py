"""The torch functions of the training kernels against plain sums, and Triton's kernels against the torch functions."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from training.gpu.kernels import Layout, check_blocks, check_length, gate, gated, masks

COUNTS = [1, 5, 2, 5, 3]
LENGTH, BLOCKS = 4, 24


def layout(counts: list[int] = COUNTS) -> Layout:
    return Layout.of(counts, LENGTH, torch.device("cpu"))


def scores(of: Layout, seed: int = 1) -> Tensor:
    """The same scores for a draw of a token whatever the other rows' counts are."""
    whole_KTB = torch.randn(8, 5 * LENGTH, BLOCKS, generator=torch.Generator().manual_seed(seed))
    return torch.cat([whole_KTB[k, :count] for k, count in enumerate(of.tokens_K)]).requires_grad_()


def test_draw_k_is_a_prefix_of_the_rows() -> None:
    of = layout()
    assert of.counts == (5, 5, 3, 2, 1)
    assert of.tokens_K == (20, 16, 12, 8, 8)
    assert of.offset_K.tolist() == [0, 20, 36, 48, 56]
    assert of.counts_T1[:, 0].tolist() == [count for count in of.counts for _ in range(LENGTH)]


@pytest.mark.parametrize("kept", [1, 4])
def test_draws_without_replacement_keep_distinct_blocks(kept: int) -> None:
    of = layout()
    sum_TB, square_T1 = masks(scores(of), of, kept, replacement=False)
    assert torch.equal((sum_TB != 0).sum(1), (of.counts_T1[:, 0] * kept).long())
    torch.testing.assert_close(square_T1[:, 0], sum_TB.square().sum(1))  # no block is in two draws


def test_draws_with_replacement_keep_the_best_of_each() -> None:
    of = layout()
    score_RB = scores(of)
    sum_TB, square_T1 = masks(score_RB, of, 3, replacement=True)
    offsets = of.offset_K.tolist()
    best_RB = score_RB.detach() * F.one_hot(score_RB.topk(3).indices, BLOCKS).sum(1)
    rows = [
        [offset + token for offset, n in zip(offsets, of.tokens_K, strict=True) if token < n] for token in range(20)
    ]
    torch.testing.assert_close(sum_TB, torch.stack([best_RB[row].sum(0) for row in rows]))
    torch.testing.assert_close(square_T1[:, 0], torch.stack([best_RB[row].square().sum() for row in rows]))


@pytest.mark.parametrize("replacement", [False, True])
def test_masks_are_nested(replacement: bool) -> None:
    """A token's first two draws are the same, whether it has two or five; no row sees another row's count."""
    of, fewer = layout(), layout([2] * 5)
    five = masks(scores(of), of, 3, replacement)[0]
    two = masks(scores(fewer), fewer, 3, replacement)[0]
    assert torch.equal(two[3 * LENGTH : 4 * LENGTH], five[3 * LENGTH : 4 * LENGTH])  # the row of two draws in both
    assert (((two != 0) & (five == 0)).sum(1)[: 3 * LENGTH] == 0).all()
    assert ((five != 0).sum(1) > (two != 0).sum(1))[: 3 * LENGTH].all()


@pytest.mark.parametrize("replacement", [False, True])
def test_only_kept_scores_have_a_gradient(replacement: bool) -> None:
    of = layout()
    score_RB = scores(of)
    sum_TB, square_T1 = masks(score_RB, of, 3, replacement)
    kept_RB = torch.autograd.grad(sum_TB.sum(), score_RB, retain_graph=True)[0]
    assert set(kept_RB.unique().tolist()) == {0.0, 1.0}
    assert (kept_RB.sum(1) == 3).all()
    torch.testing.assert_close(torch.autograd.grad(square_T1.sum(), score_RB)[0], 2 * score_RB.detach() * kept_RB)
    rebuilt_TB = torch.zeros(20, BLOCKS)
    for offset, count in zip(of.offset_K.tolist(), of.tokens_K, strict=True):
        rebuilt_TB[:count] += (score_RB.detach() * kept_RB)[offset : offset + count]
    torch.testing.assert_close(rebuilt_TB, sum_TB)


def weigh(h_TF: Tensor, mask_TB: Tensor) -> Tensor:
    return h_TF * mask_TB.repeat_interleave(h_TF.shape[1] // mask_TB.shape[1], dim=1)


def test_a_block_is_weighed_after_its_activation() -> None:
    generator = torch.Generator().manual_seed(1)
    h_TF = torch.randn(6, 32, generator=generator, dtype=torch.float64, requires_grad=True)
    mask_TB = torch.randn(6, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(gate(h_TF, mask_TB), weigh(F.gelu(h_TF), mask_TB))
    torch.testing.assert_close(gated(h_TF, mask_TB), weigh(F.silu(h_TF[:, :16]) * h_TF[:, 16:], mask_TB))
    assert torch.autograd.gradcheck(gate, (h_TF, mask_TB)) and torch.autograd.gradcheck(gated, (h_TF, mask_TB))


def test_sizes_that_the_kernels_cannot_take_are_named() -> None:
    check_blocks(16, 96, 64)
    check_length(512)
    with pytest.raises(ValueError, match="units of a block must be a power of two, got 24"):
        check_blocks(16, 96, 24)
    with pytest.raises(ValueError, match="number of blocks must be a multiple of 8, got 12"):
        check_blocks(16, 12, 32)
    with pytest.raises(ValueError, match="tokens of a step must be a multiple of 4, got 18"):
        check_blocks(18, 96, 32)
    with pytest.raises(ValueError, match="length of a window must be a multiple of 16, got 40"):
        check_length(40)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_the_kernels_compute_what_the_torch_functions_do() -> None:
    """In Triton's interpreter, which must be chosen before triton is imported."""
    command = [sys.executable, "-m", "tests.training.gpu.compare_triton"]
    subprocess.run(command, check=True, env=os.environ | {"TRITON_INTERPRET": "1"}, timeout=120)
