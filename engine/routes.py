"""Routes: which experts each token of a request ran, from the reports of a step's mixtures to what a client gets.

Rows are kept as they are sent (`Routes` in `engine/types.py`). It depends on positions, not on requests or blocks. No
torch: a sequence imports it, and so does whatever plans.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from engine.types import Routes
from model.shapes.feed_forward import FeedForward

Rows = NDArray[np.uint8] | NDArray[np.uint16]  # [T, L, W]: experts, best first, or bytes of bits
Experts = NDArray[np.int32]  # [T, K], -1 where a token ran fewer


@dataclass(frozen=True, slots=True)
class StepRoutes:
    """The routes of some tokens. `bits`: a row is the kept groups as bits, not a list of experts."""

    rows_TLW: Rows
    bits: bool

    def part(self, first: int, tokens: int) -> "StepRoutes":
        """The routes of `tokens` tokens from row `first`."""
        return StepRoutes(self.rows_TLW[first : first + tokens], self.bits)


def pack(layers: Sequence[Experts], mixtures: Sequence[FeedForward]) -> StepRoutes:
    """The reports of each mixture of one pass (`Observer.routes`), as rows."""
    experts = max(shape.num_experts for shape in mixtures)
    if any(shape.experts_per_draw for shape in mixtures):
        bits_LTW = [_as_bits(expert_TK, experts) for expert_TK in layers]
        return StepRoutes(np.stack(bits_LTW, axis=1), bits=True)
    dtype = np.uint8 if experts <= np.iinfo(np.uint8).max else np.uint16
    width = max(int((expert_TK >= 0).sum(1).max(initial=0)) for expert_TK in layers)
    rows_TLW = np.full((len(layers[0]), len(layers), width), np.iinfo(dtype).max, dtype)
    for layer, expert_TK in enumerate(layers):
        first_TW = expert_TK[:, :width]
        ran_TW = first_TW >= 0
        rows_TLW[:, layer, : first_TW.shape[1]][ran_TW] = first_TW[ran_TW]
    return StepRoutes(rows_TLW, bits=False)


def _as_bits(group_TK: Experts, groups: int) -> NDArray[np.uint8]:
    kept_TE = np.zeros((len(group_TK), groups), bool)
    token_R, rank_R = (group_TK >= 0).nonzero()
    kept_TE[token_R, group_TK[token_R, rank_R]] = True
    return np.packbits(kept_TE, axis=1, bitorder="little")


@dataclass(slots=True)
class RouteRecord:
    """The routes of one sequence by position; what is computed again replaces what was there."""

    kept: StepRoutes | None = field(default=None)

    def put(self, start: int, routes: StepRoutes) -> None:
        """Keep the routes of the tokens from position `start` on."""
        end = start + len(routes.rows_TLW)
        width = routes.rows_TLW.shape[2]
        if self.kept is None:
            self.kept = StepRoutes(_empty(routes.rows_TLW, end, width), routes.bits)
        tokens, _, widest = self.kept.rows_TLW.shape
        if end > tokens or width > widest:
            grown_TLW = _empty(routes.rows_TLW, max(end, 2 * tokens if end > tokens else tokens), max(width, widest))
            grown_TLW[:tokens, :, :widest] = self.kept.rows_TLW
            self.kept = StepRoutes(grown_TLW, routes.bits)
        self.kept.rows_TLW[start:end] = _no_expert(routes.rows_TLW)
        self.kept.rows_TLW[start:end, :, :width] = routes.rows_TLW

    def routes(self, first: int, end: int) -> Routes | None:
        """The routes of the positions from `first` up to `end`; None if nothing was reported."""
        if self.kept is None:
            return None
        rows_TLW = self.kept.rows_TLW[first:end]
        if not self.kept.bits:  # a neighbour in the batch may have run more
            used_W = (rows_TLW != _no_expert(rows_TLW)).any(axis=(0, 1))
            rows_TLW = rows_TLW[:, :, : int(used_W.sum())]
        tokens, layers, width = rows_TLW.shape
        data = rows_TLW.astype(rows_TLW.dtype.newbyteorder("<")).tobytes()
        dtype: Literal["uint8", "uint16"] = "uint8" if rows_TLW.itemsize == 1 else "uint16"
        return Routes(first, (tokens, layers, width), dtype, self.kept.bits, data)


def _no_expert(rows_TLW: Rows) -> int:
    """The value at places where a token ran no expert: the largest of the type."""
    return int(np.iinfo(rows_TLW.dtype).max)


def _empty(like_TLW: Rows, tokens: int, width: int) -> Rows:
    return np.full((tokens, like_TLW.shape[1], width), _no_expert(like_TLW), like_TLW.dtype)
