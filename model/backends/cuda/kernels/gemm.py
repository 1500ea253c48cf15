"""The one matrix product: dense layers, and experts over routed pairs, with bias and activation in the epilogue.

Weights are the wide side of a tile (64 or 128 outputs), rows the narrow one (16 to 128), so that one token and
thousands use the same instruction. The inner dimension is cut into segments, chosen from the weight's shape and never
from the batch. Each segment is one chain of float32 sums; segments are added in order, by one program that runs them in
turn, or, where rows are few, by `_merge` after programs that ran them side by side. So a row's output does not depend
on the other rows, on the row tile, or on where a segment ran. Padding rows of a tile are never written.

Weights of 8 bits are widened in registers to the type of the rows, which holds their values exactly. Their scales
multiply the float32 sums, before bias and activation.

Axes in kernels: U units and R rows of a tile, B inner elements of one step.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.backends.cuda.kernels.activation import activate, activate_gated
from model.backends.cuda.kernels.operands import PROGRAMS, TILES, PairTiles, Tile, Weight
from model.backends.cuda.kernels.weights import weights

MERGED = 1024  # sums that one program of `_merge` holds


@triton.jit
def _rows_of(tile_expert, tile_pair, count, rows_as: tl.constexpr, R: tl.constexpr):
    """The expert of a program's tile, and its rows of the result; a row that is `count` is empty."""
    tile = tl.program_id(0)
    lane = tl.arange(0, R)
    if rows_as == "dense":
        expert = 0
        row = tile * R + lane
    elif rows_as == "single":
        expert = tl.load(tile_expert + tile)
        row = tl.where(lane == 0, tile, count)
    else:
        expert = tl.load(tile_expert + tile)
        row = tl.load(tile_pair + tile * R + lane)
    return expert, row


@triton.jit
def _chain(
    x,
    x_real,
    gate,
    up,
    w_real,
    first,
    end,
    inner,
    packed: tl.constexpr,
    gated: tl.constexpr,
    U: tl.constexpr,
    R: tl.constexpr,
    B: tl.constexpr,
):
    """One segment's sums [U, R] of the rows at `x` with the weights at `gate` and, if gated, at `up`."""
    sums = tl.zeros([U, R], tl.float32)
    up_sums = tl.zeros([U, R], tl.float32)
    for start in range(first, end, B):
        at = start + tl.arange(0, B)
        x_tile = tl.load(x[:, None] + at[None, :], mask=x_real[:, None] & (at < inner)[None, :], other=0.0)
        gate_tile = weights(gate, w_real, start, inner, packed, x_tile.dtype, B)
        columns = tl.trans(x_tile.to(gate_tile.dtype))
        sums = tl.dot(gate_tile, columns, sums, input_precision="ieee")
        if gated:
            up_tile = weights(up, w_real, start, inner, packed, x_tile.dtype, B)
            up_sums = tl.dot(up_tile, columns, up_sums, input_precision="ieee")
    return sums, up_sums


@triton.jit
def _finish(
    sums,
    up_sums,
    scale,
    bias,
    unit,
    real,
    up_row,
    step,
    packed: tl.constexpr,
    has_bias: tl.constexpr,
    gated: tl.constexpr,
    act: tl.constexpr,
):
    """Scale, bias and activation, on float32. `unit` and `real` have the axes of the sums."""
    if packed != "none":
        sums *= tl.load(scale + unit * step, mask=real, other=0.0)
        if gated:
            up_sums *= tl.load(scale + unit * step + up_row, mask=real, other=0.0)
    if has_bias:
        sums += tl.load(bias + unit * step, mask=real, other=0.0).to(tl.float32)
        if gated:
            up_sums += tl.load(bias + unit * step + up_row, mask=real, other=0.0).to(tl.float32)
    return activate_gated(sums, up_sums, act) if gated else activate(sums, act)


