"""FP8 (E4M3) matrices with float scales: one per block (DeepSeek-V3, arXiv 2412.19437 §3.3), per output, or for all.

`X` has its scales in `X_scale_inv` where there are blocks, else in `X_scale`; both multiply.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from model.errors import CheckpointError
from weights.files import Stored
from weights.quantised.bytes import fp8_tensor
from weights.quantised.config import expect, refuse_unknown
from weights.quantised.parts import FLOATS
from weights.quantised.tensor import QuantisedTensor

Block = tuple[int, int]  # rows and columns that share a scale
_FIELDS = """quant_method fmt activation_scheme weight_block_size modules_to_not_convert ignored_layers scale_fmt
dequantize kv_cache_scheme activation_scale_ub quant_type weight_per_tensor act_per_tensor"""
FIELDS = frozenset(_FIELDS.split())


def fp8(stored: Mapping[str, Stored], quantisation: Mapping[str, Any]) -> dict[str, QuantisedTensor]:
    """Every FP8 matrix of a checkpoint whose quant_method is fp8 or fbgemm_fp8.

    Raises:
        CheckpointError: scales are missing or misshapen, or the config has a value that is not known.
    """
    refuse_unknown(quantisation, FIELDS)
    expect(quantisation, "fmt", "e4m3", "float8_e4m3fn", default="e4m3")
    block = None
    if quantisation.get("weight_block_size") is not None:
        block = block_of(quantisation, "weight_block_size")
    return fp8_matrices(stored, block, "_scale" if block is None else "_scale_inv")


def block_of(quantisation: Mapping[str, Any], field: str) -> Block:
    """Rows and columns that share a scale. Raises CheckpointError where the field does not say so."""
    match quantisation.get(field):
        case [int(rows), int(columns)] if min(rows, columns) > 0:
            return rows, columns
    raise CheckpointError(
        f"config.json: quantization_config's {field} is {quantisation.get(field)!r:.80}, not [rows, columns]"
    )


def fp8_matrices(stored: Mapping[str, Stored], block: Block | None, suffix: str) -> dict[str, QuantisedTensor]:
    """Every tensor of FP8, with scales in the one whose name has the suffix.

    Raises:
        CheckpointError: see `_scaling`.
    """
    found = {}
    for name, weight in stored.items():
        if weight.dtype is torch.float8_e4m3fn and not name.endswith(suffix):
            scaled = _scaling(name, weight, name + suffix, stored.get(name + suffix), block)
            found[name] = fp8_tensor((name, name + suffix), weight, scaled)
    return found


def _scaling(name: str, weight: Stored, partner: str, scale: Stored | None, block: Block | None) -> Any:
    """What multiplies a matrix by its scales.

    Raises:
        CheckpointError: it is no matrix, or its scales are missing or have a shape that is not known.
    """
    if scale is None:
        raise CheckpointError(f"{name} is stored in FP8, but its scales, {partner}, are missing")
    if len(weight.shape) < 2:
        raise CheckpointError(f"{name} is stored in FP8 with shape {weight.shape}, but only matrices can be")
    *batch, height, width = weight.shape
    if scale.dtype not in FLOATS:
        raise CheckpointError(f"{partner} is stored as {scale.dtype}, not as float16, bfloat16 or float32")
    if block is not None:
        rows, columns = block
        wanted = (*batch, -(-height // rows), -(-width // columns))
        if scale.shape != wanted:
            raise CheckpointError(f"{partner} has shape {scale.shape}, not {wanted}")
        return partial(scaled, block=block)
    if scale.shape not in ((), (1,), (*batch, height), (*batch, height, 1)):
        raise CheckpointError(
            f"{partner} has shape {scale.shape}, not one scale for all or one for each of {height} outputs"
        )
    return multiplied


def scaled(weight: Tensor, scale: Tensor, block: Block) -> Tensor:
    """Each block of [..., n, m] times its scale of [..., ⌈n / rows⌉, ⌈m / columns⌉], in float32."""
    rows, columns = block
    height = weight.shape[-2]
    tall = scale.float().repeat_interleave(rows, dim=-2)[..., :height, :]
    result = weight.float()
    for column in range(tall.shape[-1]):
        first = column * columns
        result[..., first : first + columns] *= tall[..., column, None]
    return result


def multiplied(weight: Tensor, scale: Tensor) -> Tensor:
    """[..., n, m] times one scale, or one per output, in float32."""
    outputs = weight.shape[:-1]
    factors = scale.float().reshape(outputs) if scale.numel() == outputs.numel() else scale.float().reshape(())
    return weight.float().mul_(factors[..., None])
