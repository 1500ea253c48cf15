"""What a request says of experts: the places in which a client can say it, gathered.

Pure functions. They depend on the API's names (`num_experts`, `experts`, the header `X-Num-Experts`). Not here: what a
model can run (`server/experts/selection.py`).
"""

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from model.errors import InvalidRequest, shown
from server.experts.experts_object import Auto, CascadeObject, read_experts

FIELD = "num_experts"
HEADER = "X-Num-Experts"
EXPERT_FIELDS = (FIELD, "experts")
ROUTES_FIELD = "return_routed_experts"  # asks for no count


@dataclass(frozen=True, slots=True)
class OptionName:
    """The name of an option or a profile of the calibration, in place of a count."""

    name: str


@dataclass(frozen=True, slots=True)
class RequestedCount:
    """A count, or what stands for one, that a request asks for in one place, not validated yet."""

    source: str  # where it stands, as error messages say it
    param: str  # the field that an error names
    value: Any


@dataclass(frozen=True, slots=True)
class RequestedRule:
    """How experts are to be weighted and chosen, as one place says it: fields of RoutingRule and `contrast`, of the
    right types."""

    source: str
    fields: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class RequestedAuto:
    """That the server is to choose, as one place says it."""

    source: str
    auto: Auto


@dataclass(frozen=True, slots=True)
class RequestedCascade:
    """Two runs, as one place says it."""

    source: str
    cascade: CascadeObject


@dataclass(frozen=True, slots=True)
class RequestedSet:
    """The name of an expert set, as one place says it."""

    source: str
    param: str  # the field that an error names
    name: str


Requested = RequestedCount | RequestedRule | RequestedSet | RequestedAuto | RequestedCascade


def requested_in_body(body: Mapping[str, Any]) -> list[Requested]:
    """What the body says, at its top level and in a literal `extra_body` object that a client did not merge."""
    nested = body.get("extra_body")
    requested = _requested_in(body, "the body")
    if isinstance(nested, Mapping):
        requested += _requested_in(nested, "extra_body")
    return requested


def _requested_in(fields: Mapping[str, Any], place: str) -> list[Requested]:
    refuse_misspelled(fields)
    requested: list[Requested] = []
    if fields.get(FIELD) is not None:
        requested.append(RequestedCount(f"{FIELD} in {place}", FIELD, fields[FIELD]))
    value = fields.get("experts")
    experts = read_experts(value)
    if experts.count is not None:
        name = "experts" if isinstance(value, int) else "experts.count"
        requested.append(RequestedCount(f"{name} in {place}", "experts", experts.count))
    if experts.phases is not None:
        requested.append(RequestedCount(f"experts in {place}", "experts", experts.phases))
    if experts.profile is not None:
        profile = OptionName(experts.profile)
        requested.append(RequestedCount(f"experts.profile in {place}", "experts.profile", profile))
    if experts.rule:
        requested.append(RequestedRule(f"experts in {place}", experts.rule))
    if experts.cascade is not None:
        requested.append(RequestedCascade(f"experts.cascade in {place}", experts.cascade))
    if experts.expert_set is not None:
        requested.append(RequestedSet(f"experts.set in {place}", "experts.set", experts.expert_set))
    if experts.auto is not None:
        requested.append(RequestedAuto(f"experts.auto in {place}", experts.auto))
    return requested


def merge_extra_body(body: Mapping[str, Any]) -> dict[str, Any]:
    """The body with the fields of a literal `extra_body` object moved to its top level.

    Raises:
        InvalidRequest: a field is in both, with different values. Expert fields are compared where all are known.
    """
    nested = body.get("extra_body")
    if not isinstance(nested, Mapping):
        return dict(body)
    for field, value in nested.items():
        if field not in EXPERT_FIELDS and body.get(field, value) != value:
            raise InvalidRequest(f"{field:.64} is in the body and, with another value, in extra_body", field[:64])
    top_level = {field: value for field, value in body.items() if field != "extra_body"}
    return {**nested, **top_level}


def nested_counts(given: Mapping[str, Any]) -> dict[str, Any]:
    """The expert fields of a literal `extra_body`, for a body that is made of the rest: they are compared later."""
    nested = given.get("extra_body")
    return {"extra_body": {field: nested.get(field) for field in EXPERT_FIELDS}} if isinstance(nested, Mapping) else {}


def refuse_misspelled(keys: Iterable[str]) -> None:
    """Raises InvalidRequest for a misspelled expert field: ignored, it would give an answer at another count."""
    for key in keys:
        if key not in (*EXPERT_FIELDS, ROUTES_FIELD) and _looks_like_experts(key[:64]):
            raise InvalidRequest(f"unknown field {shown(key)}: did you mean {FIELD}?", key[:64], "unknown_parameter")


@lru_cache(1024)
def _looks_like_experts(key: str) -> bool:
    letters = re.sub(r"[^a-z]", "", key.lower())
    if "expert" in letters or letters.startswith("moe"):
        return True
    return bool(difflib.get_close_matches(letters, ["numexperts"], 1, 0.8))


def requested_in_header(values: Iterable[str]) -> list[Requested]:
    """The counts in the header's values. A header is text: only digits are accepted."""
    return [RequestedCount(f"the header {HEADER}", FIELD, _integer_in(value)) for value in values]


def _integer_in(text: str) -> int | str:
    """The number, or the text itself, which is refused later, where it is none."""
    return int(text) if re.fullmatch(r"[0-9]{1,18}", text) else text
