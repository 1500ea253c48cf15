"""Scales and minima of groups as `Grouped` keeps them: in float16, times a power of two per output. It does not depend
on a format."""

import torch
from torch import Tensor

MOST = 11  # exponent of the largest scale: a minimum of 16 scales is finite, and 25 binades below are exact


def halved(scales: Tensor, minima: Tensor | None = None) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Scales and minima [..., n, groups] in float16, and factors [..., n] or None, of float values.

    Scales that float16 holds stay as they are. Others are divided by a power of two per output, so that the largest
    lies below 2^(MOST + 1): up to 11 bits they are exact over 25 binades. Minima are rounded.
    """
    as_they_are = scales.half()
    if torch.equal(as_they_are.float(), scales.float()) and (minima is None or bool(minima.half().isfinite().all())):
        return as_they_are, None if minima is None else minima.half(), None
    largest = scales.float().abs().amax(-1)
    if minima is not None:
        largest = largest.maximum(minima.float().abs().amax(-1) / 16)
    _, exponent = torch.frexp(largest)  # largest < 2^exponent
    shift = (MOST + 1 - exponent)[..., None]
    small = (scales.float() * powers(shift)).half()
    return small, None if minima is None else (minima.float() * powers(shift)).half(), powers(-shift[..., 0])


def powers(exponents: Tensor) -> Tensor:
    """2^exponent in float32, exact, of int32; also where that is subnormal."""
    half = exponents.clamp(-252, 252) // 2
    return _normal(half) * _normal(exponents.clamp(-252, 252) - half)


def _normal(exponents: Tensor) -> Tensor:
    """2^exponent of exponents from -126 to 127, by its bits."""
    return (exponents.int() + 127 << 23).view(torch.float32)
