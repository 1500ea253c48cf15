"""Quantised matrices in groups: codes of 4, 6 or 8 bits, with one scale and optionally one minimum per group of inputs.

This is the form between a file and what a backend multiplies. It does not depend on files or the layout of kernels.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

import torch
from torch import Tensor

Values = Literal["signed", "unsigned", "e2m1", "iq4", "table6", "signed6", "bytes"]

# What a code stands for, before its group's scale. All are integers, so that a group's sum of products is exact. A code
# has 4 bits, or 6 where there are 64.
CODES: dict[Values, tuple[int, ...]] = {
    "signed": tuple(range(-8, 8)),
    "unsigned": tuple(range(16)),  # with a minimum
    # OCP's MX 1.0 (2023), §5.3.3, doubled: a sign, two bits of exponent and one of mantissa.
    "e2m1": (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12),
    # llama.cpp's IQ4_NL and IQ4_XS.
    "iq4": (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113),
    # Close to the quantiles of weights, in 6 bits: the sum of two products fits 16 bits.
    "table6": (-32, -26, -21, -16, -12, -9, -6, -3, 0, 3, 6, 10, 13, 17, 22, 28),
    "signed6": tuple(range(-32, 32)),
}
GROUPS = (16, 32, 64, 128)


@cache
def code_table(values: Values) -> Tensor:
    """What each code stands for, int8 [16] or [64]. It is shared: do not write to it."""
    return torch.tensor(CODES[values], dtype=torch.int8)


def code_bits(values: Values) -> int:
    """Bits of a stored code."""
    if values == "bytes":
        return 8
    return 6 if values == "signed6" else 4


def code_bounds(values: Values) -> tuple[int, int]:
    """The lowest and the highest integer that a code stands for."""
    return (-128, 127) if values == "bytes" else (min(CODES[values]), max(CODES[values]))


@dataclass(frozen=True, slots=True)
class Grouped:
    """Matrices [..., n, k]: value = factor · (scale · CODES[code] + minimum), scale and minimum of the value's group.

    Attributes:
        codes: with `values` "bytes", int8 [..., n, k], the integers themselves; else uint8 [..., n, k · bits / 8], see
            `packed_codes`.
        scales: float16 [..., n, k / group], or int8, integers that the factors make scales of.
        minima: float16 of the shape of `scales`, or None.
        factors: float32 [..., n], one per output, or None for 1.
        group: neighbouring inputs that share a scale, of `GROUPS`; it divides k.
    """

    codes: Tensor
    scales: Tensor
    group: int
    values: Values
    minima: Tensor | None = None
    factors: Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        """Of the matrices that it stands for."""
        *batch, n, stored = self.codes.shape
        return torch.Size([*batch, n, stored * 8 // code_bits(self.values)])

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in (self.codes, self.scales, self.minima, self.factors) if part is not None)

    def integers(self) -> Tensor:
        """What the codes stand for, int8 [..., n, k]."""
        if self.values == "bytes":
            return self.codes
        if code_bits(self.values) == 6:
            return (_six_bit_codes(self.codes) - 32).view(torch.int8)
        halves = torch.stack([self.codes & 15, self.codes >> 4], dim=-1)
        return code_table(self.values)[halves.flatten(-2).int()]

    def dense(self) -> Tensor:
        """The matrices in float32; each product and sum is rounded to float32 once."""
        values = self.integers().float().unflatten(-1, (-1, self.group)) * self.scales.float()[..., None]
        if self.minima is not None:
            values += self.minima.float()[..., None]
        values = values.flatten(-2)
        return values if self.factors is None else values * self.factors[..., None]

    def over_outputs(self, change: Callable[[Tensor], Tensor]) -> "Grouped":
        """With every part changed, each as a tensor [..., n, columns]; the change must treat all columns alike."""

        def changed(part: Tensor | None) -> Tensor | None:
            return None if part is None else change(part).contiguous()

        factors = None if self.factors is None else change(self.factors[..., None])[..., 0].contiguous()
        codes, scales = change(self.codes).contiguous(), change(self.scales).contiguous()
        return replace(self, codes=codes, scales=scales, minima=changed(self.minima), factors=factors)

    def rows(self, index: Tensor | slice) -> "Grouped":
        """The outputs `index`, in its order."""
        return self.over_outputs(lambda part: part.movedim(-2, 0)[index].movedim(0, -2))


def packed_codes(codes: Tensor, bits: int = 4) -> Tensor:
    """Codes of 4 or 6 bits [..., n, k] as `Grouped` stores them, uint8 [..., n, k · bits / 8].

    Of 4 bits a byte has those of inputs 2 i (low half) and 2 i + 1 (high half). Of 6 bits, 12 bytes have those of 16
    inputs: byte i that of input i, and above it the bits 2 (i div 4) and 2 (i div 4) + 1 of that of input 12 + i mod 4.
    """
    codes = codes.to(torch.uint8)
    if bits == 6:
        first, last = codes.unflatten(-1, (-1, 16)).contiguous().view(torch.int32).split([3, 1], dim=-1)
        parts = torch.cat([last >> place & _LOWEST for place in _PLACES], dim=-1)
        return (first | parts << 6).view(torch.uint8).flatten(-2)
    pairs = codes.unflatten(-1, (-1, 2))
    return pairs[..., 0] | pairs[..., 1] << 4


def _six_bit_codes(stored: Tensor) -> Tensor:
    """Codes of 6 bits, uint8 [..., n, k]."""
    words = stored.unflatten(-1, (-1, 12)).contiguous().view(torch.int32)
    parts = words >> 6 & _LOWEST
    last = parts[..., :1] | parts[..., 1:2] << _PLACES[1] | parts[..., 2:] << _PLACES[2]
    return torch.cat([words & 0x3F3F3F3F, last], dim=-1).view(torch.uint8).flatten(-2)


_PLACES = (0, 2, 4)  # of the two bits of a code of 6 that each of three words has
_LOWEST = 0x03030303  # two bits of each byte
