"""From what a request says of experts to the one budget that follows, or to what the server is to choose by.

Pure functions. They depend on what a model can run and on the names of its calibration's options, not on what a count
costs.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from model.budget import ExpertBudget
from model.errors import InvalidRequest, shown
from model.expert_range import ExpertRange
from server.cascade import Cascade
from server.experts.experts_object import PHASES, Auto, CountsByPhase
from server.experts.options import CalibratedOptions
from server.experts.policies import Load, decide
from server.experts.requested_count import (
    FIELD,
    OptionName,
    Requested,
    RequestedAuto,
    RequestedCascade,
    RequestedCount,
    RequestedRule,
    RequestedSet,
)
from server.experts.sets import NO_SETS, ServedSets


@dataclass(frozen=True, slots=True)
class Selection:
    """What a request may use, as far as that is known when it arrives."""

    budget: ExpertBudget  # with `auto`, and without any wish: the default's, in place of which another may be chosen
    named: bool = False  # whether the request says which experts run
    option: str = ""  # the calibration's name of the budget, where the request has it by that name
    auto: Auto | None = None  # what the server is to choose by
    cascade: Cascade | None = None  # `budget` is that of its first run


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


def resolve(
    experts: ExpertRange,
    default: int,
    requested: Iterable[Requested],
    options: CalibratedOptions | None = None,
    sets: ServedSets = NO_SETS,
) -> Selection:
    """What a request may use. Nothing is clamped: a count or a rule that cannot be served is refused.

    Raises:
        InvalidRequest: a count is no integer or out of range, the model, its calibration or its expert sets do not have
            what is asked for, or two places differ.
    """
    requested, options = list(requested), options or CalibratedOptions()
    autos = [one for one in requested if isinstance(one, RequestedAuto)]
    rules = [one for one in requested if isinstance(one, RequestedRule)]
    named = [one for one in requested if isinstance(one, RequestedSet)]
    counts = [one for one in requested if isinstance(one, RequestedCount)]
    cascades = [one for one in requested if isinstance(one, RequestedCascade)]
    plain = ExpertBudget((default,) * experts.layers)
    if autos:
        _check_autos(autos, [*counts, *cascades, *rules, *named], options)
        decide(options.options, autos[0].auto, Load(1))  # what no load can give is refused at once
        return Selection(plain, auto=autos[0].auto)
    rule = _agreed_rule(rules) | _agreed_set(named, sets)
    if cascades:
        cascade = _agreed_cascade(experts, cascades, counts)
        low, high = (_ruled(experts, budget, rule) for budget in (cascade.low, cascade.high))
        return Selection(low, named=True, cascade=replace(cascade, low=low, high=high))
    budget = _ruled(experts, _agreed_budget(experts, default, counts, options) if counts else plain, rule)
    names = [one.value.name for one in counts if isinstance(one.value, OptionName)]
    option = options.option_of(budget, names)
    return Selection(budget, named=bool(requested), option=option.name if option else "")


def _check_autos(autos: Sequence[RequestedAuto], others: Sequence[Requested], options: CalibratedOptions) -> None:
    options.require("experts.auto")
    if others:
        raise InvalidRequest(f"{autos[0].source} and {others[0].source} exclude each other", "experts.auto")
    if autos[0].auto != autos[-1].auto:
        raise InvalidRequest(f"{autos[0].source} and {autos[-1].source} differ; they must agree", "experts.auto")


def _ruled(experts: ExpertRange, budget: ExpertBudget, fields: Mapping[str, Any]) -> ExpertBudget:
    """The budget with these fields of a rule, over its own, and with their contrast."""
    rule, contrast = {name: value for name, value in fields.items() if name != "contrast"}, fields.get("contrast")
    budget = replace(budget, rule=replace(budget.rule, **rule), contrast=contrast)
    experts.check(budget, "experts")
    if contrast is not None:
        experts.check_contrast(contrast, budget.rule, "experts.contrast")
    return budget


def _agreed_cascade(
    experts: ExpertRange, cascades: Sequence[RequestedCascade], counts: Sequence[RequestedCount]
) -> Cascade:
    """The one cascade of all places, without a rule. No layer has fewer experts in the second run, and one has more."""
    first, field = cascades[0], "experts.cascade"
    if counts:
        raise InvalidRequest(f"{first.source} and {counts[0].source} exclude each other", field)
    if first.cascade != cascades[-1].cascade:
        raise InvalidRequest(f"{first.source} and {cascades[-1].source} differ; they must agree", field)
    given, place = first.cascade, first.source.removeprefix(field)
    low, high = (
        _plain_budget(experts, RequestedCount(f"{field}.{name}{place}", f"{field}.{name}", value))
        for name, value in (("low", given.low), ("high", given.high))
    )
    if low == high or any(map(int.__gt__, low.per_layer, high.per_layer)):
        message = (
            f"{field}.high must have more experts than {field}.low, got {shown(given.high)} and {shown(given.low)}"
        )
        raise InvalidRequest(message, f"{field}.high")
    return Cascade(low, high, given.by, given.threshold)


def _agreed_set(named: Sequence[RequestedSet], sets: ServedSets) -> dict[str, Any]:
    """What the one expert set of all places says of a rule; nothing where none is named."""
    for one in named[1:]:
        if one.name != named[0].name:
            raise _disagreement(named[0].source, named[0].name, one.source, one.name, "experts.set")
    return {"kept": sets.kept(named[0].name, named[0].param)} if named else {}


def _agreed_rule(rules: Sequence[RequestedRule]) -> dict[str, Any]:
    """The one rule of all places."""
    for rule in rules[1:]:
        if dict(rule.fields) != dict(rules[0].fields):
            raise _disagreement(rules[0].source, rules[0].fields, rule.source, rule.fields, "experts")
    return dict(rules[0].fields) if rules else {}


def _agreed_budget(
    experts: ExpertRange, default: int, counts: Sequence[RequestedCount], options: CalibratedOptions
) -> ExpertBudget:
    """The one budget of all places. A place that says a count alone agrees with an option of that count, whose rule is
    then kept."""
    budgets = [_budget(experts, default, count, options) for count in counts]
    for count, budget in zip(counts[1:], budgets[1:], strict=True):
        if (budget.per_layer, budget.prefill) != (budgets[0].per_layer, budgets[0].prefill):
            raise _disagreement(counts[0].source, counts[0].value, count.source, count.value, FIELD)
    named = [place for place in zip(counts, budgets, strict=True) if isinstance(place[0].value, OptionName)]
    for count, budget in named[1:]:
        if budget.rule != named[0][1].rule:
            first = named[0][0]
            raise _disagreement(first.source, first.value, count.source, count.value, FIELD)
    return named[0][1] if named else budgets[0]


def _disagreement(one: str, said: Any, other: str, also: Any, param: str) -> InvalidRequest:
    first, second = f"{one} says {_said(said)}", f"{other} says {_said(also)}"
    return InvalidRequest(f"{first} and {second}; they must agree", param)


def _said(value: Any) -> str:
    return shown(value.name if isinstance(value, OptionName) else value)


def _budget(experts: ExpertRange, default: int, requested: RequestedCount, options: CalibratedOptions) -> ExpertBudget:
    if isinstance(requested.value, OptionName):
        return options.named(requested.value.name, requested.param)
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
    return rounded(budget.mean(prompt, generated))


def rounded(mean: float) -> int | float:
    """A mean count as answers write it."""
    return int(mean) if mean == int(mean) else round(mean, 4)


def count_in_header(budget: ExpertBudget) -> str:
    """The budget as the header of an answer says it, before any token is known: `4`, or `8:2` for prompt and answer."""
    answer = f"{echoed_count(budget):g}"
    return f"{echoed_count(budget, 1, 0):g}:{answer}" if budget.prefill else answer
