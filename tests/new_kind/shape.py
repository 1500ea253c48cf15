"""The shape of a mixture whose experts see the mean of a sequence's tokens so far."""

from dataclasses import dataclass

from model.shapes.checks import counts, sizes
from model.shapes.memory import StateMemory
from model.shapes.work import TokenWork


@dataclass(frozen=True, slots=True)
class RunningMean:
    """Of `experts` of `hidden` units, a token runs the K that its router scores best. Router and experts read the mean
    of the inputs of the token and those before it."""

    width: int
    experts: int
    hidden: int
    trained: int
    fixed = False
    shared_experts = 0
    experts_per_draw = 0
    draws_noise = False
    token_local = False
    rule_refusal = "its router takes no rule"
    set_refusal = "its experts see other tokens"
    own_fields = ()
    adaptive = False

    def __post_init__(self) -> None:
        sizes(width=self.width, experts=self.experts, hidden=self.hidden)
        counts(self.trained, self.experts)

    @property
    def num_experts(self) -> int:
        """All experts."""
        return self.experts

    @property
    def maximum(self) -> int:
        """All experts."""
        return self.experts

    @property
    def memory(self) -> StateMemory:
        """The sum of the inputs so far; how many they are follows from the position."""
        return StateMemory(self.width)

    def token_work(self, width: int, count: float) -> TokenWork:
        """The router and the chosen experts."""
        router, routed = self.experts * width, count * 2 * width * self.hidden
        return TokenWork(router, routed, router + routed)
