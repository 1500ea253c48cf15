"""Which of a token's experts do not run although they were chosen: a plain value."""

from dataclasses import dataclass
from math import ceil

from model.shapes.checks import naturals, reals


@dataclass(frozen=True, slots=True)
class Dropping:
    """By weight: an expert but the first runs only where its weight is above `threshold`.

    By capacity: of the tokens of a sequence that one step computes, an expert takes `tokens`, or the `share` of them
    and not fewer than `least`; 0 for both: all. First choices come before second ones, and earlier tokens before later
    ones, or with `prioritised` those with the highest scores.

    `renormalised`: in a router that normalises, the weights of what is left are brought to its sum again.
    """

    threshold: float = 0.0
    tokens: int = 0
    share: float = 0.0
    prioritised: bool = False
    renormalised: bool = False
    least: int = 0

    def __post_init__(self) -> None:
        naturals(expert_capacity=self.tokens, min_expert_capacity=self.least)
        reals(second_expert_threshold=self.threshold, capacity_share=self.share)
        if not (0 <= self.threshold < 1 and self.share >= 0):
            raise ValueError(
                f"second_expert_threshold must be at least 0 and below 1, and a share of tokens at least 0, got"
                f" {self.threshold!r:.40} and {self.share!r:.40}"
            )

    @property
    def has_capacity(self) -> bool:
        """Whether tokens compete for an expert."""
        return self.tokens > 0 or self.share > 0

    def capacity(self, tokens: int) -> int:
        """How many of `tokens` tokens an expert takes."""
        return max(self.least, ceil(self.share * tokens)) if self.share > 0 else self.tokens
