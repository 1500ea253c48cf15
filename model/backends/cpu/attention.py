"""Attention blocks on native kernels: packed weights, as the parameters that their ops take.

Each is made from the plain-torch module that defines it, whose values it computes. The kernels know one layout of
rotary pairs, (i, i + W / 2): where pairs are neighbours, the rows that make queries and keys are reordered here.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from model.attention.attention import SelfAttention
from model.attention.gated_delta_net import GatedDeltaNetAttention
from model.attention.mla import MLAAttention
from model.attention.rope import rotary_tables
from model.backends.cpu.delta import delta_block
from model.backends.cpu.kernels.attention_params import AttentionParams, LatentParams, MaskParams
from model.backends.cpu.kernels.pack import pack
from model.backends.cpu.kernels.params import BlockParams, NormParams
from model.backends.cpu.layout import padded, rows_of
from model.backends.cpu.weights import Precision, bias_of, floats, norm_params, norm_weight
from model.grouped import Grouped
from model.shapes.attention import MLA, Attention
from model.shapes.rope import Rope


def block_of(norm: nn.Module, module: nn.Module, tables: "Tables", precision: Precision, scale: float) -> BlockParams:
    """The first block of a layer: attention of whatever kind, or what it has in its place. `scale`: of what it adds."""
    if isinstance(module, GatedDeltaNetAttention):
        return delta_block(norm, module, precision)
    if isinstance(module, MLAAttention):
        return latent_block(norm, module, tables, precision, scale)
    assert isinstance(module, SelfAttention)
    return attention_block(norm, module, tables, precision, scale)


def attention_block(
    norm: nn.Module, module: SelfAttention, tables: "Tables", precision: Precision, scale: float
) -> AttentionParams:
    """Norm, queries, keys and values, rotary positions, cache, attention and output projection."""
    shape, spec, rows = module.shape, module.mask_spec, _rows(module.shape)
    sinks = None if spec.sinks_H is None else floats(spec.sinks_H)
    bias = bias_of(module.qkv)
    q_norm, k_norm = _head_norms(module)
    return AttentionParams(
        norm=norm_params(norm),
        qkv=pack(rows_of(module.qkv.weight, rows), precision.linears),
        qkv_bias=None if bias is None else bias[rows],
        q_norm=q_norm,
        k_norm=k_norm,
        norm_per_head=shape.qk_norm in ("head", "unit"),
        norm_after_rotary=shape.qk_norm == "unit",
        clip=shape.clip or 0.0,
        rotary=None if shape.rope is None else tables.rotary(shape.rope),
        query_scale=tables.query_scale(shape),
        gated=shape.gated,
        out=pack(module.out.weight, precision.linears),
        out_bias=bias_of(module.out),
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_width=shape.head_width,
        mask=MaskParams(spec.scale, spec.window, spec.chunk, sinks=sinks),
        residual_scale=scale,
    )


class Tables:
    """What a decoder's layers look up by position, made once for all layers that use the same. `length` positions."""

    def __init__(self, length: int) -> None:
        self._length = length
        self._rotary: dict[Rope, Tensor] = {}
        self._scales: dict[tuple[float, float], Tensor] = {}

    def rotary(self, rope: Rope) -> Tensor:
        """See `rotary_table`."""
        if rope not in self._rotary:
            self._rotary[rope] = rotary_table(rope, self._length)
        return self._rotary[rope]

    def query_scale(self, shape: Attention) -> Tensor | None:
        """What the queries of every position are multiplied by, float32; none: they stay."""
        if shape.floor_scale is None:
            return None
        key = (shape.floor_scale, shape.attn_scale)
        if key not in self._scales:
            steps_P = (torch.arange(1, self._length + 1).float() / shape.floor_scale).floor()
            self._scales[key] = 1 + shape.attn_scale * steps_P.log1p()
        return self._scales[key]


