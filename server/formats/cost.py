"""What a call costs at the operator's prices: in its usage, and in the metrics when it ends."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from server.experts.prices import PER_TOKENS, Prices
from server.generation.passes import PassUsage
from server.metrics import Metrics
from server.requests.calls import GenerationCall

DIGITS = 12  # after the point; a token at a cent a million is 1e-8


@dataclass(frozen=True, slots=True)
class Cost:
    """In units of the operator's currency."""

    prompt: float
    completion: float

    @property
    def total(self) -> float:
        return self.prompt + self.completion


def cost_of(prices: Prices, used: PassUsage) -> Cost:
    """The cost of one pass, each token at the price of the mean count of its kind. Prompts count once they are read."""
    of_prompts, of_answers = map(prices.at, used.mean_counts)
    computed = used.read_tokens - used.cached_tokens
    prompt = computed * of_prompts.prompt + used.cached_tokens * of_prompts.cached
    return Cost(prompt / PER_TOKENS, used.completion_tokens * of_answers.completion / PER_TOKENS)


def cost_fields(prices: Prices | None, passes: Sequence[PassUsage]) -> dict[str, Any]:
    """`cost` and `cost_details` of a usage; nothing without prices."""
    if prices is None:
        return {}
    costs = [cost_of(prices, used) for used in passes]
    prompt, completion = sum(cost.prompt for cost in costs), sum(cost.completion for cost in costs)
    return {
        "cost": round(prompt + completion, DIGITS),
        "cost_details": {
            "currency": prices.currency,
            "prompt_cost": round(prompt, DIGITS),
            "completion_cost": round(completion, DIGITS),
        },
    }


def count_cost(metrics: Metrics, call: GenerationCall) -> None:
    """Add a call that has ended to the metrics, also one that failed or was given up: what it has used."""
    if call.prices is None:
        return
    for used in call.passes():
        metrics.inc("cost", used.timelines[0].label, by=cost_of(call.prices, used).total)
