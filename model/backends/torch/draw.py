"""Draws tokens from logits: from the whole vocabulary, or from the best tokens if top-k, top-p or min-p apply.

Both use inverse-CDF sampling with one uniform number per row. Every operation keeps the rows separate, so that the bits
of a row's result never depend on the other rows. It depends on logits and settings, not on sequences.
"""

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.sampling import MIN_TEMPERATURE

BLOCK = 128  # tokens whose probabilities are summed before a token is searched inside one block
RANKED_FIRST = 256  # how many tokens are ranked first; eight times as many for a row that keeps them all, and so on
GROUP = 1 << 22  # logits processed at a time, so that intermediates stay below about 100 MB
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def draw(logits_BV: Tensor, rows_R: Ints, params_R: NDArray[np.void]) -> Ints:
    """One token for each row of `rows_R`, all with a temperature above zero and a finite best logit.

    `params_R` holds `PARAMETERS` (model/sampling.py) per row.
    Top-k applies first, then top-p to the rest, as in transformers and vLLM; min-p is relative to the best token.
    """
    width = logits_BV.shape[1]
    cut_R = (params_R["top_k"] < width) | (params_R["top_p"] < 1) | (params_R["min_p"] > 0)
    token_R = np.empty(len(rows_R), np.int64)
    for draw_rows, chosen_R in ((_draw_from_all, ~cut_R), (_draw_from_best, cut_R)):
        for group in _groups(np.flatnonzero(chosen_R), width):
            token_R[group] = draw_rows(_take(logits_BV, rows_R[group]), params_R[group])
    return token_R


