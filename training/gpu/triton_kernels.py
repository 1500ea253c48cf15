"""Triton kernels for training on a GPU, with gradients; `training.gpu.kernels` says what they compute and checks sizes.

`attend` is the decode step of the teacher in `training.gpu.stories`. The module needs triton, which comes with torch
for CUDA; TRITON_INTERPRET=1 runs it on a CPU, as its test does.

Axes: T (or t) tokens of one program, B blocks padded to a power of two, N blocks of one program, G units of a block.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from training.gpu.kernels import BLOCKS_OF_GATE, TOKENS_OF_GATE, TOKENS_OF_MASKS, Layout


@triton.jit
def _pick(score, taken, kept: tl.constexpr, replace: tl.constexpr, T: tl.constexpr, B: tl.constexpr):
    """1 where one draw keeps a block: `kept` times the best of what is open, of equals the first."""
    cols = tl.arange(0, B)[None, :]
    keep = tl.zeros([T, B], tl.int32)
    if not replace:
        score = tl.where(taken != 0, float("-inf"), score)
    for _ in tl.static_range(kept):
        best = tl.max(score, axis=1)[:, None]
        places = tl.where(score == best, cols, B)
        first = tl.min(places, axis=1)[:, None]
        pick = cols == first
        keep = tl.where(pick, 1, keep)
        score = tl.where(pick, float("-inf"), score)
    return keep


@triton.jit
def _masks_forward(
    scores,
    offsets,
    counts,
    totals,
    squares,
    length,
    blocks,
    kept: tl.constexpr,
    replace: tl.constexpr,
    T: tl.constexpr,
    B: tl.constexpr,
):
    first = tl.program_id(0) * T
    rows = first + tl.arange(0, T)
    cols = tl.arange(0, B)
    real = (cols < blocks)[None, :] & (rows >= 0)[:, None]
    count = tl.load(counts + first // length)  # all tokens of a program lie in one batch row
    total = tl.zeros([T, B], tl.float32)
    square = tl.zeros([T], tl.float32)
    taken = tl.zeros([T, B], tl.int32)
    for k in range(count):
        row_at = (tl.load(offsets + k) + rows)[:, None] * blocks
        at = row_at + cols[None, :]
        score = tl.load(scores + at, mask=real, other=float("-inf"))
        keep = _pick(score, taken, kept, replace, T, B)
        chosen = tl.where(keep != 0, score, 0.0)
        total += chosen
        square += tl.sum(chosen * chosen, axis=1)
        taken = taken | keep
    total_at = rows[:, None] * blocks + cols[None, :]
    tl.store(totals + total_at, total, mask=real)
    tl.store(squares + rows, square)


@triton.jit
def _masks_backward(
    scores,
    offsets,
    counts,
    d_totals,
    d_squares,
    d_scores,
    length,
    blocks,
    kept: tl.constexpr,
    replace: tl.constexpr,
    T: tl.constexpr,
    B: tl.constexpr,
):
    first = tl.program_id(0) * T
    rows = first + tl.arange(0, T)
    cols = tl.arange(0, B)
    real = (cols < blocks)[None, :] & (rows >= 0)[:, None]
    count = tl.load(counts + first // length)
    total_at = rows[:, None] * blocks + cols[None, :]
    d_total = tl.load(d_totals + total_at, mask=real, other=0.0)
    d_square = tl.load(d_squares + rows)[:, None]
    taken = tl.zeros([T, B], tl.int32)
    for k in range(count):
        row_at = (tl.load(offsets + k) + rows)[:, None] * blocks
        at = row_at + cols[None, :]
        score = tl.load(scores + at, mask=real, other=float("-inf"))
        keep = _pick(score, taken, kept, replace, T, B)
        d_score = d_total + 2 * score * d_square
        tl.store(d_scores + at, tl.where(keep != 0, d_score, 0.0), mask=real)
        taken = taken | keep


class Masks(torch.autograd.Function):
    """`training.gpu.kernels.masks`."""

    @staticmethod
    def forward(ctx: Any, score_RB: Tensor, layout: Layout, kept: int, replacement: bool) -> tuple[Tensor, Tensor]:
        score_RB = score_RB.contiguous()
        tokens, blocks = layout.tokens_K[0], score_RB.shape[1]
        sum_TB = score_RB.new_empty(tokens, blocks)
        square_T1 = score_RB.new_empty(tokens, 1)
        padded = triton.next_power_of_2(blocks)
        ctx.sizes = {"kept": kept, "replace": replacement, "T": TOKENS_OF_MASKS, "B": padded}
        ctx.length, ctx.grid = layout.length, (tokens // TOKENS_OF_MASKS,)
        ctx.save_for_backward(score_RB, layout.offset_K, layout.counts_N)
        given = (score_RB, layout.offset_K, layout.counts_N)
        _masks_forward[ctx.grid](*given, sum_TB, square_T1, layout.length, blocks, **ctx.sizes)
        return sum_TB, square_T1

    @staticmethod
    def backward(ctx: Any, d_sum_TB: Tensor, d_square_T1: Tensor) -> tuple[Tensor | None, ...]:
        score_RB, offset_K, counts_N = ctx.saved_tensors
        d_score_RB = torch.empty_like(score_RB)
        given = (score_RB, offset_K, counts_N, d_sum_TB.contiguous(), d_square_T1.contiguous())
        blocks = score_RB.shape[1]
        _masks_backward[ctx.grid](*given, d_score_RB, ctx.length, blocks, **ctx.sizes)
        return d_score_RB, None, None, None


@triton.jit
def _places(blocks, stride, T: tl.constexpr, N: tl.constexpr, G: tl.constexpr):
    """Where a program's weights [T, N] and units [T, N, G] lie, in tensors with `blocks` and `stride` values a row."""
    rows = tl.program_id(0).to(tl.int64) * T + tl.arange(0, T)
    block = tl.program_id(1) * N + tl.arange(0, N)
    unit = tl.arange(0, G)[None, None, :]
    units = block[None, :, None] * G + unit
    weight_at = rows[:, None] * blocks + block[None, :]
    return weight_at, rows[:, None, None] * stride + units


