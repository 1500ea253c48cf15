"""A small matrix for every head: queries into the space of the latents, and latents into the space of the values.

A program has one head, a tile of its outputs (the wide side) and a tile of rows. Its sums are one chain over the inner
dimension, which is that of a head or of a latent, so that a row's bits do not depend on the other rows. Weights may lie
either way in memory. Axes in kernels: U outputs and R rows of a tile, B inner elements of one step.
"""

import triton
import triton.language as tl
from torch import Tensor

from model.backends.cuda.kernels.operands import Tile


@triton.jit
def _per_head(
    x,
    weight,
    out,
    rows,
    outputs,
    inner,
    x_token,
    x_head,
    weight_head,
    weight_output,
    weight_inner,
    out_token,
    out_head,
    U: tl.constexpr,
    R: tl.constexpr,
    B: tl.constexpr,
):
    row = tl.program_id(0) * R + tl.arange(0, R)
    output = tl.program_id(1) * U + tl.arange(0, U)
    head = tl.program_id(2).to(tl.int64)
    row_real, output_real = row < rows, output < outputs
    row = row.to(tl.int64)
    x_row = x + head * x_head + row * x_token
    weight_row = weight + head * weight_head + output.to(tl.int64) * weight_output
    sums = tl.zeros([U, R], tl.float32)
    for start in range(0, inner, B):
        at = start + tl.arange(0, B)
        real = (at < inner)[None, :]
        x_tile = tl.load(x_row[:, None] + at[None, :], mask=row_real[:, None] & real, other=0.0)
        weight_at = weight_row[:, None] + at[None, :] * weight_inner
        weight_tile = tl.load(weight_at, mask=output_real[:, None] & real, other=0.0)
        sums = tl.dot(weight_tile, tl.trans(x_tile.to(weight_tile.dtype)), sums, input_precision="ieee")
    out_at = out + head * out_head + row[:, None] * out_token + output[None, :]
    tl.store(out_at, tl.trans(sums).to(out.dtype.element_ty), mask=row_real[:, None] & output_real[None, :])


def per_head(x_THI: Tensor, weight_HOI: Tensor, out_THO: Tensor, tile: Tile) -> None:
    """Write x · weightᵀ of each head. All three may be views; elements of `x_THI` and of `out_THO` are neighbours."""
    (heads, outputs, inner), rows = weight_HOI.shape, len(x_THI)
    assert x_THI.stride(2) == out_THO.stride(2) == 1
    _per_head[(triton.cdiv(rows, tile.rows), triton.cdiv(outputs, tile.units), heads)](
        x_THI,
        weight_HOI,
        out_THO,
        rows,
        outputs,
        inner,
        *x_THI.stride()[:2],
        *weight_HOI.stride(),
        *out_THO.stride()[:2],
        U=tile.units,
        R=tile.rows,
        B=tile.inner,
        num_warps=tile.warps,
        num_stages=tile.stages,
        enable_fp_fusion=False,
    )
