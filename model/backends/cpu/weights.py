"""How a model's weights are kept on native kernels, and its vectors as the ops take them: float32, without gaps."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from model.backends.cpu.kernels.pack import Kind, kind_for
from model.backends.cpu.kernels.params import NO_REPAIR, NormParams, RepairParams
from model.grouped import Grouped
from model.moe.repair import RepairTables
from model.options import Quantize


@dataclass(frozen=True, slots=True)
class Precision:
    """How the weights are kept: the model's own values, or quantised experts, or quantised everywhere but in routers.

    4-bit experts leave 8 bits to the other matrices: 4 bits in attention cost several times what they cost in experts.
    """

    base: Kind
    quantize: Quantize = "none"
    experts_only: bool = True

    @property
    def experts(self) -> Kind:
        assert self.quantize != "fp8-weights"  # refused
        if self.quantize == "int4":
            return "grouped"
        return self.base if self.quantize == "none" else self.quantize

    @property
    def linears(self) -> Kind:
        if self.experts_only:
            return "int8" if self.quantize == "int4" else self.base
        return self.experts


def precision_for(dtype: torch.dtype, quantize: Quantize = "none", experts_only: bool = True) -> Precision:
    """The precision of a model that is loaded in `dtype`."""
    return Precision(kind_for(dtype), quantize, experts_only)


def norm_params(norm: nn.Module) -> NormParams:
    """A norm in float32; none for the identity."""
    if isinstance(norm, nn.Identity):
        return NormParams()
    bias, eps = getattr(norm, "bias", None), float(norm.eps)  # type: ignore[arg-type]
    return NormParams(norm_weight(norm), None if bias is None else floats(bias), eps)


def norm_weight(norm: nn.Module) -> Tensor:
    """A norm's weights as they multiply."""
    return floats(norm.weight) + getattr(norm, "offset", 0.0)


def floats(weight: object) -> Tensor:
    """A vector in float32."""
    assert isinstance(weight, Tensor)
    return weight.detach().float().contiguous()


def bias_of(layer: nn.Linear) -> Tensor | None:
    """A layer's bias in float32, if it has one."""
    return None if layer.bias is None else floats(layer.bias)


def dense(weight: Tensor | Grouped) -> Tensor:
    """The values of a matrix, whatever its form."""
    return weight.dense() if isinstance(weight, Grouped) else weight


def repair_params(tables: RepairTables | None) -> RepairParams:
    """The tables themselves: what is written to them later counts."""
    return NO_REPAIR if tables is None else RepairParams(tables.scale_KD, tables.shift_KD)
