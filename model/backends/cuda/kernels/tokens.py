"""Masks over logits and the choice of tokens: the best one of each row, or one that is drawn.

A row is cut into chunks of `CHUNK` tokens, which programs of their own read side by side; one program of the row then
looks at what they found. Maxima and sums of integers (see `model/sampling.py`) do not depend on their order. Cuts are
found by bisection over the order of the values and not by sorting, in one program for each row; of equal values the
lower id comes first. Axes in kernels: C tokens of a chunk, S chunks of a row, padded to a power of two.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.sampling import Masks

CHUNK = 4096
_WARPS = 8
_WORD = tl.constexpr(32)
_INFINITY = tl.constexpr(float("inf"))


@triton.jit
def _allowed(words, mask_of, row, place, real, words_per_mask):
    """Whether a row's mask allows each token; true without a mask."""
    mask = tl.load(mask_of + row)
    has_mask = mask >= 0
    at = tl.maximum(mask, 0) * words_per_mask + place // _WORD
    word = tl.load(words + at, mask=real & has_mask, other=-1)
    return ((word >> (place % _WORD)) & 1) != 0


@triton.jit
def _something_left(values, words, mask_of, left, width, words_per_mask, C: tl.constexpr):
    """Whether the mask leaves something finite in a chunk."""
    row, chunk, chunks = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    place = chunk * C + tl.arange(0, C)
    real = place < width
    value = tl.load(values + row * width + place, mask=real, other=_INFINITY)
    kept = (tl.abs(value) < _INFINITY) & _allowed(words, mask_of, row, place, real, words_per_mask)
    tl.store(left + row * chunks + chunk, tl.max(kept.to(tl.int32), axis=0))


@triton.jit
def _mask(
    values,
    raw,
    words,
    mask_of,
    left,
    out,
    width,
    words_per_mask,
    falls_back: tl.constexpr,
    C: tl.constexpr,
    S: tl.constexpr,
):
    row, chunk, chunks = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    place = chunk * C + tl.arange(0, C)
    real = place < width
    value = tl.load(values + row * width + place, mask=real, other=0.0).to(tl.float32)
    if falls_back:
        other = tl.arange(0, S)
        some = tl.max(tl.load(left + row * chunks + other, mask=other < chunks, other=0), axis=0)
        instead = (some == 0) & (tl.load(mask_of + row) >= 0)
        original = tl.load(raw + row * width + place, mask=real & instead, other=0.0).to(tl.float32)
        value = tl.where(instead, original, value)
    kept = _allowed(words, mask_of, row, place, real, words_per_mask)
    tl.store(out + row * width + place, tl.where(kept, value, -_INFINITY), mask=real)


def masked(values_RV: Tensor, masks: Masks, raw_RV: Tensor | None = None) -> Tensor:
    """A float32 copy of the logits with minus infinity for what masks forbid. With `raw_RV`, a row where they leave
    nothing finite is taken from there first."""
    rows, width = values_RV.shape
    chunks = triton.cdiv(width, CHUNK)
    out_RV = values_RV.new_empty(rows, width, dtype=torch.float32)
    left_RS = masks.words_MW.new_empty(rows, chunks)
    of_masks = masks.words_MW, masks.mask_of_R
    sizes = width, masks.words_MW.shape[1]
    grid = (rows, chunks)
    if raw_RV is not None:
        _something_left[grid](values_RV, *of_masks, left_RS, *sizes, C=CHUNK, num_warps=_WARPS)
    _mask[grid](
        values_RV,
        values_RV if raw_RV is None else raw_RV,
        *of_masks,
        left_RS,
        out_RV,
        *sizes,
        falls_back=raw_RV is not None,
        C=CHUNK,
        S=triton.next_power_of_2(chunks),
        num_warps=_WARPS,
    )
    return out_RV


@triton.jit
def _chunk_best(values, raw, peaks, ids, finite, width, changed: tl.constexpr, C: tl.constexpr):
    """The largest value of a chunk, the lowest id that has it, and whether the model's logits are finite."""
    row, chunk, chunks = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    place = chunk * C + tl.arange(0, C)
    real = place < width
    value = tl.load(values + row * width + place, mask=real, other=-_INFINITY).to(tl.float32)
    original = value
    if changed:
        original = tl.load(raw + row * width + place, mask=real, other=0.0).to(tl.float32)
    is_finite = (tl.abs(original) < _INFINITY) | (place >= width)
    peak = tl.max(value, axis=0)
    at = row * chunks + chunk
    tl.store(peaks + at, peak)
    tl.store(ids + at, tl.min(tl.where((value == peak) & real, place, width - 1), axis=0))
    tl.store(finite + at, tl.min(is_finite.to(tl.int32), axis=0))


@triton.jit
def _row_best(peaks, ids, finite, tokens, best, row_finite, chunks, S: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.arange(0, S)
    real = chunk < chunks
    peak_S = tl.load(peaks + row * chunks + chunk, mask=real, other=-_INFINITY)
    id_S = tl.load(ids + row * chunks + chunk, mask=real, other=2147483647)
    is_finite = tl.min(tl.load(finite + row * chunks + chunk, mask=real, other=1), axis=0)
    peak = tl.max(peak_S, axis=0)
    token = tl.min(tl.where(peak_S == peak, id_S, 2147483647), axis=0)
    tl.store(tokens + row, tl.where(is_finite != 0, token, 0).to(tl.int64))
    tl.store(best + row, tl.where(is_finite != 0, peak, _INFINITY))
    tl.store(row_finite + row, is_finite)


def best(values_RV: Tensor, raw_RV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The best token of each row, its value, and whether all of the model's logits `raw_RV` are finite (int32). Where
    they are not, the token is 0 and the value infinite. The values may be the same tensor, or float32."""
    rows, width = values_RV.shape
    chunks = triton.cdiv(width, CHUNK)
    id_RS, finite_RS = (values_RV.new_empty(rows, chunks, dtype=torch.int32) for _ in range(2))
    peak_RS = values_RV.new_empty(rows, chunks, dtype=torch.float32)
    token_R = values_RV.new_empty(rows, dtype=torch.int64)
    best_R, finite_R = peak_RS.new_empty(rows), id_RS.new_empty(rows)
    changed = values_RV is not raw_RV
    _chunk_best[(rows, chunks)](
        values_RV, raw_RV, peak_RS, id_RS, finite_RS, width, changed=changed, C=CHUNK, num_warps=_WARPS
    )
    _row_best[(rows,)](
        peak_RS, id_RS, finite_RS, token_R, best_R, finite_R, chunks, S=triton.next_power_of_2(chunks), num_warps=1
    )
    return token_R, best_R, finite_R
