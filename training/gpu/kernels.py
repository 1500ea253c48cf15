"""What a mixture does per token on the training network: choose the kept blocks, and weigh the units of each block.

`masks` sums the kept scores of every token's draws, `gate` and `gated` apply an activation and one weight per block.
Each is a plain torch function here, which runs on any device; tensors on a GPU take the kernel of the same values in
`training.gpu.triton_kernels`. Rows are tokens. It does not depend on models or optimisers.

Axes: T tokens, R rows of (draw, token) in the order of draws, B blocks (or experts), F units, K draws, N batch rows.
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional as F

TOKENS_OF_MASKS = 16  # of one program of the mask kernels; a window's length is a multiple of it
TOKENS_OF_GATE = 4  # of one program of the gate kernels
BLOCKS_OF_GATE = 8


@dataclass(frozen=True, slots=True)
class Layout:
    """How many draws each batch row has. The counts fall, so that the tokens with a draw k are a prefix of all.

    Counts 3, 1 with windows of 10 tokens: `tokens_K` is 20, 10, 10 and `offset_K` is 0, 20, 30.
    """

    counts: tuple[int, ...]
    length: int
    tokens_K: tuple[int, ...]  # how many tokens have a draw k
    offset_K: Tensor  # int64: where the rows of draw k begin among all R
    counts_N: Tensor  # int32, per batch row
    counts_T1: Tensor  # float32, per token

    @classmethod
    def of(cls, counts: list[int], length: int, device: torch.device) -> Self:
        """The layout of batch rows of `length` tokens with these counts, in falling order."""
        falling = tuple(sorted(counts, reverse=True))
        rows = [sum(count > k for count in falling) for k in range(falling[0])]
        tokens = tuple(number * length for number in rows)
        offsets = [sum(tokens[:k]) for k in range(len(tokens))]
        counts_N = torch.tensor(falling, dtype=torch.int32, device=device)
        counts_T1 = counts_N.repeat_interleave(length)[:, None].float()
        return cls(falling, length, tokens, torch.tensor(offsets, device=device), counts_N, counts_T1)


def masks(score_RB: Tensor, layout: Layout, kept: int, replacement: bool) -> tuple[Tensor, Tensor]:
    """Sum of the kept scores over each token's draws [T, B], and the sum of their squares [T, 1]."""
    if not score_RB.is_cuda:
        return masks_torch(score_RB, layout, kept, replacement)
    from training.gpu.triton_kernels import Masks

    check_length(layout.length)
    result: tuple[Tensor, Tensor] = Masks.apply(score_RB, layout, kept, replacement)
    return result


def gate(h_TF: Tensor, mask_TB: Tensor) -> Tensor:
    """gelu(h) times its block's weight."""
    return _gate_cuda(h_TF, mask_TB, False) if h_TF.is_cuda else gate_torch(h_TF, mask_TB)


def gated(h_T2F: Tensor, mask_TB: Tensor) -> Tensor:
    """silu(gate) · up times its expert's weight; `h` holds all gates, then all ups."""
    return _gate_cuda(h_T2F, mask_TB, True) if h_T2F.is_cuda else gated_torch(h_T2F, mask_TB)


def _gate_cuda(h: Tensor, mask_TB: Tensor, gated: bool) -> Tensor:
    from training.gpu.triton_kernels import Gate

    tokens, blocks = mask_TB.shape
    check_blocks(tokens, blocks, h.shape[1] // (2 if gated else 1) // blocks)
    return Gate.apply(h, mask_TB, gated)


def check_length(length: int) -> None:
    """ValueError where the mask kernels cannot take windows of this length."""
    if length % TOKENS_OF_MASKS:
        raise ValueError(f"on a GPU the length of a window must be a multiple of {TOKENS_OF_MASKS}, got {length}")


def check_blocks(tokens: int, blocks: int, width: int) -> None:
    """ValueError where the gate kernels cannot take this many tokens, blocks, or units of one block."""
    if tokens % TOKENS_OF_GATE:
        raise ValueError(f"on a GPU the tokens of a step must be a multiple of {TOKENS_OF_GATE}, got {tokens}")
    if blocks % BLOCKS_OF_GATE:
        raise ValueError(f"on a GPU the number of blocks must be a multiple of {BLOCKS_OF_GATE}, got {blocks}")
    if width < 1 or width & (width - 1):
        raise ValueError(f"on a GPU the units of a block must be a power of two, got {width}")


def masks_torch(score_RB: Tensor, layout: Layout, kept: int, replacement: bool) -> tuple[Tensor, Tensor]:
    """As `masks`, in torch."""
    tokens, blocks = layout.tokens_K[0], score_RB.shape[1]
    sum_TB = score_RB.new_zeros(tokens, blocks)
    square_T1 = score_RB.new_zeros(tokens, 1)
    taken_TB = torch.zeros(tokens, blocks, dtype=torch.bool, device=score_RB.device)
    for score_tB in score_RB.split(list(layout.tokens_K)):
        count = len(score_tB)
        keep_tB = kept_draw(score_tB.detach(), taken_TB[:count], kept, replacement)
        taken_TB = torch.cat([taken_TB[:count] | keep_tB, taken_TB[count:]])
        chosen_tB = score_tB * keep_tB
        square_t1 = chosen_tB.square().sum(-1, keepdim=True)
        rest = (0, 0, 0, tokens - count)
        sum_TB = sum_TB + F.pad(chosen_tB, rest)
        square_T1 = square_T1 + F.pad(square_t1, rest)
    return sum_TB, square_T1


def kept_draw(score_TB: Tensor, taken_TB: Tensor, kept: int, replacement: bool) -> Tensor:
    """Which blocks one draw keeps: its `kept` best, without `replacement` among those that no earlier draw kept."""
    open_TB = score_TB if replacement else score_TB.masked_fill(taken_TB, -torch.inf)
    best_Tn = open_TB.topk(kept, dim=-1).indices
    return torch.zeros_like(taken_TB).scatter(-1, best_Tn, True)


def gate_torch(h_TF: Tensor, mask_TB: Tensor) -> Tensor:
    """As `gate`, in torch."""
    return _weigh(F.gelu(h_TF), mask_TB)


def gated_torch(h_T2F: Tensor, mask_TB: Tensor) -> Tensor:
    """As `gated`, in torch."""
    gate_TF, up_TF = h_T2F.chunk(2, dim=-1)
    return _weigh(F.silu(gate_TF) * up_TF, mask_TB)


def _weigh(h_TF: Tensor, mask_TB: Tensor) -> Tensor:
    h_TBg = h_TF.unflatten(-1, (mask_TB.shape[1], -1))
    return (h_TBg * mask_TB[..., None].to(h_TBg.dtype)).flatten(1)
