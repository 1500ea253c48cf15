"""The norm of each head's output times the silu of its gate, between a gated delta net's state and its output.

A program has one head of one token. Axes in kernels: V elements of a head, padded to a power of two.
"""

import triton
import triton.language as tl
from torch import Tensor

from model.backends.cuda.kernels.norm import Norm, normed
from model.shapes.attention import GatedDeltaNet


@triton.jit
def _gated_norm(values, projected, weight, out, heads, shared, key_width, width, eps, V: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    place = tl.arange(0, V)
    real = place < width
    at = (token * heads + head) * width + place
    value = tl.load(values + at, mask=real, other=0.0)
    value = normed(value, weight, weight, place, real, width, eps, 0.0, False, False)
    # A row of the projection has queries, keys, values and gates by key head.
    shared_width = shared * width
    group_width = 2 * (key_width + shared_width)
    row = projected + token * (heads // shared) * group_width
    gate_at = row + head // shared * group_width + 2 * key_width + shared_width + head % shared * width
    gate = tl.load(gate_at + place, mask=real, other=0.0).to(tl.float32)
    tl.store(out + at, (value * gate * tl.sigmoid(gate)).to(out.dtype.element_ty), mask=real)


def gated_norm(value_THV: Tensor, projected_TX: Tensor, norm: Norm, shape: GatedDeltaNet, out_THV: Tensor) -> None:
    """Write norm(value) · silu(gate); the gates lie in the projection."""
    _gated_norm[(len(value_THV), shape.value_heads)](
        value_THV,
        projected_TX,
        norm.weight_D,
        out_THV,
        shape.value_heads,
        shape.value_heads // shape.key_heads,
        shape.key_width,
        shape.value_width,
        norm.eps,
        V=triton.next_power_of_2(shape.value_width),
        num_warps=1,
        enable_fp_fusion=False,
    )
