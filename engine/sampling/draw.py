"""Draws tokens from logits: by probability over the whole vocabulary, or among the best few where a setting cuts.

Both are inverse-CDF sampling of one uniform number per row, and every operation keeps the rows apart: which bits a row
yields never depends on how many others are computed beside it. It knows logits and settings, no sequences.
"""

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

ASKED = np.dtype(
    [("temperature", np.float64), ("top_k", np.int64), ("top_p", np.float64), ("min_p", np.float64), ("u", np.float64)]
)

BLOCK = 128  # tokens whose probabilities are summed before one of them is looked for
SHORT = 256  # best tokens that are ranked first; for a row that keeps them all, eight times as many are
GROUP = 1 << 22  # logits drawn from at a time, so that intermediates stay below some 100 MB
COLDEST = 1e-30  # below this, temperatures are this: just as greedy, and nothing overflows

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def draw(logits_BV: Tensor, rows_R: Ints, asked_R: NDArray[np.void]) -> Ints:
    """One token for each of the rows named, all with a temperature above zero and a finite best logit.

    `asked_R` holds an `ASKED` per row: `top_k` from 1 to V, which keeps all, and the random number `u` in [0, 1).
    Cut by top-k first, then by top-p of what is left, as transformers and vLLM do; min-p is against the best token.
    """
    cut_R = (asked_R["top_k"] < logits_BV.shape[1]) | (asked_R["top_p"] < 1) | (asked_R["min_p"] > 0)
    token_R = np.empty(len(rows_R), np.int64)
    for way, chosen_R in ((_by_probability, ~cut_R), (_among_the_best, cut_R)):
        for group in _groups(np.flatnonzero(chosen_R), logits_BV.shape[1]):
            token_R[group] = way(_take(logits_BV, rows_R[group]), asked_R[group])
    return token_R


