"""The products of an ∞-MoE under its mean masks: units that no row of a tile keeps are neither computed nor read.

For each tile of rows, `kept_steps` lists the steps of 64 units in which a row keeps a group. The first product computes
these steps; the second is one chain over them, in rising order. A row that keeps nothing in a step of its neighbours
adds 0 there, so that its sums are the same in any batch. Units that are not kept are left out by selection: what was
never written is not read.

Axes in kernels: U units of a step, W outputs, R rows of a tile, B inner elements of one step.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.backends.cuda.kernels.activation import activate
from model.backends.cuda.kernels.operands import Tile

UNITS = 64  # of a step


@dataclass(frozen=True, slots=True)
class KeptSteps:
    """Of N tiles of rows, the steps in which any of their rows keeps a group, in rising order, and their number."""

    step_NS: Tensor  # int32
    count_N: Tensor  # int32


@triton.jit
def _weights(masks, row, tokens, unit, units, block, groups):
    """Mask of each row and unit [R, U]; 0 beyond both."""
    real = (row < tokens)[:, None] & (unit < units)[None, :]
    at = row.to(tl.int64)[:, None] * groups + (unit // block)[None, :]
    return tl.load(masks + at, mask=real, other=0.0)


@triton.jit
def _kept_steps(
    masks, steps, counts, tokens, units, block, groups, bound, R: tl.constexpr, U: tl.constexpr
):  # fmt: skip
    tile = tl.program_id(0)
    row = tile * R + tl.arange(0, R)
    found = 0
    for step in range(bound):
        unit = step * U + tl.arange(0, U)
        kept = (_weights(masks, row, tokens, unit, units, block, groups) != 0).to(tl.int32)
        is_kept = tl.max(tl.max(kept, axis=1), axis=0)
        tl.store(steps + tile * bound + found, step, mask=is_kept > 0)
        found += is_kept
    tl.store(counts + tile, found)


@triton.jit
def _up(
    x,
    weight,
    masks,
    out,
    steps,
    counts,
    tokens,
    inner,
    units,
    block,
    groups,
    bound,
    act: tl.constexpr,
    R: tl.constexpr,
    U: tl.constexpr,
    B: tl.constexpr,
):
    tile = tl.program_id(0)
    number = tl.program_id(1)
    if number >= tl.load(counts + tile):
        return
    row = tile * R + tl.arange(0, R)
    unit = tl.load(steps + tile * bound + number) * U + tl.arange(0, U)
    row_real, unit_real = row < tokens, unit < units
    x_at = x + row.to(tl.int64)[:, None] * inner
    weight_at = weight + unit.to(tl.int64)[:, None] * inner
    sums = tl.zeros([U, R], tl.float32)
    for start in range(0, inner, B):
        at = start + tl.arange(0, B)
        real = (at < inner)[None, :]
        x_tile = tl.load(x_at + at[None, :], mask=row_real[:, None] & real, other=0.0)
        weight_tile = tl.load(weight_at + at[None, :], mask=unit_real[:, None] & real, other=0.0)
        sums = tl.dot(weight_tile, tl.trans(x_tile.to(weight_tile.dtype)), sums, input_precision="ieee")
    kept = _weights(masks, row, tokens, unit, units, block, groups)
    hidden = activate(tl.trans(sums), act) * kept
    hidden_at = row.to(tl.int64)[:, None] * units + unit[None, :]
    tl.store(out + hidden_at, hidden.to(out.dtype.element_ty), mask=kept != 0)


@triton.jit
def _down(
    hidden,
    weight,
    masks,
    out,
    steps,
    counts,
    tokens,
    width,
    units,
    block,
    groups,
    bound,
    R: tl.constexpr,
    W: tl.constexpr,
    U: tl.constexpr,
):
    tile = tl.program_id(0)
    row = tile * R + tl.arange(0, R)
    output = tl.program_id(1) * W + tl.arange(0, W)
    output_real = output < width
    hidden_at = hidden + row.to(tl.int64)[:, None] * units
    weight_at = weight + output.to(tl.int64)[:, None] * units
    sums = tl.zeros([W, R], tl.float32)
    for number in range(tl.load(counts + tile)):
        unit = tl.load(steps + tile * bound + number) * U + tl.arange(0, U)
        kept = _weights(masks, row, tokens, unit, units, block, groups) != 0
        hidden_tile = tl.load(hidden_at + unit[None, :], mask=kept, other=0.0)
        weight_real = output_real[:, None] & (unit < units)[None, :]
        weight_tile = tl.load(weight_at + unit[None, :], mask=weight_real, other=0.0)
        sums = tl.dot(weight_tile, tl.trans(hidden_tile), sums, input_precision="ieee")
    real = (row < tokens)[:, None] & output_real[None, :]
    at = row.to(tl.int64)[:, None] * width + output[None, :]
    tl.store(out + at, tl.trans(sums).to(out.dtype.element_ty), mask=real)


def kept_steps(mask_TE: Tensor, units: int, rows: int) -> KeptSteps:
    """The steps of every tile of so many rows."""
    tokens, groups = mask_TE.shape
    tiles, bound = triton.cdiv(tokens, rows), triton.cdiv(units, UNITS)
    steps = KeptSteps(
        mask_TE.new_empty(tiles, bound, dtype=torch.int32), mask_TE.new_empty(tiles, dtype=torch.int32)
    )  # fmt: skip
    sizes = (tokens, units, units // groups, groups, bound)
    _kept_steps[(tiles,)](mask_TE, steps.step_NS, steps.count_N, *sizes, R=rows, U=UNITS, enable_fp_fusion=False)
    return steps


def masked_up(
    x_TD: Tensor, up_FD: Tensor, mask_TE: Tensor, steps: KeptSteps, activation: str, tile: Tile, h_TF: Tensor
) -> None:
    """Write activation(x · upᵀ) times the mask where it is not 0; other units are not written."""
    (units, inner), (tokens, groups) = up_FD.shape, mask_TE.shape
    sizes = (tokens, inner, units, units // groups, groups, steps.step_NS.shape[1])
    _up[steps.step_NS.shape](
        x_TD, up_FD, mask_TE, h_TF, steps.step_NS, steps.count_N, *sizes,
        act=activation, R=tile.rows, U=UNITS, B=tile.inner, num_warps=tile.warps, num_stages=tile.stages,
        enable_fp_fusion=False,
    )  # fmt: skip


def masked_down(h_TF: Tensor, down_DF: Tensor, mask_TE: Tensor, steps: KeptSteps, tile: Tile, y_TD: Tensor) -> None:
    """Write h · downᵀ, summed over the units whose mask is not 0."""
    (width, units), (tokens, groups) = down_DF.shape, mask_TE.shape
    sizes = (tokens, width, units, units // groups, groups, steps.step_NS.shape[1])
    _down[(len(steps.count_N), triton.cdiv(width, tile.units))](
        h_TF, down_DF, mask_TE, y_TD, steps.step_NS, steps.count_N, *sizes,
        R=tile.rows, W=tile.units, U=UNITS, num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=False,
    )  # fmt: skip
