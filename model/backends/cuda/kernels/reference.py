"""What each kernel computes, in plain torch and in loops: for tests, on any device. It imports no Triton."""

from collections.abc import Sequence

import torch
from torch import Tensor

from model.activation import activate, activate_gated
from model.shapes.mixtures import Activation
from model.step import MaskSpec


def linear(
    x_rD: Tensor,
    weight_OD: Tensor,
    bias_O: Tensor | None = None,
    activation: Activation | None = None,
    gated: bool = False,
    interleaved: bool = False,
) -> Tensor:
    """One expert on its rows, in float64."""
    y_rO = x_rD.double() @ weight_OD.double().T
    if bias_O is not None:
        y_rO = y_rO + bias_O.double()
    if not gated:
        return y_rO if activation is None else activate(y_rO, activation)
    assert activation is not None
    gate, up = (y_rO[:, 0::2], y_rO[:, 1::2]) if interleaved else y_rO.chunk(2, dim=-1)
    return activate_gated(gate, up, activation)


def pairs_of(expert_TK: Tensor, experts: int) -> list[list[int]]:
    """The pairs of each expert, in the order of tokens; pair p is rank p % K of token p // K. Some name no expert."""
    chosen: list[list[int]] = [[] for _ in range(experts)]
    for pair, expert in enumerate(expert_TK.flatten().tolist()):
        if expert < experts:
            chosen[expert].append(pair)
    return chosen


def tiles_of(chosen: Sequence[Sequence[int]], rows: int) -> list[tuple[int, list[int]]]:
    """Each expert's pairs in tiles of so many rows: (expert, pairs)."""
    tiles = []
    for expert, pairs in enumerate(chosen):
        for first in range(0, len(pairs), rows):
            tiles.append((expert, list(pairs[first : first + rows])))
    return tiles


def laid_out(
    tiles: list[tuple[int, list[int]]], bound: int, rows: int, experts: int, pairs: int
) -> tuple[Tensor, Tensor]:
    """The same as tensors of `bound` tiles: experts [N] and pairs [N, R], padded with the number of each."""
    expert_N = torch.full((bound,), experts, dtype=torch.int32)
    pair_NR = torch.full((bound, rows), pairs, dtype=torch.int32)
    for tile, (expert, members) in enumerate(tiles):
        expert_N[tile] = expert
        pair_NR[tile, : len(members)] = torch.tensor(members, dtype=torch.int32)
    return expert_N, pair_NR


def combine(pair_RD: Tensor, expert_TK: Tensor, weight_TK: Tensor, experts: int) -> Tensor:
    """Σ weight · pair of each token, in the order of experts."""
    tokens, k_max = expert_TK.shape
    total_TD = torch.zeros(tokens, pair_RD.shape[1])
    for token in range(tokens):
        ranks = [rank for rank in range(k_max) if expert_TK[token, rank] < experts]
        for rank in sorted(ranks, key=lambda rank: int(expert_TK[token, rank])):
            total_TD[token] += weight_TK[token, rank] * pair_RD[token * k_max + rank].float()
    return total_TD


def attend(
    q_THC: Tensor,
    cache_PSGC: Tensor,
    tables_BP: Tensor,
    spans_B3: Tensor,
    spec: MaskSpec,
    page: int,
    softcap: float = 0.0,
) -> Tensor:
    """Attention of every new token over its sequence up to itself, in float64."""
    out_THC = torch.full_like(q_THC, torch.nan, dtype=torch.float64)
    shared = q_THC.shape[1] // cache_PSGC.shape[2]
    for (first, rows, context), table_P in zip(spans_B3.tolist(), tables_BP, strict=True):
        position_S = torch.arange(context)
        slot_S = table_P[position_S // page] * page + position_S % page
        k_SHC, v_SHC = cache_PSGC[:, slot_S].double().repeat_interleave(shared, dim=2)
        score_RHS = torch.einsum("rhc,shc->rhs", q_THC[first : first + rows].double(), k_SHC) * spec.scale
        if softcap:
            score_RHS = (score_RHS / softcap).tanh() * softcap
        seen_RS = seen(position_S[context - rows :, None], position_S[None], spec)
        score_RHS = score_RHS.masked_fill(~seen_RS[:, None], -torch.inf)
        total_RH1 = score_RHS.exp().sum(-1, keepdim=True)
        if spec.sinks_H is not None:
            total_RH1 = total_RH1 + spec.sinks_H.double().exp()[:, None]
        weight_RHS = score_RHS.exp() / total_RH1
        out_THC[first : first + rows] = torch.einsum("rhs,shc->rhc", weight_RHS, v_SHC)
    return out_THC


def seen(query: Tensor, key: Tensor, spec: MaskSpec) -> Tensor:
    """Whether a query at a position sees a key at another."""
    mask = key <= query
    if spec.window:
        mask = mask & (key > query - spec.window)
    if spec.chunk:
        mask = mask & (key // spec.chunk == query // spec.chunk)
    return mask
