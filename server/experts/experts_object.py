"""Reads the request field `experts`: an integer, or an object that says counts, how experts are weighted and chosen, a
profile, a cascade, or that the server is to choose.

Strict types; nothing is clamped or guessed. It checks the names on the wire and which of them exclude each other, not
what a model can run or what its calibration holds. Counts are checked later, with those of other places.
"""

import difflib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from engine.types import Measure
from model.budget import MAX_MOVED, Normaliser
from model.contrast import Contrast
from model.errors import InvalidRequest, shown

FIELD = "experts"
PHASES = ("prefill", "decode")  # of prompt positions, and of generated ones
NOT_YET = ("mask",)
NORMALISERS: tuple[Normaliser, ...] = ("trained", "raw", "kept")
MAX_REUSED = 1 << 12
MOST = 1_000_000  # of a quality, or of milliseconds
MEASURES: Mapping[str, tuple[Measure, float]] = {"entropy": ("entropy", 100.0), "margin": ("margin", 1.0)}  # and limits
K2 = re.compile(r"k2=([1-9][0-9]{0,3})")


class CountsByPhase(dict[str, Any]):
    """The value of `experts` with one or both of PHASES, which are not validated yet."""


@dataclass(frozen=True, slots=True)
class Auto:
    """What a request that leaves the choice to the server asks of it; at least one of the first two."""

    min_quality: float | None = None  # relative quality of the option, as the calibration has it
    max_itl_ms: float | None = None  # milliseconds from one generated token to the next
    adapt: bool = False  # whether it is decided again while the answer is generated

    def tightened(self, share: float) -> "Auto":
        """The same with this share of the latency."""
        return replace(self, max_itl_ms=None if self.max_itl_ms is None else share * self.max_itl_ms)


@dataclass(frozen=True, slots=True)
class CascadeObject:
    """A run with few experts, and another with more where the mean of a measure says so. Counts as of `count`."""

    low: Any  # not validated yet, as the next
    high: Any
    by: Measure
    threshold: float


@dataclass(frozen=True, slots=True)
class ExpertsObject:
    """The field's content. Where a key is absent or null, its value here is None or, of `rule`, missing."""

    count: Any = None  # not validated yet
    phases: CountsByPhase | None = None
    rule: Mapping[str, Any] = field(default_factory=dict)  # fields of RoutingRule, and a `Contrast`
    profile: str | None = None
    auto: Auto | None = None
    cascade: CascadeObject | None = None
    expert_set: str | None = None


def read_experts(value: Any) -> ExpertsObject:
    """The content of the field `experts`.

    Raises:
        InvalidRequest: names the key at fault, its value and what is allowed.
    """
    if value is None:
        return ExpertsObject()
    if isinstance(value, int) and not isinstance(value, bool):
        return ExpertsObject(count=value)
    if not isinstance(value, Mapping):
        shapes = 'an integer, or an object such as {"count": 4}'
        raise InvalidRequest(f"{FIELD} must be {shapes}, got {shown(value)}", FIELD)
    given = {key: part for key, part in value.items() if part is not None}
    _refuse_unknown(given, FIELD, KEYS)
    _refuse_together(given)
    phases = CountsByPhase((key, given[key]) for key in PHASES if key in given)
    rule = {key: read(f"{FIELD}.{key}", given[key]) for key, read in RULE.items() if key in given}
    profile = _text("experts.profile", given["profile"]) if "profile" in given else None
    auto = _auto(given["auto"]) if "auto" in given else None
    cascade = _cascade(given["cascade"]) if "cascade" in given else None
    named = _text("experts.set", given["set"]) if "set" in given else None
    return ExpertsObject(given.get("count"), phases or None, rule, profile, auto, cascade, named)


def _refuse_unknown(given: Mapping[str, Any], place: str, known: tuple[str, ...]) -> None:
    for key in given:
        if key in known:
            continue
        name = f"{place}.{key:.64}"
        if place == FIELD and key in NOT_YET:
            raise InvalidRequest(f"{name} is not supported yet", name, "unsupported_parameter")
        close = difflib.get_close_matches(key[:64].lower(), known, 1)
        hint = f"did you mean {place}.{close[0]}?" if close else f"known: {', '.join(known)}"
        raise InvalidRequest(f"{name} is unknown; {hint}", name, "unknown_parameter")


def _refuse_together(given: Mapping[str, Any]) -> None:
    """Refuse keys of which each says which experts run: the first two in the order of KEYS are named."""
    for key, excluded in EXCLUDES.items():
        other = next((name for name in KEYS if name in given and name in excluded), None)
        if key in given and other is not None:
            both = f"{FIELD}.{other} and {FIELD}.{key} exclude each other"
            raise InvalidRequest(f"{both}; got {shown(dict(given))}", FIELD)


def _normaliser(name: str, value: Any) -> Normaliser:
    if isinstance(value, str):
        if value in NORMALISERS:
            return value
        if found := K2.fullmatch(value):
            return int(found[1])
    allowed = '"trained", "raw", "kept" or "k2=N" with N from 1 to 9999'
    raise InvalidRequest(f"{name} must be {allowed}, got {shown(value)}", name)


