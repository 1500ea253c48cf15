"""What a sampler gives a device, and the weights that tokens are drawn by there. It depends on tensors, not on
sequences.

Weights are integers in units of 2^-40 of the best token's: sums of integers are the same in any order, so that a row's
sums depend on no other row, however a device splits them. Suffixes here: N edits, M masks, W words of 32 tokens.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

UNIT_BITS = 40  # 2^22 tokens as likely as the best one still fit an int64
MIN_TEMPERATURE = 1e-30  # lower temperatures are raised to this: just as greedy, without overflow

# How a row draws on the host: as `Draws` below, the temperature above 0.
PARAMETERS = np.dtype(
    [("temperature", np.float64), ("top_k", np.int64), ("top_p", np.float64), ("min_p", np.float64), ("u", np.float64)]
)


@dataclass(frozen=True, slots=True)
class Edits:
    """Single logits that change: a logit above 0 is divided by its factor, another multiplied; then the shift is added.
    No two edits are of the same logit."""

    row_N: Tensor  # int64
    id_N: Tensor  # int64
    factor_N: Tensor  # float64
    shift_N: Tensor  # float64


@dataclass(frozen=True, slots=True)
class Masks:
    """Allowed tokens in packed bits, the lowest bit first."""

    words_MW: Tensor  # int32
    mask_of_R: Tensor  # int64: which mask each row has; -1 for none


@dataclass(frozen=True, slots=True)
class Draws:
    """How each row draws, in float64. A row whose temperature is 0 does not: it takes the best token."""

    temperature_R: Tensor  # 0, or at least `MIN_TEMPERATURE`
    top_k_R: Tensor  # from 1 to V
    top_p_R: Tensor
    min_p_R: Tensor  # a float32 value
    u_R: Tensor  # the random number, in [0, 1)
    cuts: bool = field(kw_only=True)  # whether some row has a top-k, top-p or min-p

    def rows(self, group: slice) -> "Draws":
        """Those of some rows."""
        columns = self.temperature_R, self.top_k_R, self.top_p_R, self.min_p_R, self.u_R
        return Draws(*(column_R[group] for column_R in columns), cuts=self.cuts)


@dataclass(frozen=True, slots=True)
class SamplingInputs:
    """What a step's rows ask of the sampler, on the logits' device; None where no row asks for it."""

    edits: Edits | None = None
    allowed: Masks | None = None  # by the settings of requests
    grammar: Masks | None = None
    draws: Draws | None = None


@dataclass(frozen=True, slots=True)
class Chosen:
    """What was chosen, on the device."""

    token_R: Tensor  # int64; 0 where the model's logits are not finite
    finite_R: Tensor  # bool: whether all of the model's logits are
    excluded_R: Tensor | None  # bool: whether edits or `allowed` left the token no probability; None without these


def fixed_point(weight_RV: Tensor) -> Tensor:
    """Weights between 0 and 1 in units of 2^-40, int64."""
    return (weight_RV * float(1 << UNIT_BITS)).to(torch.int64)
