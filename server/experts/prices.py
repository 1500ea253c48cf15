"""What tokens cost by expert count, as the operator says. It depends on counts and amounts, not on requests."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from model.errors import InvalidRequest
from model.expert_range import ExpertRange
from server.configuration.options import Price
from server.settings import Settings

PER_TOKENS = 1_000_000  # the tokens that a price is of


@dataclass(frozen=True, slots=True)
class Prices:
    """Prices by rising count, in one currency."""

    currency: str
    by_count: Mapping[int, Price]

    @classmethod
    def build(cls, settings: Settings, experts: ExpertRange) -> "Prices | None":
        """The operator's prices; None where there are none.

        Raises:
            InvalidRequest: a count is none of the model's, or several prices leave out its smallest or largest one.
        """
        if not settings.prices:
            return None
        least, most = (experts.minimum, experts.maximum) if experts.layers else (0, 0)
        given = sorted(settings.prices)
        if wrong := [count for count in given if not least <= count <= most]:
            raise InvalidRequest(f"prices: this model has counts from {least} to {most}, got a price of {wrong[0]}")
        if len(given) > 1 and (given[0], given[-1]) != (least, most):
            needed = f"several prices need one of the smallest count, {least}, and one of the largest, {most}"
            raise InvalidRequest(f"prices: {needed}; got {', '.join(map(str, given))}")
        return cls(settings.currency, {count: settings.prices[count] for count in given})

    def at(self, count: float) -> Price:
        """The price at a mean count: on the line between the two nearest counts with a price.

        A mean may lie outside of all counts where a rule adds experts or leaves some out: then the nearest one's.
        """
        counts = list(self.by_count)
        nearest = min(max(count, counts[0]), counts[-1])
        for low, high in pairwise(counts):
            if nearest <= high:
                share = (nearest - low) / (high - low)
                ends = zip(self.by_count[low], self.by_count[high], strict=True)
                return Price(*(one + share * (other - one) for one, other in ends))
        return self.by_count[counts[0]]

    @property
    def card(self) -> dict[str, Any]:
        """The prices as /v1/models shows them."""
        rows = [{"num_experts": count, **price._asdict()} for count, price in self.by_count.items()]
        return {"currency": self.currency, "per_million_tokens": rows}
