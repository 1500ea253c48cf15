"""The paged cache as the native kernels read it: tiles of 16 slots, keys in columns, one tensor per layer."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.backends.torch.attend import Memory
from model.batch import Pages
from model.shapes import attention as shapes

TILE = 16


class NativeCache:
    """Keys and values in `blocks` blocks of `block_size` tokens, a multiple of 16. Same bytes as the torch cache."""

    def __init__(self, memory: Sequence[Memory], blocks: int, block_size: int, dtype: torch.dtype) -> None:
        self.block_size = block_size
        self.layers = []
        for kind in memory:
            assert isinstance(kind, shapes.Pages) and kind.values
            shape = (2, blocks * block_size, kind.heads, kind.key_width)
            size = math.prod(shape) * dtype.itemsize
            self.layers.append(torch.ops.moedial.allocate(size).view(dtype).view(shape))  # zeros

    def attend(self, pages: Pages) -> "NativePages":
        """What a step hands to each attention block."""
        return NativePages(self, pages.spans_B3, pages.tables_BP)


@dataclass(frozen=True, slots=True)
class NativePages:
    """One step's sequences: (first row, rows, context) of each, and their block tables."""

    cache: NativeCache
    spans_B3: Tensor  # int64
    tables_BP: Tensor  # int64
