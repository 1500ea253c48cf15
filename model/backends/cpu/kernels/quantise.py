"""Quantises weights to 4 bits: the table of 6-bit integers, groups of 32 inputs, an 8-bit scale per group.

The search for scales is csrc/quantiser.h.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from model.errors import CheckpointError
from model.grouped import Grouped, Values, code_table

VALUES: Values = "table6"


def quantise_int4(weight: Tensor) -> Grouped:
    """Matrices [..., n, k] in groups of 32 inputs, or of 16 where 32 would leave half of the last one empty.

    k is padded with zeros to a multiple of the group.

    Raises:
        CheckpointError: a weight is not finite.
    """
    *batch, n, k = weight.shape
    group = 16 if 0 < k % 32 <= 16 else 32
    padded = F.pad(weight, (0, -k % group)).reshape(-1, k + -k % group).contiguous()
    codes, scales, factors = torch.ops.moedial.quantise(padded, code_table(VALUES), group)
    if not factors.isfinite().all():
        raise CheckpointError(f"quantize int4: a weight of a matrix [{n}, {k}] is not finite")
    shape = (*batch, n, -1)
    return Grouped(codes.view(shape), scales.view(shape), group, VALUES, factors=factors.view(*batch, n))
