"""Log-probabilities of chosen tokens and of the best alternatives, under the model's unchanged distribution.

It depends on logits and how many alternatives each row wants, not on sequences, settings or adjustments.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.types import Logprob

GROUP = 1 << 24  # logits scored at a time, so that intermediates stay below about 200 MB
BLOCK = 256  # the largest number of neighbours whose maximum is taken first


def logprobs(
    logits_BV: Tensor, token_B: NDArray[np.int64], wanted_B: list[int | None], finite_B: NDArray[np.bool_]
) -> list[Logprob | None]:
    """For each finite row that wants them: the log-probabilities of its token and of the best ones (None for others).
    Of equal tokens the lower id comes first."""
    rows = [row for row, wanted in enumerate(wanted_B) if wanted is not None and finite_B[row]]
    found: list[Logprob | None] = [None] * len(wanted_B)
    if rows:
        all_rows = len(rows) == len(logits_BV)
        logits_LV = logits_BV if all_rows else logits_BV.index_select(0, torch.tensor(rows))
        logprob_LV = logits_LV.log_softmax(-1)
        chosen_L = logprob_LV.numpy()[np.arange(len(rows)), token_B[rows]]
        best = _best(logprob_LV, [wanted_B[row] or 0 for row in rows])
        for row, value, top in zip(rows, chosen_L.tolist(), best, strict=True):
            found[row] = Logprob(value, top)
    return found


def prompt_logprobs(logits_SV: Tensor, tokens: list[int], wanted: int | None) -> tuple[Logprob, ...] | None:
    """Each row's log-probability of its token and its `wanted` best ones; None if any row is not finite."""
    found: list[Logprob] = []
    size = max(1, GROUP // logits_SV.shape[1])
    for first in range(0, len(tokens), size):
        group = slice(first, first + size)
        rows_RV, chosen = logits_SV[group].float(), np.array(tokens[group])
        finite_R: NDArray[np.bool_] = torch.isfinite(rows_RV.sum(-1)).numpy()
        scored = logprobs(rows_RV, chosen, [wanted or 0] * len(chosen), finite_R)
        found += [each for each in scored if each]
    return tuple(found) if len(found) == len(tokens) else None


def _best(logprob_LV: Tensor, wanted: list[int]) -> list[tuple[tuple[int, float], ...]]:
    """The best tokens of each row with their values. All tokens above a bound are sorted, ties included: a partial sort
    would break ties differently depending on what other rows want."""
    rows, width = logprob_LV.shape
    wanted_L = np.minimum(wanted, width)
    if not wanted_L.any():
        return [()] * rows
    values_LV: NDArray[np.float32] = logprob_LV.numpy()
    bound_L = _bound(logprob_LV, int(wanted_L.max()))
    found = np.flatnonzero(values_LV >= bound_L[:, None])
    row_N, value_N = found // width, values_LV.ravel()[found]
    order_N = np.lexsort((-value_N, row_N))  # stable, so equals stay in the order of their ids
    token = (found[order_N] % width).tolist()
    value = value_N[order_N].tolist()
    start_L = np.searchsorted(row_N, np.arange(rows))
    spans = zip(start_L.tolist(), (start_L + wanted_L).tolist(), strict=True)
    return [tuple(zip(token[start:end], value[start:end], strict=True)) for start, end in spans]


def _bound(logprob_LV: Tensor, most: int) -> NDArray[np.float32]:
    """A value per row that at least `most` of its tokens reach, and few more: the maxima of `most` blocks reach it.
    One pass over the vocabulary is much cheaper than a partition of it."""
    rows, width = logprob_LV.shape
    block = min(max(width // (8 * most), 1), BLOCK)
    count = width // block
    blocks_LNW = logprob_LV[:, : count * block].view(rows, count, block)
    peak_LN: NDArray[np.float32] = blocks_LNW.amax(-1).numpy()
    rank = count - most
    return np.partition(peak_LN, rank, axis=-1)[:, rank]
