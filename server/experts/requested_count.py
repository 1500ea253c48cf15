"""How many experts a request may use: four ways to ask, one answer or one refusal. Pure functions.

It knows the wire (`num_experts`, `experts`, aliases, `X-Num-Experts`), not what a count costs.
"""

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from model.budget import ExpertBudget, ExpertRange
from model.errors import InvalidRequest, shown

FIELD = "num_experts"
HEADER = "X-Num-Experts"
RIGHT = (FIELD, "experts")
LATER = ("prefill", "decode", "threshold", "normaliser", "repair", "profile", "mask", "contrast", "auto")


@dataclass(frozen=True, slots=True)
class Ask:
    """One way in which a request asked: where, and what, unchecked."""

    where: str  # for messages
    param: str
    value: Any


def aliases_for(extra: Mapping[str, int], experts: ExpertRange) -> dict[str, int]:
    """Alias words and their counts: k1, k2, k4 …, the trained and the largest count, and the operator's own words."""
    if not experts.layers:
        return {}
    powers = {1 << bit for bit in range(experts.maximum.bit_length())}
    counts = sorted(c for c in powers | {experts.trained, experts.maximum} if experts.minimum <= c <= experts.maximum)
    for count in extra.values():
        experts.budget(count, "aliases")
    return {f"k{count}": count for count in counts} | dict(extra)


def asks_of_body(body: Mapping[str, Any]) -> list[Ask]:
    """What the body asks, at its top level and in a literal `extra_body` object that a client forgot to merge."""
    asks = []
    nested = body.get("extra_body")
    for where, part in (("the body", body), ("extra_body", nested if isinstance(nested, Mapping) else {})):
        refuse_misspelt(part)
        if part.get(FIELD) is not None:
            asks.append(Ask(f"{FIELD} in {where}", FIELD, part[FIELD]))
        if (count := _count_of_experts(part.get("experts"))) is not None:
            name = "experts.count" if isinstance(part["experts"], Mapping) else "experts"
            asks.append(Ask(f"{name} in {where}", "experts", count))
    return asks


def merged(body: Mapping[str, Any]) -> dict[str, Any]:
    """The body with the fields of a literal `extra_body` object where they belong.

    Raises:
        InvalidRequest: a field is in both, with different values; the count of experts is `resolve`'s business.
    """
    nested = body.get("extra_body")
    if not isinstance(nested, Mapping):
        return dict(body)
    for field, value in nested.items():
        if field not in RIGHT and body.get(field, value) != value:
            raise InvalidRequest(f"{field:.64} is in the body and, with another value, in extra_body", field[:64])
    return {**nested, **{field: value for field, value in body.items() if field != "extra_body"}}


def _count_of_experts(experts: Any) -> Any:
    if experts is None:
        return None
    if isinstance(experts, int) and not isinstance(experts, bool):
        return experts
    if not isinstance(experts, Mapping):
        shapes = 'an integer, or an object such as {"count": 4}'
        raise InvalidRequest(f"experts must be {shapes}, got {shown(experts)}", "experts")
    for key, value in experts.items():
        if key != "count" and value is not None:
            state = "is not supported yet" if key in LATER else "is unknown"
            raise InvalidRequest(f"experts.{key:.64} {state}; supported: count", "experts", "unsupported_parameter")
    return experts.get("count")


def refuse_misspelt(keys: Iterable[str]) -> None:
    """A misspelt expert field must not be ignored: the caller would pay for, and read, the wrong answer."""
    for key in keys:
        if key not in RIGHT and _looks_like_experts(key[:64]):
            raise InvalidRequest(f"unknown field {shown(key)}: did you mean {FIELD}?", key[:64], "unknown_parameter")


@lru_cache(1024)
def _looks_like_experts(key: str) -> bool:
    plain = re.sub(r"[^a-z]", "", key.lower())
    return (
        "expert" in plain or plain.startswith("moe") or bool(difflib.get_close_matches(plain, ["numexperts"], 1, 0.8))
    )


def ask_of_header(values: Iterable[str]) -> list[Ask]:
    """The header is text, so digits are the one accepted form."""
    return [
        Ask(f"the header {HEADER}", FIELD, int(value) if re.fullmatch(r"[0-9]{1,18}", value) else value)
        for value in values
    ]


def resolve(experts: ExpertRange, default: int, asks: Iterable[Ask]) -> ExpertBudget:
    """The budget of a request. Never clamps: what cannot be done is refused.

    Raises:
        InvalidRequest: a count that is no integer or out of range, or two ways that disagree.
    """
    asks = list(asks)
    budgets = [_budget(experts, ask) for ask in asks]
    for ask, budget in zip(asks[1:], budgets[1:], strict=True):
        if budget != budgets[0]:
            first = asks[0]
            raise InvalidRequest(
                f"{first.where} says {shown(first.value)} and {ask.where} says {shown(ask.value)}; they must agree",
                FIELD,
            )
    return budgets[0] if budgets else ExpertBudget((default,) * experts.layers)


def _budget(experts: ExpertRange, ask: Ask) -> ExpertBudget:
    value, param = ask.value, ask.param
    if isinstance(value, list) and param == "experts":
        for count in value[: experts.layers]:  # of a longer list, its length is what is wrong
            _check_type(experts, ask, count)
        return experts.budget(value, param)
    _check_type(experts, ask, value)
    return experts.budget(value, param)


def _check_type(experts: ExpertRange, ask: Ask, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        allowed = f"between {experts.minimum} and {experts.maximum}"
        raise InvalidRequest(f"{ask.where} must be an integer {allowed}, got {shown(value)}", ask.param, "invalid_type")


def reported(budget: ExpertBudget) -> int | float:
    """The count as it is echoed: an integer unless layers differ."""
    return int(budget.mean) if budget.mean == int(budget.mean) else round(budget.mean, 4)
