"""In which form quantised matrices are kept: what `Grouped` parts must have in common to be joined, and its bytes.

It knows no files and no parameters.
"""

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

import torch

from model.grouped import GROUPS, Grouped, Values, code_bits, code_bounds

_WORDS = {"signed": "int4", "unsigned": "int4", "signed6": "int6", "bytes": "int8", "e2m1": "fp4"}


class Form(NamedTuple):
    """What parts must have in common to be one `Grouped`. Scales and minima are float16."""

    values: Values
    group: int
    minimum: bool = False
    factors: bool = False

    @classmethod
    def of(cls, part: Grouped) -> "Form":
        return cls(part.values, part.group, part.minima is not None, part.factors is not None)

    def __str__(self) -> str:
        word = _WORDS.get(self.values, self.values)
        return f"{word} g{self.group}" + (" with minimum" if self.minimum else "")

    def bytes(self, shape: Sequence[int]) -> int:
        """What matrices [..., n, k] take."""
        *outputs, k = shape
        row = k * code_bits(self.values) // 8 + k // self.group * (4 if self.minimum else 2) + 4 * self.factors
        return prod(outputs) * row


def common(forms: Sequence[Form]) -> Form:
    """The narrowest form that holds the values of all exactly."""
    values: Values = forms[0].values
    kinds, minimum = {form.values for form in forms}, any(form.minimum for form in forms)
    if kinds == {"signed", "unsigned"}:
        values, minimum = "unsigned", True
    elif len(kinds) > 1:
        low, high = code_bounds("signed6")
        bounds = [code_bounds(kind) for kind in kinds]
        values = "signed6" if all(low <= least and most <= high for least, most in bounds) else "bytes"
    return Form(values, min(form.group for form in forms), minimum, any(form.factors for form in forms))


def form_within(k: int, run: int, values: Values, scales: torch.dtype, minimum: bool = False) -> Form | None:
    """The form of k inputs of which a run of neighbours has one scale; None where no group divides both.

    It is the largest that such a matrix may need. A run of all inputs has its scale as a factor. Other scales need
    factors where float16 does not hold them or their minima. That is only known from the values, so factors are counted
    wherever they are possible.
    """
    group = group_within(k, run)
    factors = run == k or minimum or scales is not torch.float16
    return None if group is None else Form(values, group, minimum, factors)


def group_within(k: int, run: int) -> int | None:
    """The largest of `GROUPS` that divides k inputs and a run of so many neighbours with one scale; None if none
    does."""
    return next((group for group in reversed(GROUPS) if k % group == 0 and run % group == 0), None)
