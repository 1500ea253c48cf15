"""The paged cache as the native kernels read it: tiles of 16 slots, keys in columns, one tensor per layer."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from model.batch import Cache
from model.shapes.memory import Memory

TILE = 16


def native_cache(memory: Iterable[Memory], blocks: int, block_size: int, dtype: torch.dtype) -> Cache:
    """Keys and values in `blocks` blocks of `block_size` tokens, a multiple of 16. Same bytes as the torch cache."""
    shapes = [kind.tensor_shape(blocks * block_size, 0) for kind in memory]
    return Cache(block_size, [_zeros(shape, dtype) for shape in shapes])


def _zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Allocated as zeros, and aligned as the kernels need it."""
    raw: Tensor = torch.ops.moedial.allocate(math.prod(shape) * dtype.itemsize)
    return raw.view(dtype).view(shape)
