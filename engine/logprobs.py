"""Log-probabilities of chosen tokens and of the best alternatives, under the model's own distribution.

It knows logits and how many alternatives each row wants, no sequences, settings or adjustments.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.types import Logprob


def logprobs(
    logits_BV: Tensor, token_B: NDArray[np.int64], wanted_B: list[int | None], finite_B: NDArray[np.bool_]
) -> list[Logprob | None]:
    """For each row that wants any and is finite: its token's, and those of the best tokens, of equals the lowest."""
    rows = [row for row, wanted in enumerate(wanted_B) if wanted is not None and finite_B[row]]
    found: list[Logprob | None] = [None] * len(wanted_B)
    if rows:
        logprob_LV = logits_BV[torch.tensor(rows)].log_softmax(-1).numpy()
        chosen = logprob_LV[np.arange(len(rows)), token_B[rows]].tolist()
        for row, value, top in zip(rows, chosen, _best(logprob_LV, [wanted_B[row] or 0 for row in rows]), strict=True):
            found[row] = Logprob(value, top)
    return found


def _best(logprob_LV: NDArray[np.float32], wanted: list[int]) -> list[tuple[tuple[int, float], ...]]:
    """The best tokens of each row with their values. Whatever equals the last of them is sorted too: a partition alone
    would choose among equals by what the other rows want."""
    rows, width = logprob_LV.shape
    wanted_L = np.minimum(wanted, width)
    most = wanted_L.max()
    if most == 0:
        return [()] * rows
    least_L1 = np.partition(logprob_LV, width - most, axis=-1)[:, width - most, None]
    found = np.flatnonzero(logprob_LV >= least_L1)
    row_N, value_N = found // width, logprob_LV.ravel()[found]
    order_N = np.lexsort((-value_N, row_N))  # stable, so equals stay in the order of their ids
    token, value = (found[order_N] % width).tolist(), value_N[order_N].tolist()
    start_L = np.searchsorted(row_N, np.arange(rows))
    spans = zip(start_L.tolist(), (start_L + wanted_L).tolist(), strict=True)
    return [tuple(zip(token[start:end], value[start:end], strict=True)) for start, end in spans]
