"""The block of a gated delta net on native kernels: its parameters in the order of csrc/delta.h.

A checkpoint has the outputs of its projections by key head; here they lie by kind, so that the convolution's channels
and each kind's heads are side by side. No requests, no states here.
"""

import torch
from torch import Tensor, nn

from model.attention.gated_delta_net import GatedDeltaNetAttention
from model.backends.cpu.kernels.attention_params import DeltaParams
from model.backends.cpu.kernels.groups import OUTPUTS
from model.backends.cpu.kernels.pack import pack
from model.backends.cpu.layout import rows_of
from model.backends.cpu.weights import Precision, norm_params
from model.shapes.attention import GatedDeltaNet


def delta_block(norm: nn.Module, module: GatedDeltaNetAttention, precision: Precision) -> DeltaParams:
    """Norm, projections, convolution, delta rule, gated norm and output projection."""
    shape = module.shape
    decay_H = -module.log_decay.detach().float().exp()
    step_bias_H = module.step_bias.detach().float()
    head_norm = norm_params(module.norm).weight
    assert head_norm is not None
    return DeltaParams(
        norm=norm_params(norm),
        project=pack(rows_of(module.project.weight, by_kind(shape)), precision.linears),
        rates=pack(_rates(module), precision.base),
        rates_bias=torch.cat([torch.zeros_like(_padded(step_bias_H)), _padded(step_bias_H)]),
        convolution=module.convolution[:, 0].detach().float().T.contiguous(),
        decay=_padded(decay_H),
        head_norm=head_norm,
        out=pack(module.out.weight, precision.linears),
        key_heads=shape.key_heads,
        value_heads=shape.value_heads,
        key_width=shape.key_width,
        value_width=shape.value_width,
    )


def by_kind(shape: GatedDeltaNet) -> Tensor:
    """The outputs of `project`, which lie by key head, in the order queries, keys, values, gates."""
    values = shape.value_heads * shape.value_width
    output_GX = torch.arange(shape.channels + values).unflatten(0, (shape.key_heads, -1))
    per = values // shape.key_heads
    parts = output_GX.split((shape.key_width, shape.key_width, per, per), dim=1)
    return torch.cat([part.flatten() for part in parts])


def _rates(module: GatedDeltaNetAttention) -> Tensor:
    """The rows of `rates`, which lie by key head, in the order β, decay; each padded."""
    by_head = module.rates.weight.detach().unflatten(0, (module.shape.key_heads, -1))
    return torch.cat([_padded(part.flatten(0, 1)) for part in by_head.chunk(2, dim=1)])


def _padded(of_heads: Tensor) -> Tensor:
    """[H, ...] with zeros up to a multiple of 16."""
    return torch.cat([of_heads, of_heads.new_zeros(-len(of_heads) % OUTPUTS, *of_heads.shape[1:])])
