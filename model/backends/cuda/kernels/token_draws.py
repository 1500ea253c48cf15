"""Tokens drawn from logits: from the vocabulary in its order, or from the best on where top-k, top-p or min-p cut.

A row is read in chunks, as in `tokens.py`, and sums are of integers (see `model/sampling.py`), which do not depend on
their order. Where a row is cut, programs side by side first copy together what the cuts may keep. One program of the
row then finds where it ends, by bisection over the order of the values and not by sorting; of equal values the lower id
comes first. Axes in kernels: C tokens of a chunk, S chunks of a row, padded to a power of two, L levels, N candidates
that are looked at together.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.backends.cuda.kernels import tokens
from model.sampling import UNIT_BITS, Draws

SCAN = 1024  # candidates that are looked at together
LEVELS = 16  # of values, from the best one down, among which the candidates of a cut end
GROUP = 1 << 23  # logits drawn from at a time, so that copies stay below about 100 MB
_WARPS = 8
_DEEPEST = tl.constexpr(28.0)  # exp(-28) is below one unit of mass
_UNIT = tl.constexpr(float(1 << UNIT_BITS))
_NO_LIMIT = tl.constexpr(1 << 62)
_LOW_BITS = tl.constexpr(0x7FFFFFFF)
_INFINITY = tl.constexpr(float("inf"))


@triton.jit
def _mass(value, peak, temperature):
    """`fixed_point` weights relative to the best value."""
    return (tl.exp((value - peak) / temperature) * _UNIT).to(tl.int64)


@triton.jit
def _settings(temperatures, best, row):
    """A row's temperature, its best value, and whether it draws."""
    temperature = tl.load(temperatures + row).to(tl.float32)
    peak = tl.load(best + row)
    return temperature, peak, (temperature > 0) & (tl.abs(peak) < _INFINITY)


@triton.jit
def _target(u, end):
    """The integer in [0, end) that a random number in [0, 1) stands for."""
    return tl.minimum((u * end.to(tl.float64)).to(tl.int64), end - 1)


@triton.jit
def _cuts(top_ks, top_ps, min_ps, row, width):
    """A row's top-k, top-p and min-p, and whether one of them may cut."""
    top_k = tl.load(top_ks + row).to(tl.int64)
    top_p, min_p = tl.load(top_ps + row), tl.load(min_ps + row).to(tl.float32)
    return top_k, top_p, min_p, (top_k < width) | (top_p < 1.0) | (min_p > 0.0)


@triton.jit
def _share(top_p, total):
    """The mass before which a token is kept."""
    return tl.where(top_p < 1.0, tl.ceil(top_p * total.to(tl.float64)).to(tl.int64), _NO_LIMIT)


@triton.jit
def _level(peak, temperature, level, L: tl.constexpr):
    """The least value of a level; all tokens with mass reach the last one."""
    return peak - temperature * ((level + 1) * (_DEEPEST / L))


@triton.jit
def _chunk_levels(values, best, temperatures, counts, masses, width, L: tl.constexpr, C: tl.constexpr):
    """How many tokens of a chunk reach each level, and their mass, [L, R, S]."""
    row, chunk, chunks = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    temperature, peak, draws = _settings(temperatures, best, row)
    if draws == 0:
        return
    place = chunk * C + tl.arange(0, C)
    value = tl.load(values + row * width + place, mask=place < width, other=-_INFINITY).to(tl.float32)
    mass = _mass(value, peak, temperature)
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
    temperature, peak, draws = _settings(temperatures, best, row)
    top_k, top_p, min_p, cuts = _cuts(top_ks, top_ps, min_ps, row, width)
    if (draws == 0) | (cuts == 0):
        return
    level, other = tl.arange(0, L), tl.arange(0, S)
    at = (level[:, None] * tl.num_programs(0) + row) * chunks + other[None, :]
    count_LS = tl.load(counts + at, mask=other[None, :] < chunks, other=0)
    mass_LS = tl.load(masses + at, mask=other[None, :] < chunks, other=0)
    count_L, mass_L = tl.sum(count_LS, axis=1), tl.sum(mass_LS, axis=1)
    share = _share(top_p, tl.max(mass_L, axis=0))
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
    temperature, peak, draws = _settings(temperatures, best, row)
    if draws == 0:
        return
    chunk = tl.arange(0, S)
    mass_S = tl.load(masses + row * chunks + chunk, mask=chunk < chunks, other=0)
    u = tl.load(us + row)
    if cuts:
        top_k, top_p, min_p, is_cut = _cuts(top_ks, top_ps, min_ps, row, width)
        if is_cut:
            own, count, total = kept + row * width, tl.load(found + row), tl.sum(mass_S, axis=0)
            at = _drawn_from_best(own, count, peak, temperature, top_k, top_p, min_p, total, u, N)
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
    target = _target(u, tl.sum(mass_S, axis=0))
    passed_S = cum_S <= target
    chunk = tl.sum(passed_S.to(tl.int64), axis=0)
    target -= tl.sum(tl.where(passed_S, mass_S, 0), axis=0)
    place = chunk * C + tl.arange(0, C)
    value = tl.load(values + place, mask=place < width, other=-_INFINITY).to(tl.float32)
    cum_C = tl.cumsum(_mass(value, peak, temperature), axis=0)
    return chunk * C + tl.sum((cum_C <= target).to(tl.int64), axis=0)


