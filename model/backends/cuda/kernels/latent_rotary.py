"""Latent attention between its projections and attention: the norm of the latent, rotary positions, the cache write.

A program has one head of one token, whose rotary part it turns, or the token's latent and rotary key, which it writes
to the token's slot. Axes in kernels: R elements of a latent and W of a rotary part, padded to powers of two.
"""

import triton
import triton.language as tl
from torch import Tensor

from model.backends.cuda.kernels.norm import Norm, normed
from model.backends.cuda.kernels.rotary import partner_of
from model.shapes.attention import MLA
from model.step import Tables


@triton.jit
def _turned(row, cosines, sines, place, real, turned, interleaved: tl.constexpr):
    """A rotary part at its token's position. `cosines` and `sines` are those of the token."""
    partner, sign = partner_of(place, turned, interleaved)
    value = tl.load(row + place, mask=real, other=0.0).to(tl.float32)
    other = tl.load(row + partner, mask=real, other=0.0).to(tl.float32)
    cosine = tl.load(cosines + place, mask=real, other=1.0).to(tl.float32)
    sine = tl.load(sines + place, mask=real, other=0.0).to(tl.float32)
    return value * cosine + sign * other * sine


@triton.jit
def _latent_rotary(
    queries,
    latents,
    norm_weight,
    cosines,
    sines,
    slots,
    query_out,
    cache,
    heads,
    plain,
    rank,
    turned,
    eps,
    interleaved: tl.constexpr,
    R: tl.constexpr,
    W: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    place, turned_place = tl.arange(0, R), tl.arange(0, W)
    real, turned_real = place < rank, turned_place < turned
    cosines += token * turned
    sines += token * turned
    width = rank + turned
    if head < heads:
        row = token * heads + head
        part = queries + row * (plain + turned) + plain
        value = _turned(part, cosines, sines, turned_place, turned_real, turned, interleaved)
        at = query_out + row * width + rank + turned_place
        tl.store(at, value.to(query_out.dtype.element_ty), mask=turned_real)
    else:
        slot = tl.load(slots + token)
        latent_row = latents + token * width
        latent = tl.load(latent_row + place, mask=real, other=0.0).to(tl.float32)
        latent = normed(latent, norm_weight, norm_weight, place, real, rank, eps, 0.0, False, False)
        tl.store(cache + slot * width + place, latent.to(cache.dtype.element_ty), mask=real & (slot >= 0))
        key = _turned(latent_row + rank, cosines, sines, turned_place, turned_real, turned, interleaved)
        at = cache + slot * width + rank + turned_place
        tl.store(at, key.to(cache.dtype.element_ty), mask=turned_real & (slot >= 0))


def latent_rotary(
    q_TX: Tensor,
    latent_TC: Tensor,
    shape: MLA,
    norm: Norm,
    tables: Tables,
    slots_T: Tensor,
    q_THC: Tensor,
    cache_PSGC: Tensor,
) -> None:
    """Write the rotary part of each query to the last columns of `q_THC`, and the normed latent and the rotary key to
    the token's slot of the cache [1, slots, 1, C].

    `q_TX` has a plain and a rotary part for each head, `latent_TC` a latent and a rotary key. A token whose slot is -1
    writes nothing to the cache.
    """
    expected = (1, cache_PSGC.shape[1], 1, shape.rank + shape.rope.width)
    if cache_PSGC.shape != expected:
        raise ValueError(f"the cache must be {list(expected)}, got {list(cache_PSGC.shape)}")
    _latent_rotary[(len(q_TX), shape.heads + 1)](
        q_TX,
        latent_TC,
        norm.weight_D,
        *tables,
        slots_T,
        q_THC,
        cache_PSGC,
        shape.heads,
        shape.plain_width,
        shape.rank,
        shape.rope.width,
        norm.eps,
        interleaved=shape.rope.interleaved,
        R=triton.next_power_of_2(shape.rank),
        W=triton.next_power_of_2(shape.rope.width),
        num_warps=1,
        enable_fp_fusion=False,
    )
