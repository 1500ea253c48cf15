"""Matrices of unsigned integers in groups, (code - zero) · scale: what GPTQ, AWQ and compressed-tensors store.

It does not depend on a format: each unpacks its own layout into `Integers`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from model.grouped import Grouped, Values
from weights.files import Stored
from weights.forms import group_within
from weights.quantised.scales import halved
from weights.quantised.tensor import QuantisedTensor


@dataclass(frozen=True, slots=True)
class Integers:
    """A matrix [n, k].

    Attributes:
        codes: uint8 [n, k · bits / 8]; of two codes in a byte the lower input's is the low half.
        scales: of any float dtype, [n, groups].
        zeros: int32 [n, groups].
        bits: of a code, 4 or 8.
        group_of: int64 [k], the group of each input where neighbours do not share one; else None.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    bits: int
    group_of: Tensor | None = None

    def dense(self) -> Tensor:
        """In float32; the product is rounded once."""
        codes = self.codes if self.bits == 8 else torch.stack([self.codes & 15, self.codes >> 4], -1).flatten(-2)
        return (codes.float() - self._spread(self.zeros).float()).mul_(self._spread(self.scales).float())

    def _spread(self, values: Tensor) -> Tensor:
        """The value of each input's group."""
        if self.group_of is not None:
            return values[:, self.group_of]
        return values.repeat_interleave(self._run, -1)

    @property
    def _run(self) -> int:
        """Neighbours that share a scale."""
        return self.codes.shape[-1] * 8 // self.bits // self.scales.shape[-1]

    def grouped(self) -> Grouped | None:
        """The same without widening, or None where neighbours share no scale, or too few do.

        It is exact where outputs have one scale each or all zeros are in the middle, as far as `halved` is; else the
        products of zeros and scales are rounded to float16.
        """
        k = self.codes.shape[-1] * 8 // self.bits
        group = group_within(k, self._run)
        if self.group_of is not None or group is None:
            return None
        middle, base = 1 << self.bits - 1, 0 if self.bits == 4 else 128
        shifted = bool((self.zeros != middle).any())
        offsets = (base - self.zeros).float() if shifted else None
        if self.scales.shape[-1] == 1:
            factors: Tensor | None = self.scales[:, 0].float().contiguous()
            scales = torch.ones_like(self.scales, dtype=torch.float16)
            minima = None if offsets is None else offsets.half()
        else:
            wide = self.scales.float()
            scales, minima, factors = halved(wide, None if offsets is None else offsets * wide)
        scales = scales.repeat_interleave(self._run // group, -1)
        minima = None if minima is None else minima.repeat_interleave(self._run // group, -1)
        if self.bits == 8:
            return Grouped((self.codes ^ 128).view(torch.int8), scales, group, "bytes", minima, factors)
        return Grouped(self.codes, scales, group, integer_values(4, shifted), minima, factors)


def integer_values(bits: int, minimum: bool) -> Values:
    """What codes of 4 or 8 bits, with or without a minimum, stand for as `Grouped`."""
    if bits == 8:
        return "bytes"
    return "unsigned" if minimum else "signed"


def integer_tensor(names: tuple[str, ...], stored: Stored, read: Callable[..., Integers]) -> QuantisedTensor:
    """The tensor that `read` makes of the stored ones."""
    return QuantisedTensor(names, stored, lambda *parts: read(*parts).dense(), lambda *parts: read(*parts).grouped())


def words_as_bytes(words: Tensor) -> Tensor:
    """int32 [..., w] as uint8 [..., 4 w], the lowest byte first."""
    return words.contiguous().view(torch.uint8)


def unpacked(words: Tensor, bits: int) -> Tensor:
    """The values in int32 words [..., w], lowest bits first: int32 [..., w · 32 / bits]."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    return (words[..., None] >> shifts & (1 << bits) - 1).flatten(-2)
