"""Residual additions and the norm that follows them, in one pass over a row; RMS norm and layer norm.

The residual is kept as its tensor's dtype says. A program holds one whole row, so that its sums are the same in any
batch. Axes in kernels: D elements of a row, padded to a power of two.
"""

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from model.backends.cuda.kernels.repair import Repair, repaired


@dataclass(frozen=True, slots=True)
class Norm:
    """x / rms(x) · (offset + weight), or layer norm: (x - mean) / deviation · weight + bias."""

    weight_D: Tensor
    eps: float
    bias_D: Tensor | None = None
    offset: float = 0.0
    layer: bool = False

    @property
    def modes(self) -> dict[str, bool]:
        """What the kernels are compiled for."""
        return {"layer": self.layer, "has_bias": self.bias_D is not None}


@triton.jit
def normed(row, weight, bias, place, real, width, eps, offset, layer: tl.constexpr, has_bias: tl.constexpr):
    """The norm of one row of float32 values, which are 0 beyond its width."""
    if layer:
        row = tl.where(real, row - tl.sum(row, axis=0) / width, 0.0)
    square = tl.sum(row * row, axis=0) / width
    scale = tl.load(weight + place, mask=real, other=0.0).to(tl.float32) + offset
    out = row / tl.sqrt(square + eps) * scale
    if has_bias:
        out += tl.load(bias + place, mask=real, other=0.0).to(tl.float32)
    return out


@triton.jit
def _residual_norm(
    residual,
    update,
    weight,
    bias,
    out,
    wanted,
    counts,
    scales,
    shifts,
    width,
    eps,
    offset,
    scale,
    has_update: tl.constexpr,
    repairs: tl.constexpr,
    layer: tl.constexpr,
    has_bias: tl.constexpr,
    D: tl.constexpr,
):
    place = tl.arange(0, D)
    real = place < width
    token = tl.program_id(0).to(tl.int64)
    at = token * width + place
    row = tl.load(residual + at, mask=real, other=0.0).to(tl.float32)
    if has_update:
        added = tl.load(update + at, mask=real, other=0.0).to(tl.float32)
        if repairs:
            added = repaired(added, wanted, counts, scales, shifts, token, place, real, width)
        row += scale * added
        stored = row.to(residual.dtype.element_ty)
        tl.store(residual + at, stored, mask=real)
        row = stored.to(tl.float32)
    done = normed(row, weight, bias, place, real, width, eps, offset, layer, has_bias)
    tl.store(out + at, done.to(out.dtype.element_ty), mask=real)


def warps_for(width: int) -> int:
    """Warps of a program that holds a row: a thread has at most 16 of its elements, where a program can be so large."""
    return max(1, min(16, triton.next_power_of_2(width) // 512))


def residual_norm(
    x_TD: Tensor,
    norm: Norm,
    out_TD: Tensor,
    update_TD: Tensor | None = None,
    scale: float = 1.0,
    repair: Repair | None = None,
) -> None:
    """Add scale · update to the residual `x_TD`, in place, and write its norm to `out_TD`. `repair` comes first."""
    tokens, width = x_TD.shape
    _residual_norm[(tokens,)](
        x_TD,
        x_TD if update_TD is None else update_TD,
        norm.weight_D,
        norm.weight_D if norm.bias_D is None else norm.bias_D,
        out_TD,
        *((x_TD,) * 4 if repair is None else repair.arguments()),
        width,
        norm.eps,
        norm.offset,
        scale,
        has_update=update_TD is not None,
        repairs=repair is not None,
        **norm.modes,
        D=triton.next_power_of_2(width),
        num_warps=warps_for(width),
        enable_fp_fusion=False,
    )
