"""Tokens drawn from logits: from the vocabulary in its order, or from the best on where top-k, top-p or min-p cut.

A row is read in chunks, as in `tokens.py`, and sums are of integers (see `model/sampling.py`), which do not depend on
their order. Where a row is cut, programs side by side first copy together what the cuts may keep, its candidates. One
program of the row then draws: from the candidates as `cut_search.py` does, or from the whole row. Axes in kernels: C
tokens of a chunk, S chunks of a row, padded to a power of two, L levels, N candidates that are looked at together.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.backends.cuda.kernels import tokens
from model.backends.cuda.kernels.cut_search import drawn_from_best
from model.backends.cuda.kernels.draw_masses import DEEPEST, cuts_of, mass_of, settings_of, share_of, target_of
from model.sampling import Draws

SCAN = 1024  # candidates that are looked at together
LEVELS = 16  # of values, from the best one down, among which the candidates of a cut end
GROUP = 1 << 23  # logits drawn from at a time, so that copies stay below about 100 MB
_WARPS = 8
_INFINITY = tl.constexpr(float("inf"))


@triton.jit
def _level(peak, temperature, level, L: tl.constexpr):
    """The least value of a level; all tokens with mass reach the last one."""
    return peak - temperature * ((level + 1) * (DEEPEST / L))


@triton.jit
def _chunk_levels(values, best, temperatures, counts, masses, width, L: tl.constexpr, C: tl.constexpr):
    """How many tokens of a chunk reach each level, and their mass, [L, R, S]."""
    row, chunk, chunks = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    temperature, peak, draws = settings_of(temperatures, best, row)
    if draws == 0:
        return
    place = chunk * C + tl.arange(0, C)
    value = tl.load(values + row * width + place, mask=place < width, other=-_INFINITY).to(tl.float32)
    mass = mass_of(value, peak, temperature)
    for level in tl.static_range(L):
        reaches = (value >= _level(peak, temperature, level, L)) & (place < width)
        at = (level * tl.num_programs(0) + row) * chunks + chunk
        tl.store(counts + at, tl.sum(reaches.to(tl.int32), axis=0))
        tl.store(masses + at, tl.sum(tl.where(reaches, mass, 0), axis=0))


@triton.jit
def _candidates(
    values,
    best,
    temperatures,
    top_ks,
    top_ps,
    min_ps,
    counts,
    masses,
    found,
    kept,
    ids,
    width,
    L: tl.constexpr,
    C: tl.constexpr,
    S: tl.constexpr,
):
    """Copy the tokens of a chunk that reach a level, in the order of their ids. All that the cuts may keep reach it."""
    row, chunk, chunks = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    temperature, peak, draws = settings_of(temperatures, best, row)
    top_k, top_p, min_p, cuts = cuts_of(top_ks, top_ps, min_ps, row, width)
    if (draws == 0) | (cuts == 0):
        return
    level, other = tl.arange(0, L), tl.arange(0, S)
    at = (level[:, None] * tl.num_programs(0) + row) * chunks + other[None, :]
    count_LS = tl.load(counts + at, mask=other[None, :] < chunks, other=0)
    mass_LS = tl.load(masses + at, mask=other[None, :] < chunks, other=0)
    count_L, mass_L = tl.sum(count_LS, axis=1), tl.sum(mass_LS, axis=1)
    share = share_of(top_p, tl.max(mass_L, axis=0))
    is_light = tl.exp((_level(peak, temperature, level, L) - peak) / temperature) < min_p * 0.999
    is_deep = (count_L >= top_k) | (level == L - 1)
    if (top_p >= 1.0) | (top_k >= width):
        is_deep = is_deep | is_light | (mass_L >= share)
    chosen = tl.min(tl.where(is_deep, level, L - 1), axis=0)
    place = chunk * C + tl.arange(0, C)
    value = tl.load(values + row * width + place, mask=place < width, other=-_INFINITY)
    reaches = (value.to(tl.float32) >= _level(peak, temperature, chosen, L)) & (place < width)
    is_before = (level[:, None] == chosen) & (other[None, :] < chunk)
    before = tl.sum(tl.sum(tl.where(is_before, count_LS, 0), axis=1), axis=0)
    to = row * width + before + tl.cumsum(reaches.to(tl.int32), axis=0) - 1
    tl.store(kept + to, value, mask=reaches)
    tl.store(ids + to, place, mask=reaches)
    if chunk == 0:
        tl.store(found + row, tl.sum(tl.where(level == chosen, count_L, 0), axis=0))


@triton.jit
def _draw(
    values,
    best,
    masses,
    temperatures,
    top_ks,
    top_ps,
    min_ps,
    us,
    found,
    kept,
    ids,
    tokens,
    width,
    chunks,
    cuts: tl.constexpr,
    C: tl.constexpr,
    S: tl.constexpr,
    N: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    temperature, peak, draws = settings_of(temperatures, best, row)
    if draws == 0:
        return
    chunk = tl.arange(0, S)
    mass_S = tl.load(masses + row * chunks + chunk, mask=chunk < chunks, other=0)
    u = tl.load(us + row)
    if cuts:
        top_k, top_p, min_p, is_cut = cuts_of(top_ks, top_ps, min_ps, row, width)
        if is_cut:
            own, count, total = kept + row * width, tl.load(found + row), tl.sum(mass_S, axis=0)
            at = drawn_from_best(own, count, peak, temperature, top_k, top_p, min_p, total, u, N)
            token = tl.load(ids + row * width + at).to(tl.int64)
        else:
            token = _drawn_from_all(values + row * width, width, peak, temperature, mass_S, u, C)
    else:
        token = _drawn_from_all(values + row * width, width, peak, temperature, mass_S, u, C)
    tl.store(tokens + row, token)


@triton.jit
def _drawn_from_all(values, width, peak, temperature, mass_S, u, C: tl.constexpr):
    """A token drawn in vocabulary order: first the chunk, then the token in it."""
    cum_S = tl.cumsum(mass_S, axis=0)
    target = target_of(u, tl.sum(mass_S, axis=0))
    passed_S = cum_S <= target
    chunk = tl.sum(passed_S.to(tl.int64), axis=0)
    target -= tl.sum(tl.where(passed_S, mass_S, 0), axis=0)
    place = chunk * C + tl.arange(0, C)
    value = tl.load(values + place, mask=place < width, other=-_INFINITY).to(tl.float32)
    cum_C = tl.cumsum(mass_of(value, peak, temperature), axis=0)
    return chunk * C + tl.sum((cum_C <= target).to(tl.int64), axis=0)


def draw_tokens(values_RV: Tensor, best_R: Tensor, draws: Draws, token_R: Tensor) -> None:
    """Write the tokens of the rows that draw; a row whose best value is infinite does not."""
    size = max(1, GROUP // values_RV.shape[1])
    for first in range(0, len(values_RV), size):
        group = slice(first, first + size)
        _draw_group(values_RV[group], best_R[group], draws.rows(group), token_R[group])


def _draw_group(values_RV: Tensor, best_R: Tensor, draws: Draws, token_R: Tensor) -> None:
    rows, width = values_RV.shape
    chunks = triton.cdiv(width, tokens.CHUNK)
    levels = LEVELS if draws.cuts else 1
    count_LRS = token_R.new_empty(levels, rows, chunks, dtype=torch.int32)
    mass_LRS = token_R.new_empty(levels, rows, chunks)
    found_R = token_R.new_empty(rows, dtype=torch.int32)
    kept_RV, id_RV = values_RV, found_R
    options = {"C": tokens.CHUNK, "num_warps": _WARPS, "enable_fp_fusion": False}
    start = values_RV, best_R, draws.temperature_R
    cuts = draws.top_k_R, draws.top_p_R, draws.min_p_R
    _chunk_levels[(rows, chunks)](*start, count_LRS, mass_LRS, width, L=levels, **options)
    options["S"] = triton.next_power_of_2(chunks)
    if draws.cuts:
        kept_RV, id_RV = torch.empty_like(values_RV), found_R.new_empty(rows, width)
        copies = found_R, kept_RV, id_RV
        _candidates[(rows, chunks)](*start, *cuts, count_LRS, mass_LRS, *copies, width, L=levels, **options)
    _draw[(rows,)](
        values_RV,
        best_R,
        mass_LRS[-1],
        draws.temperature_R,
        *cuts,
        draws.u_R,
        found_R,
        kept_RV,
        id_RV,
        token_R,
        width,
        chunks,
        cuts=draws.cuts,
        N=SCAN,
        **options,
    )
