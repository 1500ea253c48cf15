"""FP8 matrices kept in 8 bits: integers in groups. It does not depend on a checkpoint format."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from model.grouped import Grouped
from weights.files import Stored
from weights.forms import Form, group_within
from weights.quantised.scales import halved
from weights.quantised.tensor import QuantisedTensor

Scaled = Callable[..., Tensor]


def fp8_tensor(names: tuple[str, ...], weight: Stored, scaled: Scaled) -> QuantisedTensor:
    """A tensor of FP8 that `scaled` computes in float32 from the stored ones.

    Kept in groups its values are rounded to 255 steps of the group's largest, which is finer than FP8's own steps of
    large values.
    """
    k = weight.shape[-1]
    group = group_within(k, k)
    form = None if group is None else Form("bytes", group, factors=True)
    meant = Stored(weight.file, weight.start, weight.dtype, weight.shape, form)
    kept = None if group is None else partial(_grouped, scaled, group)
    return QuantisedTensor(names, meant, scaled, kept)


def _grouped(scaled: Scaled, group: int, *parts: Tensor) -> Grouped:
    return in_bytes(scaled(*parts), group)


def in_bytes(values: Tensor, group: int) -> Grouped:
    """Matrices [..., n, k] rounded to integers up to 127 times a scale per group."""
    split = values.reshape(*values.shape[:-1], values.shape[-1] // group, group)
    scales, _, factors = halved(split.abs().amax(-1) / 127)
    steps = scales.float() if factors is None else scales.float() * factors[..., None]
    divisors = steps.where(steps > 0, 1.0)
    codes = (split / divisors[..., None]).round().clamp(-127, 127).to(torch.int8).flatten(-2)
    return Grouped(codes, scales, group, "bytes", factors=factors)
