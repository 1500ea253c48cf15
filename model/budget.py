"""What a request may spend on experts, and what counts a checkpoint can run.

Standard library only: the HTTP process, the scheduler and the model all read these values.
It does not know how a count becomes work; that is `model/moe/`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from model.errors import InvalidRequest


@dataclass(frozen=True, slots=True)
class ExpertBudget:
    """One expert count per MoE layer. Beside the tokens, this is what keys the prefix cache."""

    per_layer: tuple[int, ...]

    @property
    def mean(self) -> float:
        """The count to report when layers differ; exact when they do not."""
        return sum(self.per_layer) / len(self.per_layer) if self.per_layer else 0.0


@dataclass(frozen=True, slots=True)
class ExpertRange:
    """The counts that a loaded model can run: `layers` MoE layers, each from `minimum` to `maximum` experts."""

    layers: int
    trained: int
    minimum: int
    maximum: int

    def budget(self, count: int | Sequence[int], param: str = "num_experts") -> ExpertBudget:
        """Turn one count, or one per MoE layer, into a budget.

        Raises:
            InvalidRequest: a count outside the range, or a list of the wrong length; names `param`.
        """
        per_layer = (count,) * self.layers if isinstance(count, int) else tuple(count)
        if self.layers == 0:
            raise InvalidRequest(f"{param} was given, but this model has no mixture-of-experts layers", param)
        if len(per_layer) != self.layers:
            raise InvalidRequest(
                f"{param} has {len(per_layer)} entries; this model has {self.layers} MoE layers", param
            )
        for value in per_layer:
            if isinstance(value, bool) or not isinstance(value, int):
                raise InvalidRequest(f"{param} must be an integer, got {value!r:.64}", param, "invalid_type")
            if value != self.trained and self.minimum == self.maximum:
                raise InvalidRequest(
                    f"{param} can only be {self.trained}, the trained count: this model's router is made for no other;"
                    f" got {value!r:.64} (an operator may allow it with --allow-extrapolated-experts)",
                    param,
                )
            if not self.minimum <= value <= self.maximum:
                raise InvalidRequest(
                    f"{param} must be between {self.minimum} and {self.maximum} for this model, got {value!r:.64}",
                    param,
                )
        return ExpertBudget(per_layer)
