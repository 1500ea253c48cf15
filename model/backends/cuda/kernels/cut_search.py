"""A token drawn from the best on, among the candidates of a row that top-k, top-p or min-p cuts, without a sort.

Values are turned into integers of the same order, their keys; where a cut ends, and which token is drawn, is found by
bisection over the keys. Of equal values the lower id comes first. Called by the kernel of `token_draws.py`. Axis: N
candidates that are looked at together.
"""

import triton
import triton.language as tl

from model.backends.cuda.kernels.draw_masses import DEEPEST, UNIT, mass_of, share_of, target_of

_LOW_BITS = tl.constexpr(0x7FFFFFFF)
_INFINITY = tl.constexpr(float("inf"))


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
        mass_N += tl.where(is_above, mass_of(value, peak, temperature), 0)
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
def drawn_from_best(values, width, peak, temperature, top_k, top_p, min_p, total, u, N: tl.constexpr):
    """A token drawn from the best one on, from those that the cuts keep.

    They are all tokens above a key and the first few of those that have it. Tokens without mass are left out of every
    search: they are never drawn.
    """
    high = _key(peak).to(tl.int64)
    least = _key(peak - DEEPEST * temperature).to(tl.int64)
    if top_k < width:
        least = _least_key(values, width, least, high, top_k, False, peak, temperature, N)
        count, above = _above(values, width, least, peak, temperature, N)
        reached, _ = _above(values, width, least - 1, peak, temperature, N)
        equals = tl.minimum(reached, top_k) - count
        total = above + equals * (_key_weight(least, peak, temperature) * UNIT).to(tl.int64)
    share = share_of(top_p, total)
    if top_p < 1.0:
        least = _least_key(values, width, least, high, share, True, peak, temperature, N)
    least = _least_weighty(least, high, min_p, peak, temperature)
    count, above = _above(values, width, least, peak, temperature, N)
    reached, _ = _above(values, width, least - 1, peak, temperature, N)
    mass = (_key_weight(least, peak, temperature) * UNIT).to(tl.int64)
    in_share = (share - above - 1) // tl.maximum(mass, 1) + 1
    end = above + tl.minimum(tl.minimum(reached, top_k) - count, in_share) * mass
    target = target_of(u, end)
    drawn = _least_key(values, width, least, high, target + 1, True, peak, temperature, N)
    count, above = _above(values, width, drawn, peak, temperature, N)
    mass = (_key_weight(drawn, peak, temperature) * UNIT).to(tl.int64)
    return _nth_equal(values, width, drawn, (target - above) // tl.maximum(mass, 1), N)
