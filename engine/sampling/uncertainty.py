"""How unsure the model is of a next token: measures of its own distribution, before temperature and any adjustment.

Weights are relative to the best token's, in fixed point: sums of integers do not depend on their order, so that a row's
value depends on no other row, on any device. It depends on logits and measures, not on sequences.
"""

import torch
from torch import Tensor

from engine.types import Measure
from model.sampling import UNIT_BITS, fixed_point

GROUP = 1 << 22  # logits measured at a time, so that intermediates stay below about 150 MB


def uncertainty(logits_LV: Tensor, by: Measure) -> Tensor:
    """The measure of each row, float64: the entropy in nats, or the margin p1 - p2 of the two likeliest tokens."""
    size = max(1, GROUP // logits_LV.shape[1])
    groups = [logits_LV[first : first + size].float() for first in range(0, len(logits_LV), size)]
    return torch.cat([(_entropy if by == "entropy" else _margin)(group) for group in groups])


def _entropy(logits_LV: Tensor) -> Tensor:
    """With d = logit - best and w = e^d: H = log Σw - Σwd / Σw. No term -wd is above 1/e."""
    below_LV = logits_LV - logits_LV.amax(-1, keepdim=True)
    weight_LV = below_LV.exp()
    mass_L = _sum(weight_LV)
    return mass_L.log() + _sum(-weight_LV * below_LV) / mass_L


def _margin(logits_LV: Tensor) -> Tensor:
    """(1 - w2) / Σw, where w2 is the weight of the second best token."""
    best_L2 = logits_LV.topk(2).values
    below_LV = logits_LV - best_L2[:, :1]
    return (1 - (best_L2[:, 1] - best_L2[:, 0]).double().exp()) / _sum(below_LV.exp())


def _sum(value_LV: Tensor) -> Tensor:
    return fixed_point(value_LV).sum(-1).double() / (1 << UNIT_BITS)
