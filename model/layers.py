"""The parts of a decoder that are not mixtures: norms, dense feed-forward, rotary positions, self-attention.

Attention computes queries, keys and values; where keys and values are kept is behind `Attend`.
"""

from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.activation import activate
from model.config import DecoderConfig, Dense


class Attend(Protocol):
    """Causal attention of this step's queries over everything their sequences have seen."""

    def __call__(self, layer: int, q_THC: Tensor, k_TGC: Tensor, v_TGC: Tensor) -> Tensor:
        """Returns [T, H, C]. Keys and values of this step are included; G divides H."""


class RMSNorm(nn.Module):
    """x / rms(x) · weight, computed in float32 (Zhang & Sennrich 2019)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * F.rms_norm(x.float(), (x.shape[-1],), eps=self.eps).to(x.dtype)


def norm_layer(config: DecoderConfig) -> nn.Module:
    """The norm that this decoder uses everywhere."""
    if config.norm == "rms":
        return RMSNorm(config.width, config.norm_eps)
    return nn.LayerNorm(config.width, config.norm_eps)


class DenseFFN(nn.Module):
    """Plain or gated feed-forward layer; gate and up are one matrix [2F, D]."""

    def __init__(self, width: int, config: Dense) -> None:
        super().__init__()
        self.config = config
        self.up = nn.Linear(width, config.width * (2 if config.gated else 1), bias=config.bias)
        self.down = nn.Linear(config.width, width, bias=config.bias)

    def forward(self, x_TD: Tensor) -> Tensor:
        h_TF = self.up(x_TD)
        if not self.config.gated:
            return self.down(activate(h_TF, self.config.activation))
        gate_TF, up_TF = h_TF.chunk(2, dim=-1)
        return self.down(activate(gate_TF, self.config.activation) * up_TF)


def rotary_tables(positions_T: Tensor, head_width: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines [T, 1, C], float32, in the half-split layout (Su et al. 2021, as transformers stores it)."""
    exponent_c = torch.arange(0, head_width, 2, device=positions_T.device).float() / head_width
    angle_Tc = positions_T[:, None].float() / theta**exponent_c
    angle_TC = torch.cat([angle_Tc, angle_Tc], dim=-1)
    return angle_TC.cos()[:, None], angle_TC.sin()[:, None]


def rotate(x_THC: Tensor, cos_T1C: Tensor, sin_T1C: Tensor) -> Tensor:
    """Turn each (i, i + C/2) pair by its position's angle."""
    first, second = x_THC.chunk(2, dim=-1)
    turned_THC = torch.cat([-second, first], dim=-1)
    return x_THC * cos_T1C.to(x_THC.dtype) + turned_THC * sin_T1C.to(x_THC.dtype)


class SelfAttention(nn.Module):
    """Grouped-query attention; query, key and value are one matrix [(H + 2G)·C, D]."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        heads, groups, head = config.heads, config.kv_heads, config.head_width
        self.config = config
        self.sizes = (heads * head, groups * head, groups * head)
        self.qkv = nn.Linear(config.width, sum(self.sizes), bias=config.attention_bias)
        self.out = nn.Linear(heads * head, config.width, bias=config.attention_bias)
        if config.qk_norm == "full":
            self.q_norm = RMSNorm(heads * head, config.norm_eps)
            self.k_norm = RMSNorm(groups * head, config.norm_eps)

    def forward(self, x_TD: Tensor, rotary: tuple[Tensor, Tensor] | None, layer: int, attend: Attend) -> Tensor:
        q_THC, k_TGC, v_TGC = self.project(x_TD)
        if rotary is not None:
            q_THC, k_TGC = rotate(q_THC, *rotary), rotate(k_TGC, *rotary)
        return self.out(attend(layer, q_THC, k_TGC, v_TGC).flatten(1))

    def project(self, x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [T, H, C], keys and values [T, G, C], normed and clipped as the family asks."""
        q, k, v = self.qkv(x_TD).split(self.sizes, dim=-1)
        if self.config.qk_norm == "full":
            q, k = self.q_norm(q), self.k_norm(k)
        if self.config.clip_qkv is not None:
            q, k, v = (part.clamp(-self.config.clip_qkv, self.config.clip_qkv) for part in (q, k, v))
        head = (-1, self.config.head_width)
        return q.unflatten(-1, head), k.unflatten(-1, head), v.unflatten(-1, head)
