"""Adds what a token's experts gave, in the order of the experts, to the residual, and norms it for the next layer.

Pairs beyond a token's count were never computed: their rows hold whatever was in memory. They are left out by
selection, never multiplied by 0, because 0 times what is not a number is none. The order is by expert and not by rank,
and a program holds one token, so that the sum is the same in any batch. Axes in kernels: K ranks and D elements, padded
to powers of two.
"""

import triton
import triton.language as tl
from torch import Tensor

from model.backends.cuda.kernels.norm import Norm, normed, warps_for
from model.backends.cuda.kernels.repair import Repair, repaired


@triton.jit
def _combine(
    pair_rows,
    expert_of,
    weight_of,
    shared,
    shared_gate,
    residual,
    norm_weight,
    norm_bias,
    out,
    wanted,
    counts,
    scales,
    shifts,
    k_max,
    experts,
    width,
    eps,
    offset,
    scale,
    weighs: tl.constexpr,
    has_shared: tl.constexpr,
    has_gate: tl.constexpr,
    repairs: tl.constexpr,
    has_norm: tl.constexpr,
    layer: tl.constexpr,
    has_bias: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, D)
    real = place < width
    rank = tl.arange(0, K)
    chosen = tl.load(expert_of + token * k_max + rank, mask=rank < k_max, other=experts)
    if weighs:
        weights = tl.load(weight_of + token * k_max + rank, mask=rank < k_max, other=0.0)
    else:
        weights = tl.full([K], 1.0, tl.float32)
    total = tl.zeros([D], tl.float32)
    before = -1
    for _ in range(k_max):
        expert = tl.min(tl.where(chosen > before, chosen, experts), axis=0)
        runs = expert < experts
        mine = tl.min(tl.where(chosen == expert, rank, K), axis=0)
        weight = tl.sum(tl.where(rank == mine, weights, 0.0), axis=0)
        at = (token * k_max + mine) * width + place
        row = tl.load(pair_rows + at, mask=real & runs, other=0.0).to(tl.float32)
        total = tl.where(runs, total + weight * row, total)
        before = expert
    at = token * width + place
    if has_shared:
        always = tl.load(shared + at, mask=real, other=0.0).to(tl.float32)
        if has_gate:
            always = always * tl.sigmoid(tl.load(shared_gate + token).to(tl.float32))
        total += always
    if repairs:
        total = repaired(total, wanted, counts, scales, shifts, token, place, real, width)
    row = tl.load(residual + at, mask=real, other=0.0).to(tl.float32) + scale * total
    stored = row.to(residual.dtype.element_ty)
    tl.store(residual + at, stored, mask=real)
    if has_norm:
        row = stored.to(tl.float32)
        done = normed(row, norm_weight, norm_bias, place, real, width, eps, offset, layer, has_bias)
        tl.store(out + at, done.to(out.dtype.element_ty), mask=real)


def combine(
    pair_RD: Tensor,
    expert_TK: Tensor,
    weight_TK: Tensor | None,
    experts: int,
    x_TD: Tensor,
    norm: Norm | None = None,
    out_TD: Tensor | None = None,
    shared_TD: Tensor | None = None,
    shared_gate_T1: Tensor | None = None,
    scale: float = 1.0,
    repair: Repair | None = None,
) -> None:
    """Add scale · (Σ weight · pair + shared) to the residual `x_TD`, in place, and write its norm to `out_TD`.

    Row p of `pair_RD` is rank p % K of token p // K; ranks whose expert is the number of experts are left out. Without
    `weight_TK` all weights are 1. With `shared_gate_T1` the shared part is multiplied by the sigmoid of its token's
    logit. `repair` comes before `scale`.
    """
    (tokens, k_max), width = expert_TK.shape, x_TD.shape[1]
    weight_D = x_TD if norm is None else norm.weight_D
    _combine[(tokens,)](
        pair_RD,
        expert_TK,
        x_TD if weight_TK is None else weight_TK,
        x_TD if shared_TD is None else shared_TD,
        x_TD if shared_gate_T1 is None else shared_gate_T1,
        x_TD,
        weight_D,
        weight_D if norm is None or norm.bias_D is None else norm.bias_D,
        x_TD if out_TD is None else out_TD,
        *((x_TD,) * 4 if repair is None else repair.arguments()),
        k_max,
        experts,
        width,
        0.0 if norm is None else norm.eps,
        0.0 if norm is None else norm.offset,
        scale,
        weighs=weight_TK is not None,
        repairs=repair is not None,
        has_shared=shared_TD is not None,
        has_gate=shared_gate_T1 is not None,
        has_norm=norm is not None,
        **({"layer": False, "has_bias": False} if norm is None else norm.modes),
        K=triton.next_power_of_2(k_max),
        D=triton.next_power_of_2(width),
        num_warps=warps_for(width),
        enable_fp_fusion=False,
    )