@triton.jit
def _gate_forward(hidden, masks, out, blocks, T: tl.constexpr, N: tl.constexpr, G: tl.constexpr):
    weight_at, at = _places(blocks, blocks * G, T, N, G)
    x = tl.load(hidden + at).to(tl.float32)
    weight = tl.load(masks + weight_at)[:, :, None]
    gelu = x * 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
    tl.store(out + at, (gelu * weight).to(out.dtype.element_ty))


@triton.jit
def _gate_backward(hidden, masks, d_out, d_hidden, d_masks, blocks, T: tl.constexpr, N: tl.constexpr, G: tl.constexpr):
    weight_at, at = _places(blocks, blocks * G, T, N, G)
    x = tl.load(hidden + at).to(tl.float32)
    d = tl.load(d_out + at).to(tl.float32)
    weight = tl.load(masks + weight_at)[:, :, None]
    cdf = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
    pdf = 0.3989422804014327 * tl.exp(-0.5 * x * x)
    d_x = d * weight * (cdf + x * pdf)
    tl.store(d_hidden + at, d_x.to(d_hidden.dtype.element_ty))
    tl.store(d_masks + weight_at, tl.sum(d * x * cdf, axis=2))


@triton.jit
def _gated_forward(hidden, masks, out, blocks, T: tl.constexpr, N: tl.constexpr, G: tl.constexpr):
    weight_at, at = _places(blocks, 2 * blocks * G, T, N, G)
    gate = tl.load(hidden + at).to(tl.float32)
    up = tl.load(hidden + at + blocks * G).to(tl.float32)
    weight = tl.load(masks + weight_at)[:, :, None]
    _, out_at = _places(blocks, blocks * G, T, N, G)
    mixed = gate * tl.sigmoid(gate) * up * weight
    tl.store(out + out_at, mixed.to(out.dtype.element_ty))


