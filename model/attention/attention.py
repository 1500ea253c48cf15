"""Grouped-query attention with everything that the families add to it: norms, clipping, windows, sinks, gates.

Not here: where keys and values are kept (see `LayerStep.attend`).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.attention.rope import rotate
from model.layers import RMSNorm
from model.registry import LayerModule, module_for
from model.shapes.attention import Attention
from model.shapes.decoder import DecoderConfig
from model.step import LayerStep, MaskSpec


class SelfAttention(LayerModule):
    """Query, key and value are one matrix [(H + 2G)·C, D]; with a gate, queries and gates alternate by head: 2H."""

    def __init__(self, shape: Attention, config: DecoderConfig) -> None:
        super().__init__()
        heads, groups, head = shape.heads, shape.kv_heads, shape.head_width
        self.shape = shape
        queries, keys = heads * head, groups * head
        self.sizes = (2 * queries if shape.gated else queries, keys, keys)
        self.qkv = nn.Linear(config.width, sum(self.sizes), bias=shape.bias)
        self.out = nn.Linear(heads * head, config.width, bias=shape.out_bias)
        if shape.qk_norm in ("full", "head"):
            widths = (head, head) if shape.qk_norm == "head" else (queries, keys)
            self.q_norm, self.k_norm = (RMSNorm(width, config.norm_eps, config.norm_offset) for width in widths)
        if shape.sinks:
            self.sinks = nn.Parameter(torch.empty(heads))
        self._eps = config.norm_eps

    def forward(self, x_TD: Tensor, step: LayerStep) -> Tensor:
        shape = self.shape
        q_THC, k_TGC, v_TGC, gate = self.project(x_TD)
        if shape.rope is not None:
            tables = step.rotary[shape.rope]
            q_THC, k_TGC = rotate(q_THC, tables, shape.rope), rotate(k_TGC, tables, shape.rope)
        if shape.qk_norm == "unit":
            q_THC, k_TGC = _unit_norm(q_THC, self._eps), _unit_norm(k_TGC, self._eps)
        if shape.floor_scale is not None:
            steps_T11 = ((step.positions_T.float() + 1) / shape.floor_scale).floor()[:, None, None]
            q_THC = (q_THC * (1 + shape.attn_scale * steps_T11.log1p())).to(q_THC.dtype)
        y_TX = step.attend(q_THC, k_TGC, v_TGC, self.mask_spec).flatten(1)
        return self.out(y_TX if gate is None else y_TX * gate.sigmoid())

    @property
    def mask_spec(self) -> MaskSpec:
        """What its queries see."""
        s = self.shape
        scale = s.head_width**-0.5 if s.scale is None else s.scale
        return MaskSpec(scale, s.window, s.chunk, self.sinks if s.sinks else None, s.causal)

    def project(self, x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Queries [T, H, C], keys and values [T, G, C], normed and clipped as the family asks; the gate [T, H·C]."""
        q, k, v = self.qkv(x_TD).split(self.sizes, dim=-1)
        gate, head = None, (-1, self.shape.head_width)
        if self.shape.gated:
            both_THX = q.unflatten(-1, (self.shape.heads, -1))
            q_THC, gate_THC = both_THX.chunk(2, dim=-1)
            q, gate = q_THC.flatten(1), gate_THC.flatten(1)
        if self.shape.qk_norm == "full":
            q, k = self.q_norm(q), self.k_norm(k)
        if self.shape.clip is not None:
            most = self.shape.clip
            q, k, v = (part.clamp(-most, most) for part in (q, k, v))
        q, k, v = (part.unflatten(-1, head) for part in (q, k, v))
        if self.shape.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k, v, gate


def _unit_norm(x_THC: Tensor, eps: float) -> Tensor:
    """Each head's elements over their root mean square, computed in float32."""
    return F.rms_norm(x_THC.float(), x_THC.shape[-1:], eps=eps).to(x_THC.dtype)


@module_for.register
def _(shape: Attention, decoder: DecoderConfig) -> SelfAttention:
    return SelfAttention(shape, decoder)
