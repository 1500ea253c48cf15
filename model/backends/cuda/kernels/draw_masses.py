"""What the kernels of drawn tokens know of a row: its settings, the integer mass of each token, and where its cuts end.

No kernel is launched here: these functions are called by those of `token_draws.py` and `cut_search.py`.
"""

import triton
import triton.language as tl

from model.sampling import UNIT_BITS

DEEPEST = tl.constexpr(28.0)  # exp(-28) is below one unit of mass
UNIT = tl.constexpr(float(1 << UNIT_BITS))
_NO_LIMIT = tl.constexpr(1 << 62)
_INFINITY = tl.constexpr(float("inf"))


@triton.jit
def mass_of(value, peak, temperature):
    """`fixed_point` weights relative to the best value."""
    return (tl.exp((value - peak) / temperature) * UNIT).to(tl.int64)


@triton.jit
def settings_of(temperatures, best, row):
    """A row's temperature, its best value, and whether it draws."""
    temperature = tl.load(temperatures + row).to(tl.float32)
    peak = tl.load(best + row)
    return temperature, peak, (temperature > 0) & (tl.abs(peak) < _INFINITY)


@triton.jit
def target_of(u, end):
    """The integer in [0, end) that a random number in [0, 1) stands for."""
    return tl.minimum((u * end.to(tl.float64)).to(tl.int64), end - 1)


@triton.jit
def cuts_of(top_ks, top_ps, min_ps, row, width):
    """A row's top-k, top-p and min-p, and whether one of them may cut."""
    top_k = tl.load(top_ks + row).to(tl.int64)
    top_p, min_p = tl.load(top_ps + row), tl.load(min_ps + row).to(tl.float32)
    return top_k, top_p, min_p, (top_k < width) | (top_p < 1.0) | (min_p > 0.0)


@triton.jit
def share_of(top_p, total):
    """The mass before which a token is kept."""
    return tl.where(top_p < 1.0, tl.ceil(top_p * total.to(tl.float64)).to(tl.int64), _NO_LIMIT)