@triton.jit
def _gated_backward(hidden, masks, d_out, d_hidden, d_masks, blocks, T: tl.constexpr, N: tl.constexpr, G: tl.constexpr):
    weight_at, at = _places(blocks, 2 * blocks * G, T, N, G)
    gate = tl.load(hidden + at).to(tl.float32)
    up = tl.load(hidden + at + blocks * G).to(tl.float32)
    _, out_at = _places(blocks, blocks * G, T, N, G)
    d = tl.load(d_out + out_at).to(tl.float32)
    weight = tl.load(masks + weight_at)[:, :, None]
    share = tl.sigmoid(gate)
    dm = d * weight
    slope = 1 + gate * (1 - share)
    d_gate = dm * up * share * slope
    d_up = dm * gate * share
    d_weight = d * gate * share * up
    tl.store(d_hidden + at, d_gate.to(d_hidden.dtype.element_ty))
    tl.store(d_hidden + at + blocks * G, d_up.to(d_hidden.dtype.element_ty))
    tl.store(d_masks + weight_at, tl.sum(d_weight, axis=2))


class Gate(torch.autograd.Function):
    """`training.gpu.kernels.gate`, or with `gated` its `gated`."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, mask_TB: Tensor, gated: bool) -> Tensor:
        h, mask_TB = h.contiguous(), mask_TB.float().contiguous()
        tokens, blocks = mask_TB.shape
        units = h.shape[1] // (2 if gated else 1)
        out_TF = h.new_empty(tokens, units)
        ctx.sizes = {"T": TOKENS_OF_GATE, "N": BLOCKS_OF_GATE, "G": units // blocks}
        ctx.grid, ctx.gated = (tokens // TOKENS_OF_GATE, blocks // BLOCKS_OF_GATE), gated
        ctx.save_for_backward(h, mask_TB)
        kernel = _gated_forward if gated else _gate_forward
        kernel[ctx.grid](h, mask_TB, out_TF, blocks, **ctx.sizes)
        return out_TF

    @staticmethod
    def backward(ctx: Any, d_out_TF: Tensor) -> tuple[Tensor | None, ...]:
        h, mask_TB = ctx.saved_tensors
        d_h, d_mask_TB = torch.empty_like(h), torch.empty_like(mask_TB)
        kernel = _gated_backward if ctx.gated else _gate_backward
        given = (h, mask_TB, d_out_TF.contiguous())
        kernel[ctx.grid](*given, d_h, d_mask_TB, mask_TB.shape[1], **ctx.sizes)
        return d_h, d_mask_TB, None


@triton.jit
def _decode(
    queries,
    keys,
    values,
    out,
    last,
    scale,
    window: tl.constexpr,
    width: tl.constexpr,
    padded: tl.constexpr,
    tile: tl.constexpr,
):
    head = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, padded)
    real = cols < width
    query_at = head * width + cols
    query = tl.load(queries + query_at, mask=real, other=0.0).to(tl.float32) * scale
    largest = float("-inf")
    total = 0.0
    mixed = tl.zeros([padded], tl.float32)
    for start in range(0, window, tile):
        slots = start + tl.arange(0, tile)
        slot_at = head * window * width + slots[:, None] * width
        at = slot_at + cols[None, :]
        key = tl.load(keys + at, mask=real[None, :], other=0.0)
        product = tl.sum(key.to(tl.float32) * query[None, :], axis=1)
        score = tl.where(slots <= last, product, float("-inf"))
        new = tl.maximum(largest, tl.max(score, axis=0))
        weight = tl.exp(score - new)
        fade = tl.exp(largest - new)
        value = tl.load(values + at, mask=real[None, :], other=0.0)
        weighted = weight[:, None] * value.to(tl.float32)
        mixed = mixed * fade + tl.sum(weighted, axis=0)
        total = total * fade + tl.sum(weight, axis=0)
        largest = new
    mean = mixed / total
    tl.store(out + query_at, mean.to(out.dtype.element_ty), mask=real)


def attend(q_BHC: Tensor, k_BHWC: Tensor, v_BHWC: Tensor, last: int) -> Tensor:
    """One query per row and head over the slots 0..last; [B, H, C]. The window is a multiple of 64, C at most 64."""
    rows, heads, width = q_BHC.shape
    out_BHC = torch.empty_like(q_BHC)
    scale = width**-0.5
    sizes = {"window": k_BHWC.shape[2], "width": width, "padded": 64, "tile": 64}
    grid = (rows * heads,)
    _decode[grid](q_BHC, k_BHWC, v_BHWC, out_BHC, last, scale, **sizes, num_warps=4)
    return out_BHC
