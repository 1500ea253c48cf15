"""Norms and dense feed-forward layers."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.activation import activate, activate_gated
from model.registry import LayerModule, module_for
from model.shapes.decoder import DecoderConfig
from model.shapes.mixtures import Dense
from model.step import LayerStep


class RMSNorm(nn.Module):
    """x / rms(x) · (offset + weight), computed in float32 (Zhang & Sennrich 2019)."""

    def __init__(self, width: int, eps: float, offset: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps, self.offset = eps, offset

    def forward(self, x: Tensor) -> Tensor:
        normed = F.rms_norm(x.float(), (x.shape[-1],), eps=self.eps)
        if self.offset:
            return (normed * (self.offset + self.weight.float())).to(x.dtype)
        return self.weight * normed.to(x.dtype)


def norm_layer(config: DecoderConfig) -> nn.Module:
    """The norm that this decoder uses around its layers."""
    if config.norm == "rms":
        return RMSNorm(config.width, config.norm_eps, config.norm_offset)
    return nn.LayerNorm(config.width, config.norm_eps)


class DenseFFN(LayerModule):
    """Plain or gated feed-forward layer; gate and up are one matrix [2F, D]."""

    def __init__(self, width: int, config: Dense) -> None:
        super().__init__()
        self.config = config
        self.up = nn.Linear(width, config.width * (2 if config.gated else 1), bias=config.bias)
        self.down = nn.Linear(config.width, width, bias=config.bias)

    def forward(self, x_TD: Tensor, step: LayerStep | None = None) -> Tensor:
        h_TF = self.up(x_TD)
        if not self.config.gated:
            return self.down(activate(h_TF, self.config.activation))
        gate_TF, up_TF = h_TF.chunk(2, dim=-1)
        return self.down(activate_gated(gate_TF, up_TF, self.config.activation))


@module_for.register
def _(shape: Dense, decoder: DecoderConfig) -> DenseFFN:
    return DenseFFN(decoder.width, shape)
