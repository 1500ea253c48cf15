"""The mean masks of an ∞-MoE: each draw keeps its best groups of units, and a token's masks are averaged.

A group is kept where its score reaches the draw's n-th largest, found by bits and not by sorting; equal scores share
their fate. A program does all draws of one token in order, so that the sums are the same in any batch. Axes in kernels:
E groups, padded to a power of two.
"""

import triton
import triton.language as tl
from torch import Tensor

from model.shapes.mixtures import Infinity


@triton.jit
def _ordered(score):
    """Unsigned integers in the order of the scores; the two zeros are one."""
    bits = (score + 0.0).to(tl.int32, bitcast=True)
    negative = bits < 0
    return tl.where(negative, ~bits, bits ^ -2147483648).to(tl.uint32, bitcast=True)


@triton.jit
def _least_kept(key, kept):
    """The `kept`-th largest key: the largest number that so many keys reach, found from the highest bit down."""
    least = tl.full([1], 0, tl.uint32)
    bit = tl.full([1], 2147483648, tl.uint32)
    for _ in range(32):
        candidate = least | bit
        reached = tl.sum((key >= candidate).to(tl.int32), axis=0)
        least = tl.where(reached >= kept, candidate, least)
        bit = bit >> 1
    return least


@triton.jit
def _keep(
    scores,
    counts,
    masks,
    groups,
    k_max,
    kept,
    replacement: tl.constexpr,
    restores: tl.constexpr,
    E: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    count = tl.load(counts + token).to(tl.int32)
    place = tl.arange(0, E)
    is_open = place < groups
    total = tl.zeros([E], tl.float32)
    square = 0.0
    for k in range(k_max):
        runs = k < count
        row = (token * k_max + k) * groups
        score = tl.load(scores + row + place, mask=(place < groups) & runs, other=0.0)
        key = tl.where(is_open, _ordered(score), tl.full([E], 0, tl.uint32))
        keeps = is_open & (key >= _least_kept(key, kept)) & runs
        chosen = tl.where(keeps, score, 0.0)
        total += chosen
        square += tl.sum(chosen * chosen, axis=0)
        if not replacement:
            is_open = is_open & (keeps == 0)
    mean = total / tl.maximum(count, 1)
    if restores:
        norm = tl.sqrt(tl.sum(mean * mean, axis=0) + 1e-6)
        mean = mean * (tl.sqrt(square / tl.maximum(count, 1) + 1e-12) / norm)
    tl.store(masks + token * groups + place, mean, mask=place < groups)


def keep(score_RE: Tensor, counts_T: Tensor, shape: Infinity, mask_TE: Tensor) -> None:
    """Write the mean mask of each token. Row t · K + k has the scores of its draw k, float32; rows beyond its count are
    not looked at."""
    tokens, groups = mask_TE.shape
    padded = triton.next_power_of_2(groups)
    _keep[(tokens,)](
        score_RE,
        counts_T,
        mask_TE,
        groups,
        len(score_RE) // tokens,
        shape.kept,
        replacement=shape.replacement,
        restores=shape.aggregate == "norm",
        E=padded,
        num_warps=max(1, min(8, padded // 256)),
        enable_fp_fusion=False,
    )
