"""Writers of quantised checkpoints, from the formulas of their formats, number by number: what loading is compared
with."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor

from weights.dequantise import Tensors
from weights.files import TensorFiles

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]
LARGEST = 0.03  # of the scales that are drawn
Codes = NDArray[np.int64]


@dataclass
class Written:
    """The stored tensors of one matrix, without the prefix of their names, and what they mean, in float64."""

    stored: dict[str, Tensor]
    meant: Tensor


Writer = Callable[[int, int, int], Written]  # of outputs, inputs and a seed


@contextmanager
def opened(folder: Path, stored: Mapping[str, Tensor], config: Mapping[str, Any]) -> Iterator[Tensors]:
    save_file({name: tensor.contiguous() for name, tensor in stored.items()}, folder / "model.safetensors")
    with TensorFiles(folder) as files:
        yield Tensors(files, dict(config))


def words(codes: Codes, bits: int, axis: int, order: tuple[int, ...] = ()) -> Tensor:
    """Neighbours along an axis in int32 words; `order[i]` of them is the i-th from below."""
    each = 32 // bits
    lines = np.moveaxis(codes, axis, -1)
    packed = np.zeros((*lines.shape[:-1], -(-lines.shape[-1] // each)), dtype=np.uint64)
    for place in range(lines.shape[-1]):
        below = order.index(place % each) if order else place % each
        packed[..., place // each] |= lines[..., place].astype(np.uint64) << np.uint64(bits * below)
    return torch.from_numpy(np.moveaxis(packed.astype(np.uint32).view(np.int32), -1, axis).copy())


def unpacked_rows(packed: NDArray[np.int32]) -> Codes:
    """The half bytes of words [w, n], [8 w, n], lowest first."""
    halves = [packed.view(np.uint32) >> 4 * place & 15 for place in range(8)]
    return np.stack(halves, 1).reshape(-1, packed.shape[1]).astype(np.int64)


def random_scales(shape: tuple[int, ...], random: np.random.Generator, dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(random.uniform(0.004, LARGEST, shape)).to(dtype)


def gptq(
    n: int, k: int, seed: int, *, bits: int = 4, group: int = 32, version: int = 1, symmetric: bool = True
) -> Written:
    random, groups = np.random.default_rng(seed), 1 if group == -1 else k // group
    codes = random.integers(0, 1 << bits, (n, k))
    zeros = np.full((n, groups), 1 << bits - 1) if symmetric else random.integers(1, 1 << bits, (n, groups))
    scales = random_scales((n, groups), random, torch.float16)
    group_of = np.arange(k) // (k // groups)
    meant = torch.from_numpy(codes - zeros[:, group_of]) * scales.double()[:, group_of]
    less = 1 if version == 1 else 0
    stored = {
        "qweight": words(codes.T, bits, 0),
        "qzeros": words(zeros.T - less, bits, 1),
        "scales": scales.T,
        "g_idx": torch.from_numpy(group_of).int(),
    }
    return Written(stored, meant)


def awq(n: int, k: int, seed: int, group: int = 32) -> Written:
    random, order = np.random.default_rng(seed), (0, 2, 4, 6, 1, 3, 5, 7)
    codes, zeros = random.integers(0, 16, (k, n)), random.integers(0, 16, (k // group, n))
    scales = random_scales((k // group, n), random, torch.float16)
    group_of = np.arange(k) // group
    meant = torch.from_numpy(codes - zeros[group_of]) * scales.double()[group_of]
    stored = {"qweight": words(codes, 4, 1, order), "qzeros": words(zeros, 4, 1, order), "scales": scales}
    return Written(stored, meant.T)


def packed(
    n: int,
    k: int,
    seed: int,
    bits: int = 4,
    group: int = 32,
    symmetric: bool = True,
    dtype: torch.dtype = torch.bfloat16,
) -> Written:
    random, groups = np.random.default_rng(seed), 1 if group == -1 else k // group
    most = 1 << bits - 1
    codes = random.integers(-most, most, (n, k))
    zeros = np.zeros((n, groups), dtype=np.int64) if symmetric else random.integers(-most, most, (n, groups))
    scales = random_scales((n, groups), random, dtype)
    group_of = np.arange(k) // (k // groups)
    meant = torch.from_numpy(codes - zeros[:, group_of]) * scales.double()[:, group_of]
    stored = {
        "weight_packed": words(codes + most, bits, 1),
        "weight_scale": scales,
        "weight_shape": torch.tensor([n, k]),
    }
    if not symmetric:
        stored["weight_zero_point"] = words(zeros + most, bits, 0)
    return Written(stored, meant)


def int8(n: int, k: int, seed: int, symmetric: bool = True) -> Written:
    random = np.random.default_rng(seed)
    codes = random.integers(-128, 128, (n, k))
    zeros = np.zeros((n, 1), dtype=np.int64) if symmetric else random.integers(-128, 128, (n, 1))
    scales = random_scales((n, 1), random, torch.float32)
    stored = {"weight": torch.from_numpy(codes).to(torch.int8), "weight_scale": scales}
    if not symmetric:
        stored["weight_zero_point"] = torch.from_numpy(zeros).to(torch.int8)
    return Written(stored, torch.from_numpy(codes - zeros) * scales.double())


def fp8(n: int, k: int, seed: int, scales_shape: tuple[int, ...] | None = None) -> Written:
    """One scale per output, or in a shape that broadcasts."""
    random = np.random.default_rng(seed)
    values = torch.from_numpy(random.normal(0, 60, (n, k))).to(torch.float8_e4m3fn)
    scales = random_scales((n, 1) if scales_shape is None else scales_shape, random, torch.float32) / 64
    return Written({"weight": values, "weight_scale": scales}, values.double() * scales.double())


def nvfp4(n: int, k: int, seed: int, compressed: bool = False) -> Written:
    random = np.random.default_rng(seed)
    codes = random.integers(0, 16, (n, k))
    scales = torch.from_numpy(random.uniform(0.01, 400, (n, k // 16))).to(torch.float8_e4m3fn)
    one = torch.tensor(2.0**-13 if not compressed else 2.0**13)  # a power of two: both ways round alike
    factor = one.double() if not compressed else 1 / one.double()
    values = torch.tensor(E2M1, dtype=torch.float64)[torch.from_numpy(codes)]
    meant = values * scales.double().repeat_interleave(16, 1) * factor
    halves = torch.from_numpy(codes[:, 0::2] + 16 * codes[:, 1::2]).to(torch.uint8)
    if compressed:
        return Written({"weight_packed": halves, "weight_scale": scales, "weight_global_scale": one.reshape(1)}, meant)
    return Written({"weight": halves, "weight_scale": scales, "weight_scale_2": one}, meant)


def mxfp4(n: int, k: int, seed: int) -> Written:
    random = np.random.default_rng(seed)
    codes, exponents = random.integers(0, 16, (n, k)), random.integers(112, 124, (n, k // 32))
    values = torch.tensor(E2M1, dtype=torch.float64)[torch.from_numpy(codes)]
    meant = values * torch.exp2(torch.from_numpy(exponents).double() - 127).repeat_interleave(32, 1)
    halves = torch.from_numpy(codes[:, 0::2] + 16 * codes[:, 1::2]).to(torch.uint8)
    return Written({"weight_packed": halves, "weight_scale": torch.from_numpy(exponents).to(torch.uint8)}, meant)