@triton.jit
def _key(value):
    """Integers in the order of the values; the two zeros are one."""
    bits = (value + 0.0).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ _LOW_BITS, bits)


@triton.jit
def _key_weight(key, peak, temperature):
    """The weight of the value with this key."""
    low = key.to(tl.int32)
    value = tl.where(low < 0, low ^ _LOW_BITS, low).to(tl.float32, bitcast=True)
    return tl.exp((value - peak) / temperature)


@triton.jit
def _above(values, width, key, peak, temperature, N: tl.constexpr):
    """How many tokens have a larger key, and their mass."""
    count_N = tl.zeros([N], tl.int32)
    mass_N = tl.zeros([N], tl.int64)
    for start in range(0, width, N):
        place = start + tl.arange(0, N)
        value = tl.load(values + place, mask=place < width, other=-_INFINITY).to(tl.float32)
        is_above = (_key(value) > key) & (place < width)
        count_N += is_above.to(tl.int32)
        mass_N += tl.where(is_above, _mass(value, peak, temperature), 0)
    return tl.sum(count_N, axis=0).to(tl.int64), tl.sum(mass_N, axis=0)


@triton.jit
def _least_key(values, width, low, high, limit, by_mass: tl.constexpr, peak, temperature, N: tl.constexpr):
    """The least key from `low` to `high` above which there are fewer tokens, or less mass, than the limit. Nothing is
    above `high`."""
    while low < high:
        middle = low + (high - low) // 2
        count, mass = _above(values, width, middle, peak, temperature, N)
        fits = (mass if by_mass else count) < limit
        high = tl.where(fits, middle, high)
        low = tl.where(fits, low, middle + 1)
    return low


@triton.jit
def _least_weighty(low, high, min_p, peak, temperature):
    """The least key from `low` to `high` whose weight is at least `min_p`."""
    while low < high:
        middle = low + (high - low) // 2
        fits = _key_weight(middle, peak, temperature) >= min_p
        high = tl.where(fits, middle, high)
        low = tl.where(fits, low, middle + 1)
    return low


@triton.jit
def _nth_equal(values, width, key, nth, N: tl.constexpr):
    """The id of the nth token with this key, from zero."""
    found, before, last = tl.cast(0, tl.int64), tl.cast(0, tl.int64), tl.cast(0, tl.int64)
    for start in range(0, width, N):
        place = start + tl.arange(0, N)
        value = tl.load(values + place, mask=place < width, other=-_INFINITY).to(tl.float32)
        is_equal = (_key(value) == key) & (place < width)
        last = tl.where(found <= nth, start, last)
        before = tl.where(found <= nth, found, before)
        found += tl.sum(is_equal.to(tl.int64), axis=0)
    place = last + tl.arange(0, N)
    value = tl.load(values + place, mask=place < width, other=-_INFINITY).to(tl.float32)
    is_equal = (_key(value) == key) & (place < width)
    cum_N = tl.cumsum(is_equal.to(tl.int64), axis=0)
    return last + tl.sum((cum_N <= nth - before).to(tl.int64), axis=0)


@triton.jit
def _drawn_from_best(values, width, peak, temperature, top_k, top_p, min_p, total, u, N: tl.constexpr):
    """A token drawn from the best one on, from those that the cuts keep.

    They are all tokens above a key and the first few of those that have it. Tokens without mass are left out of every
    search: they are never drawn.
    """
    high = _key(peak).to(tl.int64)
    least = _key(peak - _DEEPEST * temperature).to(tl.int64)
    if top_k < width:
        least = _least_key(values, width, least, high, top_k, False, peak, temperature, N)
        count, above = _above(values, width, least, peak, temperature, N)
        reached, _ = _above(values, width, least - 1, peak, temperature, N)
        equals = tl.minimum(reached, top_k) - count
        total = above + equals * (_key_weight(least, peak, temperature) * _UNIT).to(tl.int64)
    share = _share(top_p, total)
    if top_p < 1.0:
        least = _least_key(values, width, least, high, share, True, peak, temperature, N)
    least = _least_weighty(least, high, min_p, peak, temperature)
    count, above = _above(values, width, least, peak, temperature, N)
    reached, _ = _above(values, width, least - 1, peak, temperature, N)
    mass = (_key_weight(least, peak, temperature) * _UNIT).to(tl.int64)
    in_share = (share - above - 1) // tl.maximum(mass, 1) + 1
    end = above + tl.minimum(tl.minimum(reached, top_k) - count, in_share) * mass
    target = _target(u, end)
    drawn = _least_key(values, width, least, high, target + 1, True, peak, temperature, N)
    count, above = _above(values, width, drawn, peak, temperature, N)
    mass = (_key_weight(drawn, peak, temperature) * _UNIT).to(tl.int64)
    return _nth_equal(values, width, drawn, (target - above) // tl.maximum(mass, 1), N)


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