@triton.jit
def _gemm(
    x,
    weight,
    scale,
    bias,
    out,
    parts,
    tile_expert,
    tile_pair,
    count,
    k_max,
    experts,
    inner,
    units,
    outputs,
    up_row,
    step,
    length,
    segments,
    rows_as: tl.constexpr,
    split: tl.constexpr,
    packed: tl.constexpr,
    has_bias: tl.constexpr,
    gated: tl.constexpr,
    act: tl.constexpr,
    U: tl.constexpr,
    R: tl.constexpr,
    B: tl.constexpr,
):
    expert, row = _rows_of(tile_expert, tile_pair, count, rows_as, R)
    if expert >= experts:
        return
    row_real = row < count
    unit = tl.program_id(1) * U + tl.arange(0, U)
    unit_real = unit < units
    row = row.to(tl.int64)
    x_row = x + (row // k_max) * inner
    first_output = tl.cast(expert, tl.int64) * outputs
    stride = inner if packed == "none" else inner // 4
    gate = weight + (first_output + unit * step) * stride
    up = gate + tl.cast(up_row, tl.int64) * stride
    real = row_real[:, None] & unit_real[None, :]
    if split:
        segment = tl.program_id(2)
        first = segment * length
        end = tl.minimum(first + length, inner)
        sums, up_sums = _chain(x_row, row_real, gate, up, unit_real, first, end, inner, packed, gated, U, R, B)
        at = ((segment * count + row) * outputs)[:, None] + unit[None, :]
        tl.store(parts + at, tl.trans(sums), mask=real)
        if gated:
            tl.store(parts + at + units, tl.trans(up_sums), mask=real)
    else:
        sums = tl.zeros([U, R], tl.float32)
        up_sums = tl.zeros([U, R], tl.float32)
        for segment in range(segments):
            first = segment * length
            end = tl.minimum(first + length, inner)
            part, up_part = _chain(x_row, row_real, gate, up, unit_real, first, end, inner, packed, gated, U, R, B)
            sums += part
            up_sums += up_part
        side = (scale + first_output, bias + first_output, unit[:, None], unit_real[:, None], up_row, step)
        done = _finish(sums, up_sums, *side, packed, has_bias, gated, act)
        at = (row * units)[:, None] + unit[None, :]
        tl.store(out + at, tl.trans(done).to(out.dtype.element_ty), mask=real)


@triton.jit
def _merge(
    parts,
    scale,
    bias,
    out,
    tile_expert,
    tile_pair,
    count,
    experts,
    units,
    outputs,
    up_row,
    step,
    segments,
    rows_as: tl.constexpr,
    packed: tl.constexpr,
    has_bias: tl.constexpr,
    gated: tl.constexpr,
    act: tl.constexpr,
    U: tl.constexpr,
    R: tl.constexpr,
):
    expert, row = _rows_of(tile_expert, tile_pair, count, rows_as, R)
    if expert >= experts:
        return
    unit = tl.program_id(1) * U + tl.arange(0, U)
    unit_real = (unit < units)[None, :]
    real = (row < count)[:, None] & unit_real
    row = row.to(tl.int64)
    sums = tl.zeros([R, U], tl.float32)
    up_sums = tl.zeros([R, U], tl.float32)
    for segment in range(segments):
        at = ((segment * count + row) * outputs)[:, None] + unit[None, :]
        sums += tl.load(parts + at, mask=real, other=0.0)
        if gated:
            up_sums += tl.load(parts + at + units, mask=real, other=0.0)
    first_output = tl.cast(expert, tl.int64) * outputs
    side = (scale + first_output, bias + first_output, unit[None, :], unit_real, up_row, step)
    done = _finish(sums, up_sums, *side, packed, has_bias, gated, act)
    at = (row * units)[:, None] + unit[None, :]
    tl.store(out + at, done.to(out.dtype.element_ty), mask=real)


def gemm(
    x_TD: Tensor,
    weight: Weight,
    out_RU: Tensor,
    pairs: PairTiles | None = None,
    k_max: int = 1,
    tile: Tile = TILES[16],
    side_by_side: bool | None = None,
) -> None:
    """Write activation(x · weightᵀ + bias) for every row, or for every pair of `pairs` with its expert's weights.

    Pair p reads row p // k_max of `x_TD` and writes row p of `out_RU`. `side_by_side` is for tests: whether segments
    run at once, which otherwise follows from the number of programs.
    """
    experts, outputs, inner = weight.values_EOD.shape
    units, segments = weight.units, weight.segments
    count = len(x_TD) if pairs is None else pairs.pairs
    tiles = triton.cdiv(count, tile.rows) if pairs is None else len(pairs.expert_N)
    grid = (tiles, triton.cdiv(units, tile.units))
    split = segments > 1 and (grid[0] * grid[1] < PROGRAMS if side_by_side is None else side_by_side)
    length = triton.cdiv(inner, segments * tile.inner) * tile.inner
    up_row, step = (1, 2) if weight.interleaved else (units, 1)
    parts = out_RU if not split else out_RU.new_empty(segments, count, outputs, dtype=torch.float32)
    scale_EO = out_RU if weight.scale_EO is None else weight.scale_EO
    bias_EO = out_RU if weight.bias_EO is None else weight.bias_EO
    expert_N = out_RU if pairs is None else pairs.expert_N
    pair_NR = expert_N if pairs is None or pairs.pair_NR is None else pairs.pair_NR
    modes = {
        "rows_as": "dense" if pairs is None else "single" if pairs.pair_NR is None else "tiles",
        "packed": weight.packed,
        "has_bias": weight.bias_EO is not None,
        "gated": weight.gated,
        "act": weight.activation,
        "R": tile.rows,
        "num_warps": tile.warps,
        "enable_fp_fusion": False,  # the two ways to add segments must not be fused differently
    }
    _gemm[(*grid, segments if split else 1)](
        x_TD,
        weight.stored,
        scale_EO,
        bias_EO,
        out_RU,
        parts,
        expert_N,
        pair_NR,
        count,
        k_max,
        experts,
        inner,
        units,
        outputs,
        up_row,
        step,
        length,
        segments,
        split=split,
        U=tile.units,
        B=tile.inner,
        num_stages=tile.stages,
        **modes,
    )
    if split:
        width = MERGED // tile.rows
        places = (expert_N, pair_NR, count, experts, units, outputs, up_row, step, segments)
        _merge[(tiles, triton.cdiv(units, width))](parts, scale_EO, bias_EO, out_RU, *places, U=width, **modes)
