"""Queries, keys and values between the projection and attention: norms of heads, rotary positions, and the cache write.

Keys and values go to the slot of their token in pages of the cache. A program has one head of one token, so that its
sums are the same in any batch; a norm over all heads is computed by each of them. Axes in kernels: C elements of a
head, F those of all heads that are normed together, padded to powers of two.
"""

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from model.shapes.attention import Attention


@dataclass(frozen=True, slots=True)
class HeadNorms:
    """Norms of queries and keys. Weights have the width of one head or, `full`, of all; None: no norm.

    `unit`: each head over its root mean square after the rotation, without weights.
    """

    query: Tensor | None = None
    key: Tensor | None = None
    eps: float = 1e-6
    offset: float = 0.0
    full: bool = False
    unit: bool = False


@triton.jit
def _clipped(value, most, clips: tl.constexpr):
    return tl.minimum(tl.maximum(value, -most), most) if clips else value


@triton.jit
def partner_of(place, turned, interleaved: tl.constexpr):
    """The other element of each pair that turns together, and the sign of its part."""
    if interleaved:
        partner = place ^ 1
        sign = tl.where(place % 2 == 0, -1.0, 1.0)
    else:
        partner = tl.where(place < turned // 2, place + turned // 2, place - turned // 2)
        sign = tl.where(place < turned // 2, -1.0, 1.0)
    return partner, sign


@triton.jit
def _normed(
    value, other, row, weight, weight_at, together, place, partner, real, turns, width, eps, offset,
    norm: tl.constexpr, F: tl.constexpr
):  # fmt: skip
    """A head's elements and their partners after the norm, whose row begins at `row` and has `together` elements."""
    if norm == "full":
        all_of = tl.arange(0, F)
        elements = tl.load(row + all_of, mask=all_of < together, other=0.0).to(tl.float32)
        square = tl.sum(elements * elements, axis=0) / together
    else:
        square = tl.sum(value * value, axis=0) / width
    root = tl.sqrt(square + eps)
    scale = tl.load(weight + weight_at + place, mask=real, other=0.0).to(tl.float32) + offset
    other_scale = tl.load(weight + weight_at + partner, mask=turns, other=0.0).to(tl.float32) + offset
    return value / root * scale, other / root * other_scale


@triton.jit
def _rotary(
    qkv,
    query_norm,
    key_norm,
    cosines,
    sines,
    positions,
    slots,
    query_out,
    cache,
    heads,
    kv_heads,
    width,
    turned,
    eps,
    offset,
    clip,
    floor_scale,
    attn_scale,
    value_start,
    norm: tl.constexpr,
    rotates: tl.constexpr,
    interleaved: tl.constexpr,
    unit: tl.constexpr,
    clips: tl.constexpr,
    gated: tl.constexpr,
    grows: tl.constexpr,
    C: tl.constexpr,
    F: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    place = tl.arange(0, C)
    real = place < width
    turns = place < turned
    is_query = head < heads
    is_value = head >= heads + kv_heads
    row = qkv + token * (heads + 2 * kv_heads) * width
    at = row + head * width
    if gated:  # the gate of each query lies behind it
        row += token * heads * width
        at = row + (head + tl.minimum(head, heads)) * width
    partner, sign = partner_of(place, turned, interleaved)
    value = tl.load(at + place, mask=real, other=0.0).to(tl.float32)
    other = tl.load(at + partner, mask=turns, other=0.0).to(tl.float32)
    if norm != "full" or is_value:
        value = _clipped(value, clip, clips)
        other = _clipped(other, clip, clips)
    if not is_value:
        if norm != "none":
            first = tl.where(is_query, 0, heads)
            together = tl.where(is_query, heads, kv_heads) * width
            weight_at = (head - first) * width if norm == "full" else 0
            weight = query_norm if is_query else key_norm
            value, other = _normed(
                value, other, row + first * width, weight, weight_at, together, place, partner, real, turns, width,
                eps, offset, norm, F
            )  # fmt: skip
            if norm == "full":
                value = _clipped(value, clip, clips)
                other = _clipped(other, clip, clips)
        if rotates:
            cosine = tl.load(cosines + token * turned + place, mask=turns, other=1.0).to(tl.float32)
            sine = tl.load(sines + token * turned + place, mask=turns, other=0.0).to(tl.float32)
            value = tl.where(turns, value * cosine + sign * other * sine, value)
        if unit:
            value = value / tl.sqrt(tl.sum(value * value, axis=0) / width + eps)
    if is_query:
        if grows:
            steps = tl.floor(tl.div_rn(tl.load(positions + token).to(tl.float32) + 1.0, floor_scale))
            value *= 1.0 + attn_scale * tl.log(1.0 + steps)
        out_at = (token * heads + head) * width
        tl.store(query_out + out_at + place, value.to(query_out.dtype.element_ty), mask=real)
    else:
        slot = tl.load(slots + token)
        kv_head = tl.where(is_value, head - heads - kv_heads, head - heads)
        cache_at = (slot * kv_heads + kv_head) * width + tl.where(is_value, value_start, 0)
        tl.store(cache + cache_at + place, value.to(cache.dtype.element_ty), mask=real & (slot >= 0))


def rotary(
    qkv_TX: Tensor,
    shape: Attention,
    norms: HeadNorms,
    tables: tuple[Tensor, Tensor] | None,
    slots_T: Tensor,
    q_THC: Tensor,
    cache_PSGC: Tensor,
    positions_T: Tensor | None = None,
) -> None:
    """Write queries to `q_THC`, and keys and values to the tokens' slots of the cache [2, slots, G, C].

    `qkv_TX` has queries, keys and values of a token side by side; with a gate, it lies behind each query. `tables` are
    cosines and sines [T, 1, W] as `rotary_tables` makes them. A token whose slot is -1 writes nothing to the cache.
    Positions are asked for where queries grow with them (`floor_scale`).
    """
    _check(shape, norms, cache_PSGC, positions_T)
    tokens, width = len(qkv_TX), shape.head_width
    turned = 0 if shape.rope is None else shape.rope.width
    cosines, sines = (q_THC, q_THC) if tables is None else tables
    kind = "none" if norms.query is None else "full" if norms.full else "head"
    _rotary[(tokens, shape.heads + 2 * shape.kv_heads)](
        qkv_TX,
        q_THC if norms.query is None else norms.query,
        q_THC if norms.key is None else norms.key,
        cosines,
        sines,
        slots_T if positions_T is None else positions_T,
        slots_T,
        q_THC,
        cache_PSGC,
        shape.heads,
        shape.kv_heads,
        width,
        turned,
        norms.eps,
        norms.offset,
        0.0 if shape.clip is None else shape.clip,
        1.0 if shape.floor_scale is None else float(shape.floor_scale),
        float(shape.attn_scale),
        cache_PSGC[0].numel(),
        norm=kind,
        rotates=turned > 0,
        interleaved=shape.rope is not None and shape.rope.interleaved,
        unit=norms.unit,
        clips=shape.clip is not None,
        gated=shape.gated,
        grows=shape.floor_scale is not None,
        C=triton.next_power_of_2(width),
        F=triton.next_power_of_2(width * shape.heads),
        num_warps=4 if kind == "full" else 1,
        enable_fp_fusion=False,
    )


def _check(shape: Attention, norms: HeadNorms, cache_PSGC: Tensor, positions_T: Tensor | None) -> None:
    if shape.floor_scale is not None and positions_T is None:
        raise ValueError("queries that grow with their position need positions")
    if shape.gated and norms.full:
        raise NotImplementedError("a norm over all heads beside gates has no kernel")
    expected = (2, cache_PSGC.shape[1], shape.kv_heads, shape.head_width)
    if cache_PSGC.shape != expected:
        raise ValueError(f"the cache must be {list(expected)}, got {list(cache_PSGC.shape)}")
