"""MXFP4 as gpt-oss' experts are published: codes of four bits, and a power of two for every 32 of them."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from model.errors import CheckpointError
from model.grouped import Grouped
from weights.files import Stored
from weights.forms import Form
from weights.quantised.config import refuse_unknown
from weights.quantised.parts import misshapen, part
from weights.quantised.scales import MOST, powers
from weights.quantised.tensor import QuantisedTensor

# The values of OCP's MX 1.0 (2023), §5.3: a sign, two bits of exponent and one of mantissa; and scales, powers of two.
_HALF = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_E2M1 = (*_HALF, *(-value for value in _HALF))
_PAIRS = torch.tensor([(_E2M1[byte & 15], _E2M1[byte >> 4]) for byte in range(256)])
_POWERS = [2.0 ** (code - 127) for code in range(255)]
_E8M0 = torch.tensor([*_POWERS, torch.nan])[:, None]
_GROUP = 16  # bytes, of two values each, that share a scale
_FORM = Form("e2m1", 2 * _GROUP, factors=True)


def mxfp4(stored: Mapping[str, Stored], quantisation: Mapping[str, Any]) -> dict[str, QuantisedTensor]:
    """gpt-oss' experts in four bits: `X_blocks` [E, rows, groups, 16] and `X_scales` are X [E, columns, rows].

    Raises:
        CheckpointError: scales are missing or misshapen, or the config has a value that is not known.
    """
    refuse_unknown(quantisation, ("quant_method", "modules_to_not_convert", "dequantize", "use_cuda_graphs"))
    found = {}
    for name, blocks in stored.items():
        if name.endswith("_blocks") and blocks.dtype is torch.uint8:
            tensor = name.removesuffix("_blocks")
            _check_groups(name, blocks, tensor + "_scales", stored.get(tensor + "_scales"))
            experts, rows, groups, _ = blocks.shape
            shape = (experts, 2 * _GROUP * groups, rows)
            meant = replace(blocks, dtype=torch.bfloat16, shape=shape, form=_FORM, turned=True)
            found[tensor] = QuantisedTensor((name, tensor + "_scales"), meant, unpacked, grouped)
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


def grouped(blocks: Tensor, scales: Tensor) -> Grouped | None:
    """[E, rows, columns], exact; None where the exponents of an output's scales span more than float16 has.

    What a group that is all zero is scaled by is not counted.
    """
    exponents, number = scales.int() - 127, scales < 255
    used = (blocks & 0x77 != 0).any(-1) & number  # some bit is set that is no sign
    most = exponents.where(used, -127).amax(-1, keepdim=True)
    below = most - exponents
    if bool((below.where(used, 0) > MOST + 24).any()):
        return None
    kept = powers(MOST - below).half().where(used, 0).where(number, torch.nan)
    factors = powers(most[..., 0] - MOST - 1)  # codes stand for twice the values
    return Grouped(blocks.flatten(-2), kept, 2 * _GROUP, "e2m1", factors=factors)


def _check_groups(name: str, blocks: Stored, partner: str, scales: Stored | None) -> None:
    """Raise CheckpointError unless there is one scale per group."""
    if scales is None:
        raise CheckpointError(f"{name} is stored in MXFP4, but its scales, {partner}, are missing")
    if len(blocks.shape) != 4 or blocks.shape[-1] != _GROUP:
        raise CheckpointError(f"{name} has shape {blocks.shape}, not [experts, rows, groups, {_GROUP}]")
    wanted = blocks.shape[:-1]
    if (scales.dtype, scales.shape) != (torch.uint8, wanted):
        raise CheckpointError(f"{partner} has shape {scales.shape} of {scales.dtype}, not {wanted} of uint8")


def mxfp4_matrix(base: str, stored: Mapping[str, Stored]) -> QuantisedTensor:
    """The same of one matrix as compressed-tensors writes it: `weight_packed` [n, k / 2], `weight_scale` [n, k / 32].

    Raises:
        CheckpointError: a part is missing or misshapen.
    """
    blocks = part(stored, base, "weight_packed", torch.uint8, 2)
    scales = part(stored, base, "weight_scale", torch.uint8, 2)
    n, stride = blocks.shape
    if scales.shape != (n, stride // _GROUP) or stride % _GROUP:
        raise misshapen(
            base + "weight_scale", scales, f"one for every {2 * _GROUP} of {2 * stride} inputs of {n} outputs"
        )

    def dense(codes: Tensor, scales: Tensor) -> Tensor:
        return unpacked(codes.view(n, -1, _GROUP)[None], scales[None])[0].T

    def kept(codes: Tensor, scales: Tensor) -> Grouped | None:
        return grouped(codes.view(n, -1, _GROUP), scales)

    meant = replace(blocks, dtype=torch.bfloat16, shape=(n, 2 * stride), form=_FORM)
    return QuantisedTensor((base + "weight_packed", base + "weight_scale"), meant, dense, kept)
