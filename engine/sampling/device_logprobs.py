"""Log-probabilities computed where the logits are: of chosen tokens and of the best alternatives.

Maxima and sums of integers do not depend on their order, so that a row's values depend on no other row. It depends on
logits and how many alternatives are wanted, not on sequences. What a row gives is as in `logprobs.py`.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from engine.types import Logprob
from model.sampling import UNIT_BITS, fixed_point

GROUP = 1 << 24  # logits scored at a time, so that intermediates stay below about 500 MB


class Scores(NamedTuple):
    """Of each row: the log-probability of its token, the best tokens with theirs, and whether its logits are finite."""

    value_L: Tensor
    best_LN: Tensor  # int64
    best_value_LN: Tensor
    finite_L: Tensor


def scores(logits_LV: Tensor, token_L: Tensor, most: int) -> Scores:
    """The scores of rows, with the `most` best tokens; of equal ones the lower id comes first."""
    size = max(1, GROUP // logits_LV.shape[1])
    most = min(most, logits_LV.shape[1])
    groups = [slice(first, first + size) for first in range(0, len(logits_LV), size)]
    parts = [_scores(logits_LV[group].float(), token_L[group], most) for group in groups]
    return Scores(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _scores(logits_LV: Tensor, token_L: Tensor, most: int) -> Scores:
    peak_L1 = logits_LV.amax(-1, keepdim=True)
    mass_L1 = fixed_point((logits_LV - peak_L1).exp()).sum(-1, keepdim=True)
    log_sum_L1 = (mass_L1.double() / (1 << UNIT_BITS)).log()
    best_LN = _best(logits_LV, most)
    wanted_LN = torch.cat([token_L[:, None], best_LN], dim=1)
    value_LN = ((logits_LV.gather(1, wanted_LN) - peak_L1).double() - log_sum_L1).float()
    return Scores(value_LN[:, 0], best_LN, value_LN[:, 1:], torch.isfinite(logits_LV).all(-1))


def _best(logits_LV: Tensor, most: int) -> Tensor:
    """The best tokens in order. Value and id make one integer, so that no two are equal."""
    if not most:
        return torch.empty(len(logits_LV), 0, dtype=torch.int64, device=logits_LV.device)
    last = logits_LV.shape[1] - 1
    bits_LV = (logits_LV + 0.0).view(torch.int32).long()  # + 0: the two zeros are one
    ordered_LV = torch.where(bits_LV < 0, bits_LV ^ 0x7FFFFFFF, bits_LV)
    id_V = torch.arange(last, -1, -1, device=logits_LV.device)
    key_LN = ((ordered_LV << 32) | id_V).topk(most).values
    return last - (key_LN & 0xFFFFFFFF)


def as_logprobs(fetched: list[Tensor], wanted_L: list[int]) -> list[Logprob | None]:
    """The same of each row as the host has fetched it, with as many alternatives as it wants; None if not finite."""
    value_L, best_LN, best_value_LN, finite_L = (tensor.tolist() for tensor in fetched)
    rows = zip(value_L, best_LN, best_value_LN, wanted_L, finite_L, strict=True)
    return [
        Logprob(value, tuple(zip(best_N[:wanted], values_N[:wanted], strict=True))) if finite else None
        for value, best_N, values_N, wanted, finite in rows
    ]
