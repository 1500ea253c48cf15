"""Tensors from blocks of ggml: as floats, exactly, and as `Grouped`, exactly or with scales rounded to float16.

It opens no files and knows no names.
"""

from math import prod

import torch
from torch import Tensor
from torch.nn import functional as F

from model.grouped import CODES, Grouped, Values, code_bits, packed_codes
from weights.forms import Form
from weights.gguf.decode import FORMATS, Format, Groups
from weights.gguf.types import BlockType

DENSE = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
CHUNK = 1 << 22  # values that are decoded at once, so that what lies between stays small


def dtype_of(kind: BlockType) -> torch.dtype:
    """One that holds every value of the type."""
    return torch.bfloat16 if kind.name == "MXFP4" else DENSE.get(kind.name, torch.float32)


def dense(kind: BlockType, data_B: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The values, in `dtype_of`; in float32, products and sums are rounded once."""
    if kind.name in DENSE:
        return data_B.view(DENSE[kind.name]).view(shape)
    form = FORMATS[kind.name]
    blocks, result = data_B.view(-1, kind.bytes), torch.empty(shape, dtype=dtype_of(kind))
    step = CHUNK // kind.values
    for part, target in zip(torch.split(blocks, step), torch.split(result.view(-1, kind.values), step), strict=True):
        groups = form.decode(part)
        values = _integers(groups.codes_BGN, form.values) * groups.scales_BG[..., None]
        if groups.minima_BG is not None:
            values += groups.minima_BG[..., None]
        target.copy_(values.flatten(1))
    return result


def _integers(codes: Tensor, values: Values) -> Tensor:
    """What codes stand for, float32."""
    if values in ("bytes", "unsigned"):
        return codes.float()
    if values in ("signed", "signed6"):
        return codes.float() - (8 if values == "signed" else 32)
    return F.embedding(codes.int(), torch.tensor(CODES[values], dtype=torch.float32)[:, None])[..., 0]


def form_of(kind: BlockType, shape: tuple[int, ...]) -> Form | None:
    """Of a tensor as `Grouped`; None where it has no such form."""
    form = FORMATS.get(kind.name)
    if form is None or len(shape) < 2:
        return None
    return Form(form.values, form.group, form.minimum, not form.exact)


def grouped(kind: BlockType, data_B: Tensor, shape: tuple[int, ...]) -> Grouped | None:
    """Matrices [..., n, k] without widening them; None for floats, and for an MXFP4 whose scales of one output span
    more than float16 has."""
    form = FORMATS.get(kind.name)
    if form is None or len(shape) < 2:
        return None
    *batch, k = shape
    rows_RB = data_B.view(prod(batch), -1)
    parts = []
    for part_RB in torch.split(rows_RB, max(1, CHUNK // k)):
        groups = form.decode(part_RB.reshape(-1, kind.bytes))
        codes_RK = groups.codes_BGN.reshape(len(part_RB), k)
        narrow = _narrow(form, groups, len(part_RB))
        if narrow is None:
            return None
        stored = codes_RK if form.values == "bytes" else packed_codes(codes_RK, code_bits(form.values))
        parts.append((stored, *narrow))
    codes, scales, minima, factors = (_joined(part, batch) for part in zip(*parts, strict=True))
    assert codes is not None and scales is not None
    return Grouped(codes, scales, form.group, form.values, minima, None if factors is None else factors[..., 0])


def _joined(parts: tuple[Tensor | None, ...], batch: list[int]) -> Tensor | None:
    """Rows, as [*batch, ...]."""
    given = [part for part in parts if part is not None]
    return torch.cat(given).view(*batch, -1) if given else None


def _narrow(form: Format, groups: Groups, rows: int) -> tuple[Tensor, Tensor | None, Tensor | None] | None:
    """Scales and minima [rows, groups] in float16, and factors [rows, 1].

    Where they are products, or powers of two, a power of two per row brings the largest to 2^11 to 2^12: small ones
    keep the bits that float16 has, and eight times as much is not too large (see `weights/groups.py`).
    """
    scales = groups.scales_BG.reshape(rows, -1)
    minima = None if groups.minima_BG is None else groups.minima_BG.reshape(rows, -1)
    if form.exact:
        return scales.half(), None if minima is None else minima.half(), None
    if form.values == "e2m1":
        used = (groups.codes_BGN & 7).ne(0).any(-1).view(rows, -1)  # a bit that is no sign
        scales = scales.where(used, 0)
    largest = scales.abs().amax(-1, keepdim=True)
    if minima is not None:
        largest = torch.maximum(largest, minima.abs().amax(-1, keepdim=True))
    factors = torch.ldexp(torch.ones_like(largest), torch.frexp(largest).exponent - 12)
    half = (scales / factors).half()
    if form.values == "e2m1" and not torch.equal(half.float() * factors, scales):
        return None
    return half, None if minima is None else (minima / factors).half(), factors
