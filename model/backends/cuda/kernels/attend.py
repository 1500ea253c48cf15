"""Attention over pages of 64 keys, one kernel for decoding and for chunks of a prompt.

Keys are cut into segments of 1,024, counted from position 0, and a segment into tiles of 64 in order. Each segment has
a running softmax of its own; segments are merged in order, by one program that runs them in turn or, where queries are
few, by `merge` after programs that ran them side by side. What a query does not see changes nothing in either. So a
query's result depends on its position and its past alone. Keys are the wide side of every product. Not here: latent
attention, whose values are a part of its keys (see `latent_attend.py`).

Axes in kernels: N queries of a tile (of all heads that share keys), S keys of a tile, C elements of a key, padded.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.backends.cuda.kernels.running_softmax import add, before_first, segment_softmax
from model.step import MaskSpec

PAGE = 64  # keys of a block of the cache, and of a tile
SEGMENT = 1024
PROGRAMS = 264  # as in `gemm.py`
MAX_PARTS = 1 << 26  # float32 values of segments that wait to be merged: 256 MB
WIDEST = 256  # elements of a head
MAX_QUERIES = 32  # of a tile, all heads counted: with more, a program's two running softmaxes spill


@dataclass(frozen=True, slots=True)
class QueryTiles:
    """Which queries a program takes: up to `rows` neighbouring tokens of one sequence."""

    sequence_N: Tensor  # int32; -1: the tile is empty
    first_N: Tensor  # int32: its first token, counted within the sequence's span
    rows: int


@triton.jit
def queries_of(tile, sequence, tile_first, spans, lane, shared, rows: tl.constexpr):
    """Of each lane of a tile: whether it is a query, its token and its position. And the sequence's context.

    Lanes are tokens, and within a token its `shared` heads.
    """
    offset = tl.load(tile_first + tile) + lane // shared
    span_first = tl.load(spans + sequence * 3).to(tl.int32)
    span_rows = tl.load(spans + sequence * 3 + 1).to(tl.int32)
    context = tl.load(spans + sequence * 3 + 2).to(tl.int32)
    real = (lane < rows * shared) & (offset < span_rows)
    return real, (span_first + offset).to(tl.int64), context - span_rows + offset, context


@triton.jit
def _keys_of(query, real, window, chunk, page: tl.constexpr):
    """From which key, the first of a tile, and up to which the queries of a program see any."""
    last = tl.max(tl.where(real, query, -1), axis=0) + 1
    oldest = tl.min(tl.where(real, query, last), axis=0)
    begin = 0
    if window > 0:
        begin = tl.maximum(oldest - window + 1, 0)
    if chunk > 0:
        begin = tl.maximum(begin, oldest // chunk * chunk)
    return begin // page * page, last


@triton.jit
def store_part(tops, totals, mixes, row, place, width, real, mask, top, total, mixed):
    """Write the running softmax of one segment for `merge`. `row` is that of each query [N], `mask` has [N, C].

    Where a query has seen nothing, its total says so, and nothing else is written: the host's bound of the contexts may
    be far above them.
    """
    tl.store(tops + row, top, mask=real)
    tl.store(totals + row, total, mask=real)
    has_seen = mask & (total > 0)[:, None]
    tl.store(mixes + row[:, None] * width + place[None, :], tl.trans(mixed), mask=has_seen)


@triton.jit
def _attend(
    q,
    cache,
    tables,
    spans,
    sinks,
    gates,
    out,
    tops,
    totals,
    mixes,
    tile_sequence,
    tile_first,
    tokens,
    heads,
    kv_heads,
    width,
    blocks,
    value_start,
    gate_token,
    gate_head,
    scale,
    softcap,
    window,
    chunk,
    segment_size,
    split: tl.constexpr,
    has_sinks: tl.constexpr,
    is_gated: tl.constexpr,
    caps: tl.constexpr,
    rows: tl.constexpr,
    page: tl.constexpr,
    N: tl.constexpr,
    C: tl.constexpr,
):
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    sequence = tl.load(tile_sequence + tile)
    if sequence < 0:
        return
    shared = heads // kv_heads
    lane = tl.arange(0, N)
    real, token, query, context = queries_of(tile, sequence, tile_first, spans, lane, shared, rows)
    head = kv_head * shared + lane % shared
    place = tl.arange(0, C)
    q_row = (token * heads + head)[:, None]
    q_at = q_row * width + place[None, :]
    q_real = real[:, None] & (place < width)[None, :]
    queries = tl.load(q + q_at, mask=q_real, other=0.0).to(cache.dtype.element_ty)
    begin, last = _keys_of(query, real, window, chunk, page)
    table = tables + sequence * blocks
    if split:
        segment = tl.program_id(2)
        first = tl.maximum(segment * segment_size, begin)
        end = tl.minimum((segment + 1) * segment_size, last)
        top, total, mixed = segment_softmax(
            queries, cache, table, query, first, end, context, kv_head, kv_heads, width, value_start, scale, softcap,
            window, chunk, caps, page, N, C
        )  # fmt: skip
        part = (segment * tokens + token) * heads + head
        store_part(tops, totals, mixes, part, place, width, real, q_real, top, total, mixed)
    else:
        top, total = before_first(sinks, head, real, has_sinks, N)
        mixed = tl.zeros([C, N], tl.float32)
        for segment in range(begin // segment_size, tl.cdiv(last, segment_size)):
            first = tl.maximum(segment * segment_size, begin)
            end = tl.minimum((segment + 1) * segment_size, last)
            next_top, next_total, next_mixed = segment_softmax(
                queries, cache, table, query, first, end, context, kv_head, kv_heads, width, value_start, scale,
                softcap, window, chunk, caps, page, N, C
            )  # fmt: skip
            top, total, mixed = add(top, total, mixed, next_top, next_total, next_mixed)
        done = tl.trans(mixed / total[None, :])
        if is_gated:
            gate_at = (token * gate_token + head * gate_head)[:, None] + place[None, :]
            done *= tl.sigmoid(tl.load(gates + gate_at, mask=q_real, other=0.0).to(tl.float32))
        tl.store(out + q_at, done.to(out.dtype.element_ty), mask=q_real)


@triton.jit
def merge(
    tops,
    totals,
    mixes,
    sinks,
    gates,
    out,
    tokens,
    heads,
    width,
    gate_token,
    gate_head,
    segments,
    has_sinks: tl.constexpr,
    is_gated: tl.constexpr,
    C: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) + tl.arange(0, 1)
    place = tl.arange(0, C)[:, None]
    real = place < width
    top, total = before_first(sinks, head, head >= 0, has_sinks, 1)
    mixed = tl.zeros([C, 1], tl.float32)
    for segment in range(segments):
        part = (segment * tokens + token) * heads + head
        next_total = tl.load(totals + part)
        has_seen = real & (next_total > 0)[None, :]
        next_mixed = tl.load(mixes + part[None, :] * width + place, mask=has_seen, other=0.0)
        top, total, mixed = add(top, total, mixed, tl.load(tops + part), next_total, next_mixed)
    done = mixed / total[None, :]
    if is_gated:
        gate_at = (token * gate_token + head * gate_head)[None, :] + place
        done *= tl.sigmoid(tl.load(gates + gate_at, mask=real, other=0.0).to(tl.float32))
    at = (token * heads + head)[None, :] * width + place
    tl.store(out + at, done.to(out.dtype.element_ty), mask=real)


def splits(q_THC: Tensor, segments: int, width: int, programs: int) -> bool:
    """Whether segments run side by side: where programs are few, and what is to be merged is not too large."""
    tokens, heads, _ = q_THC.shape
    return segments > 1 and programs < PROGRAMS and segments * tokens * heads * width <= MAX_PARTS


def parts_of(q_THC: Tensor, segments: int, width: int) -> list[Tensor]:
    """Uninitialised running softmaxes of so many segments: largest scores, totals, and weighted values."""
    tokens, heads, _ = q_THC.shape
    tops, totals = (q_THC.new_empty(segments, tokens, heads, dtype=torch.float32) for _ in range(2))
    return [tops, totals, tops.new_empty(segments, tokens, heads, width)]


def _check(spec: MaskSpec, tiles: QueryTiles, shared: int) -> None:
    if not spec.causal or spec.bias is not None:
        raise ValueError("attention to later tokens, or with a bias by distance, has no GPU kernel")
    if tiles.rows * shared > MAX_QUERIES:
        raise ValueError(f"{tiles.rows} tokens of {shared} heads each are more than {MAX_QUERIES} queries")


def attend(
    q_THC: Tensor,
    cache_PSGC: Tensor,
    tables_BP: Tensor,
    spans_B3: Tensor,
    tiles: QueryTiles,
    longest: int,
    spec: MaskSpec,
    out_THC: Tensor,
    softcap: float = 0.0,
    side_by_side: bool | None = None,
    gate_THC: Tensor | None = None,
) -> None:
    """Write attention of the new tokens over their sequences' pages, in which their own keys and values are already.

    `longest`: an upper bound of the contexts, known to the host. Tokens that no tile names get no result. With
    `gate_THC`, which may be a view, the result is multiplied by its sigmoid.
    """
    (tokens, heads, width), kv_heads = q_THC.shape, cache_PSGC.shape[2]
    shared = heads // kv_heads
    _check(spec, tiles, shared)
    segments = triton.cdiv(longest, SEGMENT)
    lanes = max(16, triton.next_power_of_2(tiles.rows * shared))
    grid = (len(tiles.sequence_N), kv_heads)
    split = splits(q_THC, segments, width, grid[0] * grid[1]) if side_by_side is None else side_by_side
    parts = parts_of(q_THC, segments, width) if split else [out_THC] * 3
    sinks_H = q_THC if spec.sinks_H is None else spec.sinks_H
    gates_THC = q_THC if gate_THC is None else gate_THC
    gate_steps = gates_THC.stride()[:2]
    modes = {
        "is_gated": gate_THC is not None,
        "has_sinks": spec.sinks_H is not None,
        "C": max(64, triton.next_power_of_2(width)),
        "enable_fp_fusion": False,
    }
    _attend[(*grid, segments if split else 1)](
        q_THC,
        cache_PSGC,
        tables_BP,
        spans_B3,
        sinks_H,
        gates_THC,
        out_THC,
        *parts,
        tiles.sequence_N,
        tiles.first_N,
        tokens,
        heads,
        kv_heads,
        width,
        tables_BP.shape[1],
        cache_PSGC[0].numel(),
        *gate_steps,
        spec.scale,
        softcap,
        spec.window,
        spec.chunk,
        SEGMENT,
        split=split,
        caps=softcap > 0,
        rows=tiles.rows,
        page=PAGE,
        N=lanes,
        num_warps=4 if width <= 128 else 8,
        **modes,
    )
    if split:
        sizes = (tokens, heads, width, *gate_steps, segments)
        merge[(tokens, heads)](*parts, sinks_H, gates_THC, out_THC, *sizes, num_warps=1, **modes)
