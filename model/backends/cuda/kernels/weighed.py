"""Rows of routed pairs, multiplied by the weights of their experts before the experts read them (Llama 4).

A program writes one pair, rounded as the experts' inputs are; pairs that do not run are not written. Axes in kernels: D
elements of a row, padded to a power of two.
"""

import triton
import triton.language as tl
from torch import Tensor

from model.backends.cuda.kernels.norm import warps_for


@triton.jit
def _weighed(x, expert_of, weight_of, out, k_max, experts, width, D: tl.constexpr):
    pair = tl.program_id(0)
    if tl.load(expert_of + pair) >= experts:
        return
    place = tl.arange(0, D)
    real = place < width
    row = tl.load(x + (pair // k_max).to(tl.int64) * width + place, mask=real, other=0.0).to(tl.float32)
    row = row * tl.load(weight_of + pair)
    tl.store(out + pair.to(tl.int64) * width + place, row.to(out.dtype.element_ty), mask=real)


def weighed(x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor, experts: int, out_RD: Tensor) -> None:
    """Write weight · x to row t · K + k of `out_RD` for rank k of token t, where its expert is not `experts`."""
    k_max, width = expert_TK.shape[1], x_TD.shape[1]
    _weighed[(expert_TK.numel(),)](
        x_TD,
        expert_TK,
        weight_TK,
        out_RD,
        k_max,
        experts,
        width,
        D=triton.next_power_of_2(width),
        num_warps=warps_for(width),
        enable_fp_fusion=False,
    )
