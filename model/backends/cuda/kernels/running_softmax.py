"""Running softmaxes over tiles of keys (Milakov & Gimelshein 2018), the parts of `attend.py` and `latent_attend.py`.

A running softmax is the largest score so far, the total of the weights relative to it, and the values that they weigh.
Loops over tiles compute again what does not change (`disable_licm`): there are not enough registers to hold it. Axes: N
queries and S keys of a tile, C elements of a key, padded.
"""

import triton
import triton.language as tl

from model.backends.cuda.kernels.activation import tanh

LOWEST = tl.constexpr(-1e30)  # below every score, and finite: the difference of two of them is 0


@triton.jit
def seen(key, query, context, window, chunk):
    """Which keys each query sees [S, N]."""
    mask = (key[:, None] <= query[None, :]) & (key[:, None] < context)
    if window > 0:
        mask = mask & (key[:, None] > query[None, :] - window)
    if chunk > 0:
        mask = mask & (key[:, None] // chunk == query[None, :] // chunk)
    return mask


@triton.jit
def add(top, total, mixed, other_top, other_total, other_mixed):
    """Two running softmaxes as one. One that has seen nothing leaves the other's bits as they are."""
    higher = tl.maximum(top, other_top)
    fade, other_fade = tl.exp(top - higher), tl.exp(other_top - higher)
    total = total * fade + other_total * other_fade
    mixed = mixed * fade[None, :] + other_mixed * other_fade[None, :]
    return higher, total, mixed


@triton.jit
def after_tile(top, total, mixed, score, values):
    """The running softmax after one more tile: scores [S, N], minus infinity where a query does not see the key, and
    values [S, C]."""
    higher = tl.maximum(top, tl.max(score, axis=0))
    fade = tl.exp(top - higher)
    weight = tl.exp(score - higher[None, :])
    total = total * fade + tl.sum(weight, axis=0)
    mixed = tl.dot(tl.trans(values), weight.to(values.dtype), mixed * fade[None, :], input_precision="ieee")
    return higher, total, mixed


@triton.jit
def before_first(sinks, head, real, has_sinks: tl.constexpr, N: tl.constexpr):
    """The running softmax before the first key: a sink is a score that adds nothing."""
    top = tl.full([N], LOWEST, tl.float32)
    total = tl.zeros([N], tl.float32)
    if has_sinks:
        top = tl.load(sinks + head, mask=real, other=0.0).to(tl.float32)
        total += 1.0
    return top, total


@triton.jit
def segment_softmax(
    queries,
    cache,
    table,
    query,
    first,
    end,
    context,
    kv_head,
    kv_heads,
    width,
    value_start,
    scale,
    softcap,
    window,
    chunk,
    caps: tl.constexpr,
    page: tl.constexpr,
    N: tl.constexpr,
    C: tl.constexpr,
):
    """Running softmax over the keys from `first` up to `end`: largest score [N], total [N], weighted values [C, N]."""
    top = tl.full([N], LOWEST, tl.float32)
    total = tl.zeros([N], tl.float32)
    mixed = tl.zeros([C, N], tl.float32)
    place = tl.arange(0, C)
    real = place < width
    for start in tl.range(first, end, page, disable_licm=True):
        key = start + tl.arange(0, page)
        block = tl.load(table + start // page).to(tl.int64)
        slot = block * page + tl.arange(0, page)
        at = (slot * kv_heads + kv_head)[:, None] * width + place[None, :]
        there = (key < context)[:, None] & real[None, :]
        k = tl.load(cache + at, mask=there, other=0.0)
        score = tl.dot(k, tl.trans(queries), input_precision="ieee") * scale
        if caps:
            score = softcap * tanh(score / softcap)
        score = tl.where(seen(key, query, context, window, chunk), score, float("-inf"))
        v = tl.load(cache + value_start + at, mask=there, other=0.0)
        top, total, mixed = after_tile(top, total, mixed, score, v)
    return top, total, mixed