def latent_block(
    norm: nn.Module, module: MLAAttention, tables: Tables, precision: Precision, scale: float
) -> LatentParams:
    """Norm, latents and queries, cache, attention over latents, values of each head and output projection."""
    shape, spec, low, rows = module.shape, module.mask_spec, module.shape.query_rank, _latent_rows(module.shape)
    down, down_bias = module.down.weight, bias_of(module.down)
    if low is not None:  # one matrix for both
        down = torch.cat([dense(module.query_down.weight), dense(down)])
        bias = bias_of(module.query_down)
        down_bias = None if bias is None or down_bias is None else torch.cat([bias, down_bias])
    to_keys_HRN, to_values_HVR = _by_head(module)
    return LatentParams(
        norm=norm_params(norm),
        query_norm=NormParams() if low is None else norm_params(module.query_norm),
        latent_norm=norm_params(module.norm),
        down=pack(rows_of(down, rows), precision.linears),
        down_bias=None if down_bias is None else padded(down_bias[rows]),
        query=pack(rows_of(module.query.weight, _query_rows(shape)), precision.linears),
        to_keys=pack(to_keys_HRN, precision.linears),
        to_values=pack(to_values_HVR, precision.linears),
        out=pack(module.out.weight, precision.linears),
        out_bias=bias_of(module.out),
        rotary=tables.rotary(shape.rope),
        heads=shape.heads,
        query_rank=low or 0,
        rank=shape.rank,
        plain_width=shape.plain_width,
        value_width=shape.value_width,
        mask=MaskParams(spec.scale),
        residual_scale=scale,
    )


def rotary_table(rope: Rope, length: int) -> Tensor:
    """Cosines and sines of every position, [positions, 2, W / 2], float32; one of each pair's two equal angles."""
    cos_P1W, sin_P1W = rotary_tables(torch.arange(length), replace(rope, interleaved=False))
    half = rope.width // 2
    halves = [cos_P1W[..., :half], sin_P1W[..., :half]]
    return torch.cat(halves, dim=1).contiguous()


def rotary_order(rope: Rope | None, width: int) -> Tensor:
    """Which element of a head of `width` the kernels have in each place: halves of pairs apart, the others behind."""
    if rope is None or not rope.interleaved:
        return torch.arange(width)
    pairs = torch.arange(rope.width).view(-1, 2)
    return torch.cat([pairs.T.flatten(), torch.arange(rope.width, width)])


def dense(weight: Tensor | Grouped) -> Tensor:
    """The matrix itself."""
    return weight.dense() if isinstance(weight, Grouped) else weight


def _latent_rows(shape: MLA) -> Tensor:
    """The rows of `query_down` and `down` as the kernels read them."""
    before = (shape.query_rank or 0) + shape.rank
    return torch.cat([torch.arange(before), before + rotary_order(shape.rope, shape.rope.width)])


def _query_rows(shape: MLA) -> Tensor:
    """The rows of `query` as the kernels read them."""
    head = shape.plain_width + shape.rope.width
    turned = shape.plain_width + rotary_order(shape.rope, shape.rope.width)
    head_rows = torch.cat([torch.arange(shape.plain_width), turned])
    return (torch.arange(shape.heads)[:, None] * head + head_rows).flatten()


def _by_head(module: MLAAttention) -> tuple[Tensor, Tensor]:
    """What turns a head's query into the space of latents [H, rank, N], and latents into its value [H, V, rank]."""
    shape = module.shape
    up_HXR = dense(module.up.weight).unflatten(0, (shape.heads, -1))
    to_keys_HNR, to_values_HVR = up_HXR.split((shape.plain_width, shape.value_width), 1)
    return to_keys_HNR.transpose(1, 2), to_values_HVR


def _rows(shape: Attention) -> Tensor:
    """The rows of `SelfAttention.qkv` as the kernels read them: queries, keys, values, and then gates."""
    order_C, head = rotary_order(shape.rope, shape.head_width), shape.head_width
    step = 2 * head if shape.gated else head
    query_H1 = torch.arange(shape.heads)[:, None] * step
    key_G1 = shape.heads * step + torch.arange(shape.kv_heads)[:, None] * head
    value_X = shape.heads * step + shape.kv_heads * head + torch.arange(shape.kv_heads * head)
    rows = [(query_H1 + order_C).flatten(), (key_G1 + order_C).flatten(), value_X]
    gates = [(query_H1 + head + torch.arange(head)).flatten()] if shape.gated else []
    return torch.cat(rows + gates)


def _head_norms(module: SelfAttention) -> tuple[Tensor | None, Tensor | None]:
    """The weights of the norms of queries and keys, in the kernels' order of a head's elements."""
    shape, order_C = module.shape, rotary_order(module.shape.rope, module.shape.head_width)
    if shape.qk_norm == "none":
        return None, None
    if shape.qk_norm == "unit":
        ones_C = torch.ones(shape.head_width)
        return ones_C, ones_C
    both = (norm_weight(norm).unflatten(0, (-1, shape.head_width)) for norm in (module.q_norm, module.k_norm))
    q_norm, k_norm = (weight_HC[:, order_C].flatten() for weight_HC in both)
    return q_norm, k_norm
