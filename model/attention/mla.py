"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434 §2.1) in its absorbed form.

Queries are turned into the space of the latents, so that all heads attend over one latent and one rotary key per token:
only these are kept, and values are the latents themselves.
"""

import torch
from torch import Tensor, nn

from model.attention.rope import rotate
from model.layers import RMSNorm
from model.registry import LayerModule, module_for
from model.shapes.attention import MLA
from model.shapes.decoder import DecoderConfig
from model.step import LayerStep, MaskSpec


class MLAAttention(LayerModule):
    """`down` gives latent and rotary key [rank + W, D]; `up` [H·(N + V), rank] makes keys and values of a latent."""

    def __init__(self, shape: MLA, config: DecoderConfig) -> None:
        super().__init__()
        self.shape = shape
        queries = shape.heads * (shape.plain_width + shape.rope.width)
        if shape.query_rank is None:
            self.query = nn.Linear(config.width, queries, bias=False)
        else:
            self.query_down = nn.Linear(config.width, shape.query_rank, bias=shape.bias)
            self.query_norm = RMSNorm(shape.query_rank, shape.norm_eps)
            self.query = nn.Linear(shape.query_rank, queries, bias=False)
        latents = shape.rank + shape.rope.width
        self.down = nn.Linear(config.width, latents, bias=shape.bias)
        self.norm = RMSNorm(shape.rank, shape.norm_eps)
        keys_and_values = shape.heads * (shape.plain_width + shape.value_width)
        self.up = nn.Linear(shape.rank, keys_and_values, bias=False)
        self.out = nn.Linear(shape.heads * shape.value_width, config.width, bias=shape.bias)

    def forward(self, x_TD: Tensor, step: LayerStep) -> Tensor:
        s, tables = self.shape, step.rotary[self.shape.rope]
        turned = s.rope.width
        plain_THN, turned_THW = self._queries(x_TD).split((s.plain_width, turned), dim=-1)
        latent_TR, key_TW = self.down(x_TD).split((s.rank, turned), dim=-1)
        key_T1W = rotate(key_TW[:, None], tables, s.rope)
        k_T1C = torch.cat([self.norm(latent_TR)[:, None], key_T1W], dim=-1)
        up_HXR = self.up.weight.unflatten(0, (s.heads, -1))
        to_keys_HNR, to_values_HVR = up_HXR.split((s.plain_width, s.value_width), 1)
        q_THR = torch.einsum("thn,hnr->thr", plain_THN, to_keys_HNR)
        q_THC = torch.cat([q_THR, rotate(turned_THW, tables, s.rope)], dim=-1)
        mixed_THR = step.attend(q_THC, k_T1C, s.rank, self.mask_spec)
        return self.out(torch.einsum("thr,hvr->thv", mixed_THR, to_values_HVR).flatten(1))

    @property
    def mask_spec(self) -> MaskSpec:
        """What its queries see."""
        s = self.shape
        if s.scale is not None:
            return MaskSpec(s.scale)
        return MaskSpec((s.plain_width + s.rope.width) ** -0.5)

    def _queries(self, x_TD: Tensor) -> Tensor:
        """[T, H, N + W]."""
        if self.shape.query_rank is not None:
            x_TD = self.query_norm(self.query_down(x_TD))
        q_THC: Tensor = self.query(x_TD).unflatten(-1, (self.shape.heads, -1))
        return q_THC


@module_for.register
def _(shape: MLA, decoder: DecoderConfig) -> MLAAttention:
    return MLAAttention(shape, decoder)
