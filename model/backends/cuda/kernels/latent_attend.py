"""Latent attention over pages: every head of a token attends over one latent and one rotary key per cached token.

Values are the latents themselves, which are read once for both products. Segments, tiles and their order are those of
`attend.py`, but segments are shorter: with one set of keys for all heads there are fewer programs. Queries are in the
space of the latents (see `per_head.py`). Latent attention has no windows and no sinks.

Axes in kernels: N queries of a tile (tokens, and their heads), S keys of a tile, R elements of a latent and W of a
rotary key, padded.
"""

import triton
import triton.language as tl
from torch import Tensor

from model.backends.cuda.kernels import attend
from model.backends.cuda.kernels.attend import QueryTiles, merge, parts_of, queries_of, splits, store_part
from model.backends.cuda.kernels.running_softmax import LOWEST, add, after_tile

SEGMENT = 512
QUERIES = {True: 32, False: 16}  # of a program, by whether segments run side by side: more, and its sums spill
WIDEST = 512  # elements of a latent: with more, a tile of keys leaves no room for the next


@triton.jit
def _segment(
    queries,
    turned_queries,
    cache,
    table,
    query,
    first,
    end,
    context,
    rank,
    turned,
    scale,
    page: tl.constexpr,
    N: tl.constexpr,
    R: tl.constexpr,
    W: tl.constexpr,
):
    """Running softmax over the keys from `first` up to `end`: largest score [N], total [N], weighted latents [R, N]."""
    top = tl.full([N], LOWEST, tl.float32)
    total = tl.zeros([N], tl.float32)
    mixed = tl.zeros([R, N], tl.float32)
    place, turned_place = tl.arange(0, R), tl.arange(0, W)
    for start in tl.range(first, end, page, disable_licm=True):
        key = start + tl.arange(0, page)
        block = cache + tl.load(table + start // page).to(tl.int64) * page * (rank + turned)
        at = block + tl.arange(0, page)[:, None] * (rank + turned)
        there = (key < context)[:, None]
        latent = tl.load(at + place[None, :], mask=there & (place < rank)[None, :], other=0.0)
        turned_mask = there & (turned_place < turned)[None, :]
        turned_key = tl.load(at + rank + turned_place[None, :], mask=turned_mask, other=0.0)
        score = tl.dot(latent, tl.trans(queries), input_precision="ieee")
        score = tl.dot(turned_key, tl.trans(turned_queries), score, input_precision="ieee") * scale
        seen = (key[:, None] <= query[None, :]) & there
        top, total, mixed = after_tile(top, total, mixed, tl.where(seen, score, float("-inf")), latent)
    return top, total, mixed


@triton.jit
def _attend_latent(
    q,
    cache,
    tables,
    spans,
    out,
    tops,
    totals,
    mixes,
    tile_sequence,
    tile_first,
    tokens,
    heads,
    rank,
    turned,
    blocks,
    scale,
    segment_size,
    split: tl.constexpr,
    rows: tl.constexpr,
    page: tl.constexpr,
    N: tl.constexpr,
    R: tl.constexpr,
    W: tl.constexpr,
):
    tile = tl.program_id(0)
    sequence = tl.load(tile_sequence + tile)
    if sequence < 0:
        return
    lane = tl.program_id(1) * N + tl.arange(0, N)
    real, token, query, context = queries_of(tile, sequence, tile_first, spans, lane, heads, rows)
    row = token * heads + lane % heads
    place, turned_place = tl.arange(0, R), tl.arange(0, W)
    mask = real[:, None] & (place < rank)[None, :]
    q_at = q + row[:, None] * (rank + turned)
    queries = tl.load(q_at + place[None, :], mask=mask, other=0.0).to(cache.dtype.element_ty)
    turned_mask = real[:, None] & (turned_place < turned)[None, :]
    turned_queries = tl.load(q_at + rank + turned_place[None, :], mask=turned_mask, other=0.0).to(
        cache.dtype.element_ty
    )
    last = tl.max(tl.where(real, query, -1), axis=0) + 1
    table = tables + sequence * blocks
    if split:
        segment = tl.program_id(2)
        end = tl.minimum((segment + 1) * segment_size, last)
        top, total, mixed = _segment(
            queries, turned_queries, cache, table, query, segment * segment_size, end, context, rank, turned, scale,
            page, N, R, W
        )  # fmt: skip
        part = segment.to(tl.int64) * tokens * heads + row
        store_part(tops, totals, mixes, part, place, rank, real, mask, top, total, mixed)
    else:
        top = tl.full([N], LOWEST, tl.float32)
        total = tl.zeros([N], tl.float32)
        mixed = tl.zeros([R, N], tl.float32)
        for segment in tl.range(0, tl.cdiv(last, segment_size), disable_licm=True):
            end = tl.minimum((segment + 1) * segment_size, last)
            next_top, next_total, next_mixed = _segment(
                queries, turned_queries, cache, table, query, segment * segment_size, end, context, rank, turned,
                scale, page, N, R, W
            )  # fmt: skip
            top, total, mixed = add(top, total, mixed, next_top, next_total, next_mixed)
        done = tl.trans(mixed / total[None, :])
        tl.store(out + row[:, None] * rank + place[None, :], done.to(out.dtype.element_ty), mask=mask)


def attend_latent(
    q_THC: Tensor,
    cache_PSGC: Tensor,
    tables_BP: Tensor,
    spans_B3: Tensor,
    tiles: QueryTiles,
    longest: int,
    scale: float,
    out_THR: Tensor,
    side_by_side: bool | None = None,
) -> None:
    """Write attention of the new tokens over the latents of their sequences, in which their own are already.

    `q_THC` has the part for latents, then the rotary part, as the cache [1, slots, 1, C] does. `longest` and what no
    tile names are as in `attend`.
    """
    (tokens, heads, width), rank = q_THC.shape, out_THR.shape[2]
    segments, queries = triton.cdiv(longest, SEGMENT), tiles.rows * heads
    programs = len(tiles.sequence_N) * triton.cdiv(queries, QUERIES[False])
    split = splits(q_THC, segments, rank, programs) if side_by_side is None else side_by_side
    grid = (len(tiles.sequence_N), triton.cdiv(queries, QUERIES[split]), segments if split else 1)
    parts = parts_of(q_THC, segments, rank) if split else [out_THR] * 3
    padded = max(64, triton.next_power_of_2(rank))
    _attend_latent[grid](
        q_THC,
        cache_PSGC,
        tables_BP,
        spans_B3,
        out_THR,
        *parts,
        tiles.sequence_N,
        tiles.first_N,
        tokens,
        heads,
        rank,
        width - rank,
        tables_BP.shape[1],
        scale,
        SEGMENT,
        split=split,
        rows=tiles.rows,
        page=attend.PAGE,
        N=QUERIES[split],
        R=padded,
        W=max(16, triton.next_power_of_2(width - rank)),
        num_warps=8,
        num_stages=2,
        enable_fp_fusion=False,
    )
    if split:
        sizes = (tokens, heads, rank, 0, 0, segments)
        merge[(tokens, heads)](
            *parts, *(out_THR,) * 3, *sizes, has_sinks=False, is_gated=False, C=padded, num_warps=1,
            enable_fp_fusion=False,
        )  # fmt: skip
