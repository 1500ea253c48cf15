"""Compares each Triton kernel and its gradient with the torch function of the same values, in Triton's interpreter.

Run as `TRITON_INTERPRET=1 python -m tests.training.gpu.compare_triton`; it fails with the first difference.
"""

import torch
from torch import Tensor

import tests.triton_interpreter  # noqa: F401 - before the first kernel
from training.gpu.kernels import Layout, gate_torch, gated_torch, masks_torch
from training.gpu.stories import attend as attend_torch
from training.gpu.triton_kernels import Gate, Masks, attend


def same(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)


def compare_masks(blocks: int, kept: int, replacement: bool) -> None:
    layout = Layout.of([1, 4, 2, 4], 16, torch.device("cpu"))
    score_RB = torch.randn(sum(layout.tokens_K), blocks, requires_grad=True)
    expected = masks_torch(score_RB, layout, kept, replacement)
    found = Masks.apply(score_RB, layout, kept, replacement)
    given = tuple(torch.randn_like(value) for value in expected)
    same(found, expected)
    same(torch.autograd.grad(found, score_RB, given), torch.autograd.grad(expected, score_RB, given))


def compare_gate(gated: bool) -> None:
    h = torch.randn(8, 16 * 8 * (1 + gated), requires_grad=True)
    mask_TB = torch.randn(8, 16, requires_grad=True)
    expected = (gated_torch if gated else gate_torch)(h, mask_TB)
    found = Gate.apply(h, mask_TB, gated)
    given = torch.randn_like(expected)
    same((found,), (expected,))
    same(torch.autograd.grad(found, (h, mask_TB), given), torch.autograd.grad(expected, (h, mask_TB), given))


def compare_attend(last: int) -> None:
    q_BHC, k_BHWC, v_BHWC = torch.randn(2, 3, 48), torch.randn(2, 3, 192, 48), torch.randn(2, 3, 192, 48)
    same((attend(q_BHC, k_BHWC, v_BHWC, last),), (attend_torch(q_BHC, k_BHWC, v_BHWC, last),))


def main() -> None:
    torch.manual_seed(1)
    for replacement in (False, True):
        compare_masks(24, 3, replacement)  # padded to 32
        compare_masks(32, 1, replacement)
    for gated in (False, True):
        compare_gate(gated)
    for last in (0, 100, 191):
        compare_attend(last)


if __name__ == "__main__":
    main()
