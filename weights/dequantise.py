"""Dequantisation: tensors of quantised checkpoints, each stored as several, are computed as they are read.

Each format is a function that finds which stored tensors belong together, and one that computes the tensor from them.
It knows no families and no parameters.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from model.errors import CheckpointError
from weights.files import Stored, TensorFiles


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One quantised tensor: the stored tensors that it consists of, its dtype and shape, and how it is computed."""

    names: tuple[str, ...]
    stored: Stored
    make: Callable[..., Tensor]  # of the stored tensors, in order


class Tensors:
    """The tensors of a folder, read one at a time, in whatever format they are stored."""

    def __init__(self, files: TensorFiles, quantisation: object = None) -> None:
        """`quantisation` is config.json's `quantization_config`.

        Raises:
            CheckpointError: a part of a tensor is missing or misshapen, or the config does not describe it.
        """
        self._files = files
        said = quantisation if isinstance(quantisation, dict) else {}
        self._derived = block_scaled(files.stored, said) | mxfp4(files.stored, said)
        parts = {name for packed in self._derived.values() for name in packed.names}
        self.stored = {name: stored for name, stored in files.stored.items() if name not in parts}
        self.stored |= {name: packed.stored for name, packed in self._derived.items()}

    def read(self, name: str) -> Tensor:
        """One tensor, ready to be copied into a parameter."""
        packed = self._derived.get(name)
        if packed is None:
            return self._files.read(name)
        return packed.make(*map(self._files.read, packed.names))

    def read_into(self, name: str, target: Tensor) -> None:
        """One tensor that is stored as `target` is."""
        if name in self._derived:
            target.copy_(self.read(name))
        else:
            self._files.read_into(name, target)


def block_scaled(stored: Mapping[str, Stored], quantisation: Mapping[str, Any]) -> dict[str, StoredTensor]:
    """FP8 with one scale per block (DeepSeek-V3, arXiv 2412.19437 §3.3): `X` and `X_scale_inv`.

    Raises:
        CheckpointError: there are no scales for an FP8 tensor, or not as many as it has blocks.
    """
    found = {}
    for name, weight in stored.items():
        if weight.dtype is torch.float8_e4m3fn:
            block = _block(quantisation)
            _check_scales(name, weight, stored.get(name + "_scale_inv"), block)
            found[name] = StoredTensor((name, name + "_scale_inv"), weight, partial(scaled, block=block))
    return found


def scaled(weight: Tensor, scale: Tensor, block: tuple[int, int]) -> Tensor:
    """Each block of [..., n, m] times its scale of [..., ⌈n / rows⌉, ⌈m / columns⌉], in float32."""
    rows, columns = block
    height = weight.shape[-2]
    tall = scale.float().repeat_interleave(rows, dim=-2)[..., :height, :]
    result = weight.float()
    for column in range(tall.shape[-1]):
        first = column * columns
        result[..., first : first + columns] *= tall[..., column, None]
    return result


def _block(quantisation: Mapping[str, Any]) -> tuple[int, int]:
    """Rows and columns that share a scale."""
    match quantisation:
        case {"quant_method": "fp8", "weight_block_size": [int(rows), int(columns)]} if min(rows, columns) > 0:
            return rows, columns
    method, block = quantisation.get("quant_method"), quantisation.get("weight_block_size")
    raise CheckpointError(
        "tensors are stored in FP8, but config.json's quantization_config does not say how: quant_method is"
        f" {method!r:.40}, weight_block_size {block!r:.40}; known is fp8 with a block of [rows, columns]"
    )


def _check_scales(name: str, weight: Stored, scale: Stored | None, block: tuple[int, int]) -> None:
    """Raise CheckpointError unless there is one scale per block."""
    if scale is None:
        raise CheckpointError(f"{name} is stored in FP8, but its scales, {name}_scale_inv, are missing")
    if len(weight.shape) < 2:
        raise CheckpointError(f"{name} is stored in FP8 with shape {weight.shape}, but only matrices can be")
    *batch, height, width = weight.shape
    rows, columns = block
    wanted = (*batch, -(-height // rows), -(-width // columns))
    if scale.shape != wanted:
        raise CheckpointError(f"{name}_scale_inv has shape {scale.shape}, not {wanted}")


# The values of OCP's MX 1.0 (2023), §5.3: a sign, two bits of exponent and one of mantissa; and scales, powers of two.
_HALF = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_E2M1 = (*_HALF, *(-value for value in _HALF))
_PAIRS = torch.tensor([(_E2M1[byte & 15], _E2M1[byte >> 4]) for byte in range(256)])
_POWERS = [2.0 ** (code - 127) for code in range(255)]
_E8M0 = torch.tensor([*_POWERS, torch.nan])[:, None]
_GROUP = 16  # bytes, of two values each, that share a scale


def mxfp4(stored: Mapping[str, Stored], quantisation: Mapping[str, Any]) -> dict[str, StoredTensor]:
    """gpt-oss' experts in four bits: `X_blocks` [E, rows, groups, 16] and `X_scales` are X [E, columns, rows].

    Raises:
        CheckpointError: scales are missing or misshapen, or the config does not say that they are MXFP4.
    """
    found = {}
    for name, blocks in stored.items():
        if name.endswith("_blocks") and blocks.dtype is torch.uint8:
            tensor = name.removesuffix("_blocks")
            if (method := quantisation.get("quant_method")) != "mxfp4":
                raise CheckpointError(f"{name} is MXFP4, but config.json's quant_method is {method!r:.40}")
            _check_groups(name, blocks, tensor + "_scales", stored.get(tensor + "_scales"))
            experts, rows, groups, _ = blocks.shape
            meant = replace(blocks, dtype=torch.bfloat16, shape=(experts, 2 * _GROUP * groups, rows))
            found[tensor] = StoredTensor((name, tensor + "_scales"), meant, unpacked)
    return found


def unpacked(blocks: Tensor, scales: Tensor) -> Tensor:
    """[E, columns, rows] bfloat16, which holds every product: of a byte, the low half comes first."""
    experts, rows, groups, _ = blocks.shape
    result = torch.empty(experts, rows, groups, 2 * _GROUP, dtype=torch.bfloat16)
    for values, block, scale in zip(result, blocks, scales, strict=True):
        pairs = F.embedding(block.int(), _PAIRS)
        factors = F.embedding(scale.int(), _E8M0)
        values.copy_(pairs.flatten(-2) * factors)
    return result.flatten(-2).transpose(-1, -2)


def _check_groups(name: str, blocks: Stored, partner: str, scales: Stored | None) -> None:
    """Raise CheckpointError unless there is one scale per group."""
    if scales is None:
        raise CheckpointError(f"{name} is stored in MXFP4, but its scales, {partner}, are missing")
    if len(blocks.shape) != 4 or blocks.shape[-1] != _GROUP:
        raise CheckpointError(f"{name} has shape {blocks.shape}, not [experts, rows, groups, {_GROUP}]")
    wanted = blocks.shape[:-1]
    if (scales.dtype, scales.shape) != (torch.uint8, wanted):
        raise CheckpointError(f"{partner} has shape {scales.shape} of {scales.dtype}, not {wanted} of uint8")
