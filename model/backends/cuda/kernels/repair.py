"""Repair of a mixture's output by the row of a token's count, as `repaired` in `model/moe/repair.py`, for the kernels
that add it to the residual."""

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from model.moe.repair import RepairTables


@dataclass(frozen=True, slots=True)
class Repair:
    """The statistics of a layer, and of each token its count in it and whether its rule has repair."""

    tables: RepairTables
    counts_T: Tensor
    wanted_T: Tensor  # int32; 0: no

    def arguments(self) -> tuple[Tensor, ...]:
        """The pointers of `repaired`, in order."""
        return self.wanted_T, self.counts_T, self.tables.scale_KD, self.tables.shift_KD


@triton.jit
def repaired(row, wanted, counts, scales, shifts, token, place, real, width):
    """The output of one token, float32, brought to its mean and spread at the trained count where that is wanted."""
    if tl.load(wanted + token) != 0:
        at = tl.load(counts + token).to(tl.int64) * width + place
        row = row * tl.load(scales + at, mask=real, other=1.0) + tl.load(shifts + at, mask=real, other=0.0)
    return row
