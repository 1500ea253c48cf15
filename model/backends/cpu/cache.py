"""What the native kernels keep of sequences, one tensor per layer: pages in tiles of 16 slots, keys in columns, or
states, a row per sequence (csrc/delta.h has their order)."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from model.batch import Cache
from model.shapes.memory import Memory

TILE = 16
SCALE_BYTES = 4


def native_cache(memory: Iterable[Memory], blocks: int, block_size: int, dtype: torch.dtype, slots: int) -> Cache:
    """Keys and values in `blocks` blocks of `block_size` tokens, a multiple of 16, and float32 states of `slots`
    sequences. Same bytes as the torch cache; in int8 each key and value has the bytes of a scale behind it."""
    layers = []
    for kind in memory:
        *shape, width = kind.tensor_shape(blocks * block_size, slots)
        stored = width + SCALE_BYTES if dtype == torch.int8 and kind.per_token else width
        layers.append(_zeros((*shape, stored), dtype if kind.per_token else torch.float32))
    return Cache(block_size, layers)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Allocated as zeros, and aligned as the kernels need it."""
    raw: Tensor = torch.ops.moedial.allocate(math.prod(shape) * dtype.itemsize)
    return raw.view(dtype).view(shape)