def _groups(rows: Ints, width: int) -> Iterator[Ints]:
    size = max(1, GROUP // width)
    return (rows[start : start + size] for start in range(0, len(rows), size))


def _take(logits_BV: Tensor, rows: Ints) -> Tensor:
    """The rows named, in rising order; no copy of neighbours."""
    if rows[-1] - rows[0] == len(rows) - 1:
        return logits_BV[rows[0] : rows[-1] + 1]
    return logits_BV.index_select(0, torch.from_numpy(rows))


def _by_probability(logits_RV: Tensor, asked_R: NDArray[np.void]) -> Ints:
    """Over tokens in the order of the vocabulary: first the block that the random number falls into, then the token."""
    probs_RV = _probabilities(logits_RV, asked_R["temperature"])
    cum_RN = _block_sums(probs_RV).double().numpy().cumsum(-1)
    target_R = asked_R["u"] * cum_RN[:, -1]
    block_R = _pick(cum_RN, target_R, cum_RN[:, -1])
    rows_R = np.arange(len(cum_RN))
    target_R -= np.where(block_R > 0, cum_RN[rows_R, block_R - 1], 0.0)
    token_RW = np.minimum(block_R[:, None] * BLOCK + np.arange(BLOCK), probs_RV.shape[1] - 1)
    cum_RW = probs_RV.numpy()[rows_R[:, None], token_RW].cumsum(-1, dtype=np.float64)
    inside_R = _pick(cum_RW, target_R, cum_RW[:, -1])
    token_R: Ints = token_RW[rows_R, inside_R]
    return token_R


def _probabilities(logits_RV: Tensor, temperature_R: Floats) -> Tensor:
    """Softmax at each row's temperature. Subtracting the best first keeps tiny temperatures finite."""
    divisor_R1 = torch.from_numpy(np.maximum(temperature_R, COLDEST)).float()[:, None]
    return (logits_RV - logits_RV.amax(-1, keepdim=True)).div_(divisor_R1).softmax(-1)


def _block_sums(probs_RV: Tensor) -> Tensor:
    """The sum of every `BLOCK` neighbours; the last may have fewer, or none. A plain sum over a long row would not do:
    torch splits a single one among its threads, which rounds otherwise than beside other rows."""
    count = probs_RV.shape[1] // BLOCK
    whole_RN = probs_RV[:, : count * BLOCK].view(len(probs_RV), count, BLOCK).sum(-1)
    return torch.cat([whole_RN, probs_RV[:, count * BLOCK :].sum(-1, keepdim=True)], dim=1)


def _pick(cum_RN: Floats, target_R: Floats, end_R: Floats) -> Ints:
    """The first entry of each row beyond its target, never past the one that reaches the end: what has no weight is
    never chosen, whatever the rounding."""
    return _first_false((cum_RN <= target_R[:, None]) & (cum_RN < end_R[:, None]))


def _first_false(mask_RN: NDArray[np.bool_]) -> Ints:
    """How many entries each row opens with that are true, where none is true after a false one."""
    count_R: Ints = np.where(mask_RN[:, -1], mask_RN.shape[1], mask_RN.argmin(-1))
    return count_R


def _among_the_best(logits_RV: Tensor, asked_R: NDArray[np.void]) -> Ints:
    """Over tokens in falling order, ranking more of them for rows that may keep more than are ranked."""
    values_RV, mass_R = logits_RV.numpy(), _masses(logits_RV, asked_R)
    token_R, left, count = np.empty(len(asked_R), np.int64), np.arange(len(asked_R)), min(SHORT, logits_RV.shape[1])
    while True:
        token_R[left], settled_R = _ranked(values_RV, asked_R, mass_R, count)
        if settled_R.all():
            return token_R
        more = ~settled_R
        left, values_RV, asked_R, mass_R = left[more], values_RV[more], asked_R[more], mass_R[more]
        count = min(8 * count, logits_RV.shape[1])


def _masses(logits_RV: Tensor, asked_R: NDArray[np.void]) -> Floats:
    """The weight of the whole vocabulary, as a multiple of the best token's, for rows that keep a share of it. NaN
    where the share is one of the tokens that are ranked anyhow."""
    mass_R = np.full(len(asked_R), np.nan)
    rows = np.flatnonzero((asked_R["top_p"] < 1) & (asked_R["top_k"] == logits_RV.shape[1]))
    if len(rows) and logits_RV.shape[1] > SHORT:
        probs = _probabilities(_take(logits_RV, rows), asked_R["temperature"][rows])
        mass_R[rows] = 1 / probs.amax(-1).double().numpy()
    return mass_R


def _ranked(
    values_RV: NDArray[np.float32], asked_R: NDArray[np.void], mass_R: Floats, count: int
) -> tuple[Ints, NDArray[np.bool_]]:
    """A token of each row among its `count` best, and whether nothing beyond these could have been kept.

    Weights are relative to the best token's; `mass_R` is their sum over the vocabulary, for rows without a top-k.
    """
    best_RC = _best(values_RV, count)
    weight_RC = np.exp((best_RC - best_RC[:, :1]) / np.maximum(asked_R["temperature"], COLDEST)[:, None])
    cum_RC = weight_RC.cumsum(-1)
    kept_R = _kept(weight_RC, cum_RC, asked_R, mass_R)
    rows_R, top_k_R = np.arange(len(best_RC)), asked_R["top_k"]
    end_R = cum_RC[rows_R, kept_R - 1]
    rank_R = _pick(cum_RC, asked_R["u"] * end_R, end_R)
    value_R1 = best_RC[rows_R, rank_R][:, None]
    token_R = _nth_equal(values_RV, value_R1, rank_R - _first_false(best_RC > value_R1))
    return token_R, (top_k_R <= count) | ((top_k_R == values_RV.shape[1]) & (kept_R < count))


def _best(values_RV: NDArray[np.float32], count: int) -> NDArray[np.float32]:
    """The `count` largest values of each row in falling order."""
    width = values_RV.shape[1]
    if count < width:
        values_RV = np.partition(values_RV, width - count, axis=-1)[:, width - count :]
    return np.ascontiguousarray(np.sort(values_RV, axis=-1)[:, ::-1])


def _kept(weight_RC: Floats, cum_RC: Floats, asked_R: NDArray[np.void], mass_R: Floats) -> Ints:
    """How many of the best tokens stay; the first always does."""
    count, top_k_R, top_p_R = cum_RC.shape[1], asked_R["top_k"], asked_R["top_p"]
    ranked_R = cum_RC[np.arange(len(cum_RC)), np.minimum(top_k_R, count) - 1]
    share_R = np.where(top_p_R < 1, top_p_R * np.where(np.isnan(mass_R), ranked_R, mass_R), np.inf)
    kept_RC = np.arange(count) < top_k_R[:, None]
    kept_RC[:, 1:] &= cum_RC[:, :-1] < share_R[:, None]
    kept_RC &= weight_RC >= asked_R["min_p"][:, None]
    return _first_false(kept_RC)


def _nth_equal(values_RV: NDArray[np.float32], value_R1: NDArray[np.float32], nth_R: Ints) -> Ints:
    """Where a row equals its value for the nth time, counted from zero: of equal tokens, the lower ranks first."""
    found = np.flatnonzero(values_RV == value_R1)
    start_R = np.arange(len(values_RV)) * values_RV.shape[1]
    token_R: Ints = found[np.searchsorted(found, start_R) + nth_R] - start_R
    return token_R
