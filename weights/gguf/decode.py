"""What the bytes of ggml's block types mean: codes of groups of values, and the scale and minimum of each group.

It opens no files. The layouts are those of ggml's `ggml-common.h`; of every nibble-packed half block, the low halves
come first.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from model.grouped import Values


class Groups(NamedTuple):
    """B blocks of G groups of N values: value = scale · (what the code stands for) + minimum."""

    codes_BGN: Tensor  # uint8 below 16 or 64, or int8: the integers themselves
    scales_BG: Tensor  # float32
    minima_BG: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Format:
    """How the blocks of one type are decoded, from uint8 [B, bytes].

    Attributes:
        minimum: groups have one.
        exact: scales and minima are float16 as they are stored.
    """

    group: int
    values: Values
    decode: Callable[[Tensor], Groups]
    minimum: bool = False
    exact: bool = False


def _half(blocks: Tensor, start: int, count: int = 1) -> Tensor:
    """Numbers that are stored as float16, [B, count]."""
    return blocks[:, start : start + 2 * count].contiguous().view(torch.float16).float()


def _fields(packed: Tensor, bits: int, axis: int = -1) -> Tensor:
    """The fields of each byte, the lowest first, along a new axis before `axis`."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
    shape = [1] * (packed.dim() + 1)
    shape[axis - 1] = len(shifts)
    return packed.unsqueeze(axis - 1) >> shifts.view(shape) & (1 << bits) - 1


def _nibbles(packed: Tensor) -> Tensor:
    """[B, 16 G] bytes are codes [B, G, 32]."""
    return _fields(packed.reshape(len(packed), -1, 16), 4).flatten(-2)


def _fifth_bits(blocks: Tensor, start: int) -> Tensor:
    """32 bits, of one value each: [B, 1, 32]."""
    return _fields(blocks[:, start : start + 4, None], 1).flatten(1)[:, None]


def _q4_0(blocks: Tensor) -> Groups:
    return Groups(_nibbles(blocks[:, 2:]), _half(blocks, 0))


def _q4_1(blocks: Tensor) -> Groups:
    return Groups(_nibbles(blocks[:, 4:]), _half(blocks, 0), _half(blocks, 2))


def _q5_0(blocks: Tensor) -> Groups:
    codes = _nibbles(blocks[:, 6:]) | _fifth_bits(blocks, 2) << 4
    return Groups(codes + 16, _half(blocks, 0))


def _q5_1(blocks: Tensor) -> Groups:
    codes = _nibbles(blocks[:, 8:]) | _fifth_bits(blocks, 4) << 4
    return Groups(codes + 32, _half(blocks, 0), _half(blocks, 2))


def _q8_0(blocks: Tensor) -> Groups:
    return Groups(blocks[:, None, 2:].contiguous().view(torch.int8), _half(blocks, 0))


def _q2_k(blocks: Tensor) -> Groups:
    """A scale and a minimum of 4 bits each; codes of 2 bits, 128 values in 32 bytes."""
    codes = _fields(blocks[:, 16:80].reshape(-1, 2, 32), 2).reshape(-1, 16, 16)
    factor, low = _half(blocks, 80), _half(blocks, 82)
    return Groups(codes, factor * (blocks[:, :16] & 15), -low * (blocks[:, :16] >> 4))


def _q3_k(blocks: Tensor) -> Groups:
    """Scales of 6 bits, codes of 2 bits and a third elsewhere: -4 to 3, which are codes 4 to 11 here."""
    low = _fields(blocks[:, 32:96].reshape(-1, 2, 32), 2).flatten(1, 2)
    codes = (low | _fields(blocks[:, :32], 1) << 2) + 4
    four, two = blocks[:, 96:104], blocks[:, 104:108]
    scales = _fields(four, 4).flatten(1) | _fields(two, 2).flatten(1) << 4
    return Groups(codes.reshape(-1, 16, 16), _half(blocks, 108) * (scales.float() - 32))


def _six_bits(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Eight scales and eight minima of 6 bits in 12 bytes, the upper two bits of the last four apart."""
    first, second, third = torch.split(packed, 4, dim=-1)
    scales = torch.cat([first & 63, third & 15 | first >> 6 << 4], dim=-1)
    minima = torch.cat([second & 63, third >> 4 | second >> 6 << 4], dim=-1)
    return scales, minima


def _q4_k(blocks: Tensor) -> Groups:
    scales, minima = _six_bits(blocks[:, 4:16])
    codes = _fields(blocks[:, 16:].reshape(-1, 4, 32), 4).flatten(1, 2)
    return Groups(codes, _half(blocks, 0) * scales, -_half(blocks, 2) * minima)


def _q5_k(blocks: Tensor) -> Groups:
    scales, minima = _six_bits(blocks[:, 4:16])
    low = _fields(blocks[:, 48:].reshape(-1, 4, 32), 4).flatten(1, 2)
    codes = low | _fields(blocks[:, 16:48], 1) << 4
    return Groups(codes + 32, _half(blocks, 0) * scales, -_half(blocks, 2) * minima)


def _q6_k(blocks: Tensor) -> Groups:
    """Codes of 6 bits; of each 128, 64 bytes have four bits and 32 bytes the other two."""
    low = _fields(blocks[:, :128].reshape(-1, 2, 2, 32), 4, axis=-2).flatten(2, 3)
    codes = low | _fields(blocks[:, 128:192].reshape(-1, 2, 32), 2) << 4
    scales = blocks[:, 192:208].contiguous().view(torch.int8)
    return Groups(codes.reshape(-1, 16, 16), _half(blocks, 208) * scales)


def _iq4_xs(blocks: Tensor) -> Groups:
    """Scales of 6 bits: four in nibbles, two apart."""
    low, high = _fields(blocks[:, 4:8, None], 4).flatten(1), _fields(blocks[:, 2:4, None], 2).flatten(1)
    return Groups(_nibbles(blocks[:, 8:]), _half(blocks, 0) * ((low | high << 4).float() - 32))


def _mxfp4(blocks: Tensor) -> Groups:
    """A power of two per block, halved, because the table of E2M1 is doubled."""
    powers = torch.tensor([2.0 ** (code - 128) for code in range(256)])
    return Groups(_nibbles(blocks[:, 1:]), powers[blocks[:, :1].int()])


FORMATS = {
    "Q4_0": Format(32, "signed", _q4_0, exact=True),
    "Q4_1": Format(32, "unsigned", _q4_1, minimum=True, exact=True),
    "Q5_0": Format(32, "signed6", _q5_0, exact=True),
    "Q5_1": Format(32, "signed6", _q5_1, minimum=True, exact=True),
    "Q8_0": Format(32, "bytes", _q8_0, exact=True),
    "IQ4_NL": Format(32, "iq4", _q4_0, exact=True),
    "MXFP4": Format(32, "e2m1", _mxfp4),
    "IQ4_XS": Format(32, "iq4", _iq4_xs),
    "Q2_K": Format(16, "unsigned", _q2_k, minimum=True),
    "Q3_K": Format(16, "signed", _q3_k),
    "Q4_K": Format(32, "unsigned", _q4_k, minimum=True),
    "Q5_K": Format(32, "signed6", _q5_k, minimum=True),
    "Q6_K": Format(16, "signed6", _q6_k),
}