def _share(name: str, value: Any) -> float:
    if not _is_number(value) or not 0 <= value <= 1:
        raise InvalidRequest(f"{name} must be a number between 0 and 1, got {shown(value)}", name)
    return float(value)


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise InvalidRequest(f"{name} must be true or false, got {shown(value)}", name, "invalid_type")
    return value


def _reuse(name: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= MAX_REUSED:
        raise InvalidRequest(f"{name} must be an integer between 0 and {MAX_REUSED}, got {shown(value)}", name)
    return value


def _offset(name: str, value: Any) -> float:
    if not _is_number(value) or not -MAX_MOVED <= value <= MAX_MOVED:
        allowed = f"a number between {-MAX_MOVED:g} and {MAX_MOVED:g}"
        raise InvalidRequest(f"{name} must be {allowed}, got {shown(value)}", name)
    return float(value)


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise InvalidRequest(f"{name} must be a name, got {shown(value)}", name, "invalid_type")
    return value


def _positive(name: str, value: Any) -> float:
    if not _is_number(value) or not 0 < value <= MOST:
        raise InvalidRequest(f"{name} must be a number above 0 and up to {MOST}, got {shown(value)}", name)
    return float(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _contrast(name: str, value: Any) -> Contrast:
    if not isinstance(value, Mapping):
        example = 'an object such as {"beta": 0.5, "alpha": 0.1, "weak_rank": 2}'
        raise InvalidRequest(f"{name} must be {example}, got {shown(value)}", name, "invalid_type")
    given = {key: part for key, part in value.items() if part is not None}
    _refuse_unknown(given, name, CONTRAST)
    for key in ("beta", "alpha"):
        if key in given and not _is_number(given[key]):
            raise InvalidRequest(f"{name}.{key} must be a number, got {shown(given[key])}", f"{name}.{key}")
    rank = given.get("weak_rank", 1)
    if not isinstance(rank, int) or isinstance(rank, bool):
        field = f"{name}.weak_rank"
        raise InvalidRequest(f"{field} must be an integer, got {shown(rank)}", field, "invalid_type")
    return Contrast(**given)


def _auto(value: Any) -> Auto:
    name = f"{FIELD}.auto"
    if not isinstance(value, Mapping):
        example = 'an object such as {"min_quality": 0.98}'
        raise InvalidRequest(f"{name} must be {example}, got {shown(value)}", name, "invalid_type")
    given = {key: part for key, part in value.items() if part is not None}
    _refuse_unknown(given, name, tuple(AUTO))
    read = {key: AUTO[key](f"{name}.{key}", part) for key, part in given.items()}
    auto = Auto(**read)
    if auto.min_quality is None and auto.max_itl_ms is None:
        raise InvalidRequest(f"{name} needs min_quality, max_itl_ms or both, got {shown(dict(value))}", name)
    if auto.adapt and auto.max_itl_ms is None:
        reason = "needs max_itl_ms: without it nothing changes while an answer is generated"
        raise InvalidRequest(f"{name}.adapt {reason}", f"{name}.adapt")
    return auto


def _cascade(value: Any) -> CascadeObject:
    name = f"{FIELD}.cascade"
    if not isinstance(value, Mapping):
        example = 'an object such as {"low": 1, "high": 4, "by": "entropy", "threshold": 1.5}'
        raise InvalidRequest(f"{name} must be {example}, got {shown(value)}", name, "invalid_type")
    given = {key: part for key, part in value.items() if part is not None}
    _refuse_unknown(given, name, CASCADE)
    for key in ("low", "high", "threshold"):
        if key not in given:
            raise InvalidRequest(f"{name}.{key} is missing, got {shown(dict(value))}", f"{name}.{key}")
    by, threshold = given.get("by", "entropy"), given["threshold"]
    if not isinstance(by, str) or by not in MEASURES:
        raise InvalidRequest(f'{name}.by must be "entropy" or "margin", got {shown(by)}', f"{name}.by")
    measure, most = MEASURES[by]
    if not _is_number(threshold) or not 0 <= threshold <= most:
        allowed = f"a number between 0 and {most:g} for by = {by}"
        raise InvalidRequest(f"{name}.threshold must be {allowed}, got {shown(threshold)}", f"{name}.threshold")
    return CascadeObject(given["low"], given["high"], measure, float(threshold))


Reader = Callable[[str, Any], Any]
RULE: Mapping[str, Reader] = {
    "normaliser": _normaliser,
    "threshold": _share,
    "top_p": _share,
    "repair": _flag,
    "reuse": _reuse,
    "gate_offset": _offset,
    "free_bias": _offset,
    "contrast": _contrast,
}
CONTRAST = ("beta", "alpha", "weak_rank")
AUTO: Mapping[str, Reader] = {"min_quality": _positive, "max_itl_ms": _positive, "adapt": _flag}
CASCADE = ("low", "high", "by", "threshold")
KEYS = ("count", *PHASES, *RULE, "set", "profile", "cascade", "auto")
EXCLUDES: Mapping[str, tuple[str, ...]] = {
    "prefill": ("count",),
    "decode": ("count",),
    "profile": ("count", *PHASES),
    "cascade": ("count", *PHASES, "profile"),
    "auto": tuple(key for key in KEYS if key != "auto"),
}
