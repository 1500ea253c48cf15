"""The model cards of /v1/models: names and allowed expert counts. Servers that say less are supported."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from terminal.counts import Count, parse_count, parts_of
from terminal.errors import BadOption, Refused
from terminal.sanitize import one_line


@dataclass(frozen=True, slots=True)
class CountRange:
    """The expert counts that a model allows: `low` to `high`, both included."""

    low: int
    high: int
    default: int
    trained: int

    def __str__(self) -> str:
        return f"{self.low} to {self.high}, default {self.default}, trained {self.trained}"


@dataclass(frozen=True, slots=True)
class ModelCard:
    """What a server says of one model."""

    id: str
    dense: bool  # whether it is known to have no experts
    allowed: CountRange | None  # None: the server does not say
    fixed: int | None = None  # the count that this name, an alias, stands for

    @property
    def counts(self) -> str:
        """The allowed counts in words."""
        if self.dense:
            return f"{self.id} has no experts to choose from"
        if self.fixed is not None:
            return f"{self.id} stands for K {self.fixed}"
        return (
            f"{self.id} takes {self.allowed}"
            if self.allowed
            else f"the server does not say which counts {self.id} takes"
        )

    def check(self, word: str) -> Count:
        """The count that was typed.

        Raises:
            BadOption: no count, out of the model's range, or not the alias's count; the message says what is allowed.
        """
        count = parse_count(word)
        if self.dense or count is None or self.fixed not in (None, count) or not self._allows(count):
            raise BadOption(f"K cannot be {one_line(word)}: {self.counts}")
        return count

    def _allows(self, count: Count) -> bool:
        allowed = self.allowed
        if allowed is None:
            return True
        return all(allowed.low <= part <= allowed.high for part in parts_of(count))


def cards_of(body: Any) -> list[ModelCard]:
    """The cards in an answer of /v1/models. Raises Refused where that is no list of models."""
    try:
        return [_card(model) for model in body["data"]]
    except (KeyError, TypeError, AttributeError, ValueError):
        raise Refused("/v1/models did not answer with a list of models", "no models") from None


def chosen(cards: list[ModelCard], name: str) -> ModelCard:
    """The card of that name, or the first where the name is empty.

    Raises:
        BadOption: no such model; the message names those that exist.
    """
    found = [card for card in cards if card.id == name or not name]
    if not found:
        names = ", ".join(card.id for card in cards[:12]) or "none"
        raise BadOption(f"there is no model {one_line(name)}; this server has: {one_line(names)}")
    return found[0]


def _card(model: Mapping[str, Any]) -> ModelCard:
    moe = (model.get("meta") or {}).get("moe")
    if not moe:
        return ModelCard(str(model["id"]), False, None)
    if not moe.get("layers", 1):
        return ModelCard(str(model["id"]), True, None)
    allowed = CountRange(*(int(moe[name]) for name in ("min", "max", "default", "trained")))
    return ModelCard(str(model["id"]), False, allowed, allowed.default if model.get("parent") else None)
