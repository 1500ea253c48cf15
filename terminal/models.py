"""What /v1/models says of a model: its name and the counts it takes. Servers that say less are read, too."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from terminal.counts import Count, parse_count, parts_of
from terminal.errors import BadOption, Refused
from terminal.sanitize import one_line


@dataclass(frozen=True, slots=True)
class Dial:
    """The counts that a model takes; `low` to `high`, both included."""

    low: int
    high: int
    default: int
    trained: int

    def __str__(self) -> str:
        return f"{self.low} to {self.high}, default {self.default}, trained {self.trained}"


@dataclass(frozen=True, slots=True)
class Card:
    id: str
    dense: bool  # known to have no experts
    dial: Dial | None  # None: the server does not say
    fixed: int | None = None  # the count that this name, an alias, stands for

    @property
    def counts(self) -> str:
        if self.dense:
            return f"{self.id} has no experts to choose from"
        if self.fixed is not None:
            return f"{self.id} stands for K {self.fixed}"
        return f"{self.id} takes {self.dial}" if self.dial else f"the server does not say which counts {self.id} takes"

    def check(self, word: str) -> Count:
        """The count that was typed.

        Raises:
            BadOption: no count, out of the model's range, or not the alias's count; the message says what can be.
        """
        count = parse_count(word)
        if self.dense or count is None or self.fixed not in (None, count) or not self._takes(count):
            raise BadOption(f"K cannot be {one_line(word)}: {self.counts}")
        return count

    def _takes(self, count: Count) -> bool:
        dial = self.dial
        return dial is None or all(dial.low <= part <= dial.high for part in parts_of(count))


def cards_of(body: Any) -> list[Card]:
    """Raises Refused where the body is no list of models."""
    try:
        return [_card(model) for model in body["data"]]
    except (KeyError, TypeError, AttributeError, ValueError):
        raise Refused("/v1/models did not answer with a list of models", "no models") from None


def chosen(cards: list[Card], name: str) -> Card:
    """The card of that name, or the first where no name was given.

    Raises:
        BadOption: no such model; the message names those that exist.
    """
    found = [card for card in cards if card.id == name or not name]
    if not found:
        names = ", ".join(card.id for card in cards[:12]) or "none"
        raise BadOption(f"there is no model {one_line(name)}; this server has: {one_line(names)}")
    return found[0]


def _card(model: Mapping[str, Any]) -> Card:
    moe = (model.get("meta") or {}).get("moe")
    if not moe:
        return Card(str(model["id"]), False, None)
    if not moe.get("layers", 1):
        return Card(str(model["id"]), True, None)
    dial = Dial(*(int(moe[name]) for name in ("min", "max", "default", "trained")))
    return Card(str(model["id"]), False, dial, dial.default if model.get("parent") else None)
