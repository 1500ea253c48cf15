"""The expert count of a request: the ways in which a client can ask for one, and the one budget that follows.

Pure functions. They know the API's names for the count (`num_experts`, `experts`, model aliases, the header
`X-Num-Experts`), not what a count costs.
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
EXPERT_FIELDS = (FIELD, "experts")
PHASES = ("prefill", "decode")  # keys of `experts`: of prompt positions, and of generated ones
UNSUPPORTED_KEYS = ("threshold", "normaliser", "repair", "profile", "mask", "contrast", "auto")


@dataclass(frozen=True, slots=True)
class RequestedCount:
    """A count that a request asks for in one place, not validated yet."""

    source: str  # where it stands, as error messages say it
    param: str  # the field that an error names
    value: Any


class CountsByPhase(dict[str, Any]):
    """The value of `experts` with one or both of PHASES, which are not validated yet."""


def aliases_for(extra: Mapping[str, int], experts: ExpertRange) -> dict[str, int]:
    """Alias suffixes and their counts: k1, k2, k4 …, the trained and the largest count, and the operator's `extra`."""
    if not experts.layers:
        return {}
    powers = {1 << bit for bit in range(experts.maximum.bit_length())}
    candidates = powers | {experts.trained, experts.maximum}
    counts = sorted(count for count in candidates if experts.minimum <= count <= experts.maximum)
    for count in extra.values():
        experts.budget(count, "aliases")
    return {f"k{count}": count for count in counts} | dict(extra)


def counts_in_body(body: Mapping[str, Any]) -> list[RequestedCount]:
    """The counts in the body: at its top level, and in a literal `extra_body` object that a client did not merge."""
    nested = body.get("extra_body")
    counts = _counts_in(body, "the body")
    if isinstance(nested, Mapping):
        counts += _counts_in(nested, "extra_body")
    return counts


def _counts_in(fields: Mapping[str, Any], place: str) -> list[RequestedCount]:
    refuse_misspelled(fields)
    counts = []
    if fields.get(FIELD) is not None:
        counts.append(RequestedCount(f"{FIELD} in {place}", FIELD, fields[FIELD]))
    count = _count_of_experts(fields.get("experts"))
    if count is not None:
        whole = isinstance(fields["experts"], int) or isinstance(count, CountsByPhase)
        name = "experts" if whole else "experts.count"
        counts.append(RequestedCount(f"{name} in {place}", "experts", count))
    return counts


def merge_extra_body(body: Mapping[str, Any]) -> dict[str, Any]:
    """The body with the fields of a literal `extra_body` object moved to its top level.

    Raises:
        InvalidRequest: a field is in both, with different values. `resolve` compares the expert fields.
    """
    nested = body.get("extra_body")
    if not isinstance(nested, Mapping):
        return dict(body)
    for field, value in nested.items():
        if field not in EXPERT_FIELDS and body.get(field, value) != value:
            raise InvalidRequest(f"{field:.64} is in the body and, with another value, in extra_body", field[:64])
    top_level = {field: value for field, value in body.items() if field != "extra_body"}
    return {**nested, **top_level}


def _count_of_experts(experts: Any) -> Any:
    """The count, or the counts by phase, in the field `experts`: an integer or an object; None where there is none."""
    if experts is None:
        return None
    if isinstance(experts, int) and not isinstance(experts, bool):
        return experts
    if not isinstance(experts, Mapping):
        shapes = 'an integer, or an object such as {"count": 4}'
        raise InvalidRequest(f"experts must be {shapes}, got {shown(experts)}", "experts")
    given = {key: value for key, value in experts.items() if value is not None}
    for key in given:
        if key not in ("count", *PHASES):
            state = "is not supported yet" if key in UNSUPPORTED_KEYS else "is unknown"
            supported = "supported: count, or prefill and decode"
            raise InvalidRequest(f"experts.{key:.64} {state}; {supported}", "experts", "unsupported_parameter")
    phases = CountsByPhase((key, given[key]) for key in PHASES if key in given)
    if phases and "count" in given:
        both = f"experts.count and experts.{next(iter(phases))} exclude each other"
        raise InvalidRequest(f"{both}; got {shown(given)}", "experts")
    return phases or given.get("count")


