"""Lays routed pairs out for the matrix product: by expert, then by token, in tiles of one expert each.

How many tiles there are is known only on the device. The host launches a bound that follows from the number of pairs;
what is beyond the last tile names no expert, and its programs leave at once. The sentinel expert E is never counted.

One program per expert, and no two wait for each other: each counts all pairs, which tells it where its own tiles begin.
Axes in kernels: P pairs of one step, E experts padded to a power of two, R rows of a tile.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.backends.cuda.kernels.operands import PairTiles

STEP = 1024  # pairs that a program reads at once


def tile_bound(pairs: int, experts: int, rows: int) -> int:
    """The most tiles that so many pairs can need: each expert's last tile may hold one pair."""
    used = min(pairs, experts)
    return (pairs + used * (rows - 1)) // rows


@triton.jit
def _loads(expert_of, pairs, experts, P: tl.constexpr, E: tl.constexpr):
    """How many pairs each expert has [E]."""
    loads = tl.zeros([E], tl.int32)
    for start in range(0, pairs, P):
        pair = start + tl.arange(0, P)
        expert = tl.load(expert_of + pair, mask=pair < pairs, other=experts)
        counted = expert < experts
        loads += tl.histogram(tl.where(counted, expert, 0), E, mask=counted)
    return loads


@triton.jit
def _fill(out, start, end, value, P: tl.constexpr):
    """Write `value` from `start` up to `end`."""
    for first in range(start, end, P):
        at = first + tl.arange(0, P)
        tl.store(out + at, tl.zeros([P], tl.int32) + value, mask=at < end)


@triton.jit
def _align(
    expert_of,
    tile_expert,
    tile_pair,
    loads_out,
    pairs,
    experts,
    bound,
    P: tl.constexpr,
    E: tl.constexpr,
    R: tl.constexpr,
):
    mine = tl.program_id(0)
    place = tl.arange(0, E)
    loads = _loads(expert_of, pairs, experts, P, E)
    tiles = (loads + R - 1) // R
    first_tile = tl.sum(tl.where(place < mine, tiles, 0), axis=0)
    end_tile = first_tile + tl.sum(tl.where(place == mine, tiles, 0), axis=0)
    load = tl.sum(tl.where(place == mine, loads, 0), axis=0)
    tl.store(loads_out + mine, load)
    _fill(tile_expert, first_tile, end_tile, mine, P)
    at = first_tile * R
    _fill(tile_pair, at + load, end_tile * R, pairs, P)
    for start in range(0, pairs, P):
        pair = start + tl.arange(0, P)
        is_mine = tl.load(expert_of + pair, mask=pair < pairs, other=experts) == mine
        before = tl.cumsum(is_mine.to(tl.int32), axis=0)
        tl.store(tile_pair + at + before - 1, pair, mask=is_mine)
        at += tl.sum(is_mine.to(tl.int32), axis=0)
    if mine == experts - 1:
        _fill(tile_expert, end_tile, bound, experts, P)


def align(expert_TK: Tensor, tiles: PairTiles, loads_E: Tensor) -> None:
    """Fill `tiles` with the pairs of `expert_TK`, and `loads_E`, int32, with the pairs of each expert.

    Empty tiles have no pairs: what `tiles.pair_NR` says of them is left as it was.
    """
    assert tiles.pair_NR is not None
    pairs, experts = expert_TK.numel(), len(loads_E)
    bound, rows = tiles.pair_NR.shape
    if bound < tile_bound(pairs, experts, rows):
        raise ValueError(f"{bound} tiles of {rows} rows may be too few for {pairs} pairs of {experts} experts")
    _align[(experts,)](
        expert_TK,
        tiles.expert_N,
        tiles.pair_NR,
        loads_E,
        pairs,
        experts,
        bound,
        P=STEP,
        E=triton.next_power_of_2(experts),
        R=rows,
        enable_fp_fusion=False,
    )


def empty_tiles(pairs: int, experts: int, rows: int, like: Tensor) -> PairTiles:
    """Uninitialised tiles for so many pairs, on the device of `like`."""
    bound = tile_bound(pairs, experts, rows)
    expert_N = like.new_empty(bound, dtype=torch.int32)
    return PairTiles(expert_N, expert_N.new_empty(bound, rows), pairs)
