"""NVFP4: FP4 codes, for every 16 of them a scale in E4M3, and one float for the matrix. Two programs write it, under
names of their own."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from model.grouped import Grouped
from weights.files import Stored
from weights.forms import Form
from weights.quantised.parts import misshapen, part
from weights.quantised.tensor import QuantisedTensor

GROUP = 16


def nvfp4(base: str, codes: str, factor: str, stored: Mapping[str, Stored], divides: bool = False) -> QuantisedTensor:
    """One matrix: uint8 `codes` [n, k / 2], of two codes the lower input's in the low half, `weight_scale` [n, k / 16]
    and one float, `factor`, which multiplies or divides.

    Raises:
        CheckpointError: a part is missing or misshapen.
    """
    names = (base + codes, base + "weight_scale", base + factor)
    weight = part(stored, base, codes, torch.uint8, 2)
    n, k = weight.shape[0], 2 * weight.shape[1]
    scales = part(stored, base, "weight_scale", torch.float8_e4m3fn, 2)
    if scales.shape != (n, k // GROUP) or k % GROUP:
        raise misshapen(names[1], scales, f"one for every {GROUP} of {k} inputs of {n} outputs")
    one = part(stored, base, factor, torch.float32)
    if one.shape not in ((), (1,)):
        raise misshapen(names[2], one, "one value")

    def grouped(codes: Tensor, scales: Tensor, factor: Tensor) -> Grouped:
        value = 1 / factor if divides else factor
        halves = scales.to(torch.float16) / 2  # codes stand for twice the values
        return Grouped(codes, halves, GROUP, "e2m1", factors=value.reshape(1).expand(n).contiguous())

    meant = replace(weight, dtype=torch.bfloat16, shape=(n, k), form=Form("e2m1", GROUP, factors=True))
    return QuantisedTensor(names, meant, lambda *parts: grouped(*parts).dense(), grouped)