def refuse_misspelled(keys: Iterable[str]) -> None:
    """Raises InvalidRequest for a misspelled expert field: ignored, it would give an answer at another count."""
    for key in keys:
        if key not in EXPERT_FIELDS and _looks_like_experts(key[:64]):
            raise InvalidRequest(f"unknown field {shown(key)}: did you mean {FIELD}?", key[:64], "unknown_parameter")


@lru_cache(1024)
def _looks_like_experts(key: str) -> bool:
    letters = re.sub(r"[^a-z]", "", key.lower())
    if "expert" in letters or letters.startswith("moe"):
        return True
    return bool(difflib.get_close_matches(letters, ["numexperts"], 1, 0.8))


def counts_in_header(values: Iterable[str]) -> list[RequestedCount]:
    """The counts in the header's values. A header is text: only digits are accepted."""
    return [RequestedCount(f"the header {HEADER}", FIELD, _integer_in(value)) for value in values]


def _integer_in(text: str) -> int | str:
    """The number, or the text itself, which is refused later, where it is none."""
    return int(text) if re.fullmatch(r"[0-9]{1,18}", text) else text


def resolve(experts: ExpertRange, default: int, counts: Iterable[RequestedCount]) -> ExpertBudget:
    """The expert budget of a request. Nothing is clamped: a count that cannot be served is refused.

    Raises:
        InvalidRequest: a count is no integer or out of range, or two counts differ.
    """
    counts = list(counts)
    budgets = [_budget(experts, default, count) for count in counts]
    for count, budget in zip(counts[1:], budgets[1:], strict=True):
        if budget != budgets[0]:
            raise _disagreement(counts[0], count)
    return budgets[0] if budgets else ExpertBudget((default,) * experts.layers)


def _disagreement(one: RequestedCount, other: RequestedCount) -> InvalidRequest:
    first = f"{one.source} says {shown(one.value)}"
    second = f"{other.source} says {shown(other.value)}"
    return InvalidRequest(f"{first} and {second}; they must agree", FIELD)


def _budget(experts: ExpertRange, default: int, requested: RequestedCount) -> ExpertBudget:
    if not isinstance(requested.value, CountsByPhase):
        return _plain_budget(experts, requested)
    place = requested.source.removeprefix("experts")
    counts = dict.fromkeys(PHASES, (default,) * experts.layers)
    for phase, value in requested.value.items():
        field = f"experts.{phase}"
        counts[phase] = _plain_budget(experts, RequestedCount(field + place, field, value)).per_layer
    return ExpertBudget(counts["decode"], prefill=counts["prefill"])


def _plain_budget(experts: ExpertRange, requested: RequestedCount) -> ExpertBudget:
    value, param = requested.value, requested.param
    if isinstance(value, list) and param != FIELD:
        for count in value[: experts.layers]:  # a longer list is refused for its length
            _check_type(experts, requested, count)
        return experts.budget(value, param)
    _check_type(experts, requested, value)
    return experts.budget(value, param)


def _check_type(experts: ExpertRange, requested: RequestedCount, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        allowed = f"an integer between {experts.minimum} and {experts.maximum}"
        message = f"{requested.source} must be {allowed}, got {shown(value)}"
        raise InvalidRequest(message, requested.param, "invalid_type")


def echoed_count(budget: ExpertBudget, prompt: int = 0, generated: int = 1) -> int | float:
    """The count as answers report it: the mean over so many tokens and the layers, as an integer where it is one."""
    mean = budget.mean(prompt, generated)
    return int(mean) if mean == int(mean) else round(mean, 4)


def count_in_header(budget: ExpertBudget) -> str:
    """The budget as the header of an answer says it, before any token is known: `4`, or `8:2` for prompt and answer."""
    answer = f"{echoed_count(budget):g}"
    return f"{echoed_count(budget, 1, 0):g}:{answer}" if budget.prefill else answer