def _groups(rows: Ints, width: int) -> Iterator[Ints]:
    size = max(1, GROUP // width)
    return (rows[start : start + size] for start in range(0, len(rows), size))


def _take(logits_BV: Tensor, rows: Ints) -> Tensor:
    """The rows with these ascending indices; a view if they are neighbours."""
    if rows[-1] - rows[0] == len(rows) - 1:
        return logits_BV[rows[0] : rows[-1] + 1]
    return logits_BV.index_select(0, torch.from_numpy(rows))


def _draw_from_all(logits_RV: Tensor, params_R: NDArray[np.void]) -> Ints:
    """Draw in vocabulary order: first the block that the random number falls into, then the token in it."""
    probs_RV = _probabilities(logits_RV, params_R["temperature"])
    cum_RN = _block_sums(probs_RV).double().numpy().cumsum(-1)
    target_R = params_R["u"] * cum_RN[:, -1]
    block_R = _pick(cum_RN, target_R, cum_RN[:, -1])
    rows_R = np.arange(len(cum_RN))
    target_R -= np.where(block_R > 0, cum_RN[rows_R, block_R - 1], 0.0)
    inside_RW = block_R[:, None] * BLOCK + np.arange(BLOCK)
    token_RW = np.minimum(inside_RW, probs_RV.shape[1] - 1)
    prob_RW = probs_RV.numpy()[rows_R[:, None], token_RW]
    cum_RW = prob_RW.cumsum(-1, dtype=np.float64)
    inside_R = _pick(cum_RW, target_R, cum_RW[:, -1])
    token_R: Ints = token_RW[rows_R, inside_R]
    return token_R


def _probabilities(logits_RV: Tensor, temperature_R: Floats) -> Tensor:
    """Softmax at each row's temperature. Subtracting the maximum first avoids overflow at tiny temperatures."""
    divisor_R1 = torch.from_numpy(np.maximum(temperature_R, MIN_TEMPERATURE)).float()[:, None]
    return (logits_RV - logits_RV.amax(-1, keepdim=True)).div_(divisor_R1).softmax(-1)


def _block_sums(probs_RV: Tensor) -> Tensor:
    """The sums of blocks of `BLOCK` neighbours; the last block may be shorter or empty. One sum over a long row would
    not be exact: torch splits a single row among its threads, which rounds differently than in a larger batch."""
    count = probs_RV.shape[1] // BLOCK
    end = count * BLOCK
    whole_RNW = probs_RV[:, :end].view(len(probs_RV), count, BLOCK)
    rest_RW = probs_RV[:, end:]
    return torch.cat([whole_RNW.sum(-1), rest_RW.sum(-1, keepdim=True)], dim=1)


def _pick(cum_RN: Floats, target_R: Floats, end_R: Floats) -> Ints:
    """The first entry of each row above its target, but never after the first that reaches the end: rounding never
    chooses a token without weight."""
    return _first_false((cum_RN <= target_R[:, None]) & (cum_RN < end_R[:, None]))


def _first_false(mask_RN: NDArray[np.bool_]) -> Ints:
    """The number of true entries at the start of each row; none is true after a false one."""
    all_R, width = mask_RN[:, -1], mask_RN.shape[1]
    count_R: Ints = np.where(all_R, width, mask_RN.argmin(-1))
    return count_R


def _draw_from_best(logits_RV: Tensor, params_R: NDArray[np.void]) -> Ints:
    """Draw in descending order of probability. Rows that may keep more tokens than are ranked are ranked further."""
    values_RV, mass_R = logits_RV.numpy(), _masses(logits_RV, params_R)
    token_R = np.empty(len(params_R), np.int64)
    left = np.arange(len(params_R))
    count = min(RANKED_FIRST, logits_RV.shape[1])
    while True:
        token_R[left], settled_R = _ranked(values_RV, params_R, mass_R, count)
        if settled_R.all():
            return token_R
        more = ~settled_R
        left, values_RV = left[more], values_RV[more]
        params_R, mass_R = params_R[more], mass_R[more]
        count = min(8 * count, logits_RV.shape[1])


def _masses(logits_RV: Tensor, params_R: NDArray[np.void]) -> Floats:
    """The weight of the whole vocabulary relative to the best token's, for rows with top-p and no top-k. NaN for the
    others, which need only the ranked tokens."""
    mass_R = np.full(len(params_R), np.nan)
    width = logits_RV.shape[1]
    rows = np.flatnonzero((params_R["top_p"] < 1) & (params_R["top_k"] == width))
    if len(rows) and width > RANKED_FIRST:
        probs = _probabilities(_take(logits_RV, rows), params_R["temperature"][rows])
        mass_R[rows] = 1 / probs.amax(-1).double().numpy()
    return mass_R


def _ranked(
    values_RV: NDArray[np.float32], params_R: NDArray[np.void], mass_R: Floats, count: int
) -> tuple[Ints, NDArray[np.bool_]]:
    """A token of each row drawn from its `count` best, and whether these include all tokens to keep.

    Weights are relative to the best token's; `mass_R` is their sum over the vocabulary, for rows without a top-k.
    """
    best_RC = _best(values_RV, count)
    temperature_R = np.maximum(params_R["temperature"], MIN_TEMPERATURE)
    weight_RC = np.exp((best_RC - best_RC[:, :1]) / temperature_R[:, None])
    cum_RC = weight_RC.cumsum(-1)
    kept_R = _kept_count(weight_RC, cum_RC, params_R, mass_R)
    rows_R, top_k_R = np.arange(len(best_RC)), params_R["top_k"]
    end_R = cum_RC[rows_R, kept_R - 1]
    rank_R = _pick(cum_RC, params_R["u"] * end_R, end_R)
    value_R1 = best_RC[rows_R, rank_R][:, None]
    token_R = _nth_equal(values_RV, value_R1, rank_R - _first_false(best_RC > value_R1))
    found_all_R = (top_k_R == values_RV.shape[1]) & (kept_R < count)
    return token_R, (top_k_R <= count) | found_all_R


def _best(values_RV: NDArray[np.float32], count: int) -> NDArray[np.float32]:
    """The `count` largest values of each row, in descending order."""
    width = values_RV.shape[1]
    if count < width:
        first = width - count
        values_RV = np.partition(values_RV, first, axis=-1)[:, first:]
    return np.ascontiguousarray(np.sort(values_RV, axis=-1)[:, ::-1])


def _kept_count(weight_RC: Floats, cum_RC: Floats, params_R: NDArray[np.void], mass_R: Floats) -> Ints:
    """How many of the best tokens are kept; the first always is."""
    count, top_k_R, top_p_R = cum_RC.shape[1], params_R["top_k"], params_R["top_p"]
    last_R = np.minimum(top_k_R, count) - 1
    ranked_R = cum_RC[np.arange(len(cum_RC)), last_R]
    total_R = np.where(np.isnan(mass_R), ranked_R, mass_R)
    share_R = np.where(top_p_R < 1, top_p_R * total_R, np.inf)
    kept_RC = np.arange(count) < top_k_R[:, None]
    kept_RC[:, 1:] &= cum_RC[:, :-1] < share_R[:, None]
    kept_RC &= weight_RC >= params_R["min_p"][:, None]
    return _first_false(kept_RC)


def _nth_equal(values_RV: NDArray[np.float32], value_R1: NDArray[np.float32], nth_R: Ints) -> Ints:
    """The index where a row equals its value for the nth time, from zero: of equal tokens, the lower id ranks first."""
    found = np.flatnonzero(values_RV == value_R1)
    start_R = np.arange(len(values_RV)) * values_RV.shape[1]
    token_R: Ints = found[np.searchsorted(found, start_R) + nth_R] - start_R
    return token_R
