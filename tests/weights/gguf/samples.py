"""Random blocks of every type: the same bytes everywhere, with scales of the size that weights have."""

import random

import numpy as np
import torch
from torch import Tensor

from tests.weights.gguf.writer import CODES
from weights.gguf.types import TYPES

# Where blocks have numbers of 16 bits; everything else may be any byte.
HALVES = {"Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "IQ4_NL": (0,), "IQ4_XS": (0,)}
HALVES |= {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "F16": (0,)}


def blocks(kind: str, count: int) -> Tensor:
    """uint8 [count · bytes]."""
    block, rng = TYPES[CODES[kind]], random.Random(kind)
    data = np.frombuffer(rng.randbytes(count * block.bytes), np.uint8).reshape(count, -1).copy()
    for at in HALVES.get(kind, ()):
        halves = np.array([rng.gauss(0, 0.01) for _ in range(count)], np.float16)
        data[:, at : at + 2] = halves[:, None].view(np.uint8)
    if kind == "MXFP4":
        data[:, 0] = [rng.randint(110, 130) for _ in range(count)]
    if kind in ("F32", "BF16"):
        floats = np.array([[rng.gauss(0, 1)] for _ in range(count)], np.float32).view(np.uint8)
        data[:] = floats[:, -block.bytes :]
    return torch.from_numpy(data.reshape(-1))
