"""Counts, rules, profiles and `auto` from several places become one selection, or one refusal."""

from dataclasses import replace
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.budget import FAMILY_RULE, ExpertBudget, RoutingRule
from model.errors import InvalidRequest
from model.expert_range import ExpertRange
from server.experts.calibration import ServedCalibration
from server.experts.experts_object import Auto
from server.experts.options import CalibratedOptions
from server.experts.requested_count import requested_in_body, requested_in_header
from server.experts.selection import Selection, resolve
from tests.server.calibrations import calibration

RANGE = ExpertRange(layers=3, trained=4, minimum=1, maximum=8, repaired=(2,))
SLIM = msgspec.structs.replace(calibration(), profiles={"slim": (1, 1, 2)})
CALIBRATED = CalibratedOptions.build(ServedCalibration(SLIM, ""), RANGE)


def selected(body: dict[str, Any], *headers: str, calibrated: CalibratedOptions = CALIBRATED) -> Selection:
    return resolve(RANGE, 4, [*requested_in_body(body), *requested_in_header(headers)], calibrated)


def refused(body: dict[str, Any], *headers: str, calibrated: CalibratedOptions = CALIBRATED) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as error:
        selected(body, *headers, calibrated=calibrated)
    return error.value


def test_a_rule_joins_the_count_wherever_that_is_said() -> None:
    raw = RoutingRule(normaliser="raw")
    places: list[tuple[dict[str, Any], list[str]]] = [
        ({"experts": {"count": 2, "normaliser": "raw"}}, []),
        ({"num_experts": 2, "experts": {"normaliser": "raw"}}, []),
        ({"experts": {"normaliser": "raw"}}, ["2"]),
        ({"experts": {"normaliser": "raw"}, "extra_body": {"num_experts": 2}}, []),
    ]
    for body, headers in places:
        assert selected(body, *headers) == Selection(ExpertBudget((2, 2, 2), rule=raw), named=True)
    phases = selected({"experts": {"prefill": 8, "decode": 2, "threshold": 0.5}}).budget
    assert phases == ExpertBudget((2, 2, 2), (8, 8, 8), RoutingRule(threshold=0.5))


def test_a_rule_without_a_count_goes_with_the_default_and_counts_as_named() -> None:
    assert selected({"experts": {"repair": True}}) == Selection(
        ExpertBudget((4, 4, 4), rule=RoutingRule(repair=True)), named=True
    )
    bodies: tuple[dict[str, Any], ...] = ({}, {"experts": {}}, {"experts": {"count": None, "auto": None}})
    for silent in bodies:
        assert selected(silent) == Selection(ExpertBudget((4, 4, 4)), named=False)


def test_neutral_values_are_the_familys_rule() -> None:
    neutral = {"normaliser": "trained", "threshold": 0, "top_p": 0, "repair": False, "reuse": 0, "free_bias": 0}
    assert selected({"experts": {"count": 2} | neutral}).budget.rule == FAMILY_RULE


def test_the_model_refuses_rules_by_name() -> None:
    fixed = replace(RANGE, rule_refusal="it draws", repaired=())
    for rule in ({"top_p": 0.5}, {"normaliser": "raw"}, {"repair": True}):
        with pytest.raises(InvalidRequest) as error:
            resolve(fixed, 4, requested_in_body({"experts": rule}))
        assert error.value.param == f"experts.{next(iter(rule))}"
    assert resolve(fixed, 4, requested_in_body({"experts": {"top_p": 0, "repair": False}})).budget.rule == FAMILY_RULE


@pytest.mark.parametrize(
    ("contrast", "param", "words"),
    [
        ({"beta": 0, "weak_rank": 9}, "experts.contrast.weak_rank", "between 1 and 8 for this model, got 9"),
        ({"beta": 0.0, "alpha": -3}, "experts.contrast.alpha", "above 0 and at most 1, got -3"),
        ({"beta": -1}, "experts.contrast.beta", "between 0 and 10, got -1"),
    ],
)
def test_a_contrast_whose_beta_is_0_is_checked_as_any_other(contrast: Any, param: str, words: str) -> None:
    """Such a contrast is plain decoding, of which no budget knows it."""
    error = refused({"experts": {"contrast": contrast}})
    assert error.param == param and words in error.message
    cascade = {"low": 1, "high": 4, "threshold": 1}
    assert refused({"experts": {"contrast": contrast, "cascade": cascade}}).message == error.message
    fixed = replace(RANGE, rule_refusal="it draws")
    with pytest.raises(InvalidRequest, match=r"experts\.contrast is refused: it draws"):
        resolve(fixed, 4, requested_in_body({"experts": {"contrast": contrast}}))
    assert selected({"experts": {"contrast": {"beta": 0}}}).budget == ExpertBudget((4,) * 3)


def test_rules_in_two_places_must_agree() -> None:
    one = {"experts": {"threshold": 0.5}}
    assert selected(one | {"extra_body": one}).budget.rule == RoutingRule(threshold=0.5)
    error = refused(one | {"extra_body": {"experts": {"threshold": 0.4}}})
    assert "0.5" in error.message and "0.4" in error.message and "must agree" in error.message


def test_a_profile_is_an_option_or_a_profile_of_the_calibration() -> None:
    assert selected({"experts": {"profile": "slim"}}).budget == ExpertBudget((1, 1, 2))
    assert selected({"experts": {"profile": "cost2"}}).budget == ExpertBudget((1, 1, 4))
    repaired = ExpertBudget((2, 2, 2), rule=RoutingRule("kept", repair=True))
    for body, headers in [({}, []), ({"num_experts": 2}, []), ({}, ["2"])]:
        assert selected({"experts": {"profile": "k2-repaired"}} | body, *headers).budget == repaired
    own = selected({"experts": {"profile": "k2-repaired", "repair": False}}).budget
    assert own.rule == RoutingRule("kept"), "a rule of the request's own replaces the option's, field by field"


def test_a_profile_that_is_not_there_or_disagrees_is_refused() -> None:
    error = refused({"experts": {"profile": "slym"}})
    assert error.param == "experts.profile" and "did you mean 'slim'?" in error.message
    assert "the calibration has " in refused({"experts": {"profile": "x"}}).message
    error = refused({"experts": {"profile": "k2"}, "num_experts": 4})
    assert "must agree" in error.message and "'k2'" in error.message
    both = {"experts": {"profile": "k2"}, "extra_body": {"experts": {"profile": "k2-repaired"}}}
    assert "must agree" in refused(both).message


def test_auto_excludes_every_count_in_other_places() -> None:
    auto: dict[str, Any] = {"experts": {"auto": {"min_quality": 0.95}}}
    assert selected(auto) == Selection(ExpertBudget((4, 4, 4)), auto=Auto(0.95))
    assert selected(auto | {"extra_body": auto}).auto == Auto(0.95)
    nested = {"extra_body": {"experts": {"repair": True}}}
    others: list[tuple[dict[str, Any], list[str]]] = [({"num_experts": 2}, []), ({}, ["2"]), (nested, [])]
    for body, headers in others:
        error = refused(auto | body, *headers)
        assert error.param == "experts.auto" and "exclude each other" in error.message
    assert "must agree" in refused(auto | {"extra_body": {"experts": {"auto": {"min_quality": 0.9}}}}).message


def test_what_no_option_can_give_is_refused_before_it_waits_in_a_queue() -> None:
    assert refused({"experts": {"auto": {"min_quality": 1.5}}}).param == "experts.auto.min_quality"


@pytest.mark.parametrize("experts", [{"auto": {"min_quality": 0.9}}, {"profile": "k2"}])
def test_without_a_calibration_the_command_is_named(experts: dict[str, Any]) -> None:
    error = refused({"experts": experts}, calibrated=CalibratedOptions())
    assert error.code == "no_calibration" and error.param == f"experts.{next(iter(experts))}"
    assert "`moedial calibrate`" in error.message


def test_a_model_without_experts_takes_no_rule() -> None:
    with pytest.raises(InvalidRequest, match="no mixture-of-experts layers"):
        resolve(ExpertRange(0, 0, 0, 0), 0, requested_in_body({"experts": {"repair": True}}))


def test_options_that_the_model_cannot_run_are_left_out() -> None:
    served = ServedCalibration(calibration(), "")
    narrow = CalibratedOptions.build(served, replace(RANGE, maximum=4))
    assert [option.name for option in narrow.options] == ["k1", "k2-repaired", "cost2", "k2", "k4"]
    plain = CalibratedOptions.build(served, ExpertRange(layers=2, trained=4, minimum=1, maximum=8))
    assert plain.options == () and dict(plain.profiles) == {}
    assert "none of the options" in refused({"experts": {"profile": "k2"}}, calibrated=plain).message


VALUES = {
    "count": st.integers(0, 9) | st.lists(st.integers(0, 9), min_size=2, max_size=3),
    "prefill": st.integers(0, 9),
    "decode": st.integers(0, 9),
    "normaliser": st.sampled_from(["trained", "raw", "kept", "k2=2", "k2=9", "k2=0"]),
    "threshold": st.floats(-0.1, 1.1),
    "top_p": st.floats(-0.1, 1.1),
    "repair": st.booleans(),
    "reuse": st.integers(-1, 9),
    "profile": st.sampled_from(["k2", "k2-repaired", "slim", "k3"]),
    "auto": st.fixed_dictionaries({}, optional={"min_quality": st.floats(0.5, 1.2), "max_itl_ms": st.floats(1, 9)}),
}
OBJECTS = st.fixed_dictionaries({}, optional=dict(VALUES))


@given(OBJECTS | st.integers(0, 9), st.none() | st.integers(0, 9), st.none() | OBJECTS, st.sampled_from(["", "2"]))
def test_whatever_is_combined_the_model_can_run_it_or_it_is_refused_by_name(
    experts: Any, number: int | None, nested: Any, header: str
) -> None:
    body = {"experts": experts, "num_experts": number, "extra_body": {"experts": nested}}
    try:
        selection = selected(body, *filter(None, [header]))
    except InvalidRequest as error:
        assert error.param and error.param.partition(".")[0] in ("experts", "num_experts")
        return
    budget = selection.budget
    RANGE.budget(budget.per_layer)
    RANGE.budget(budget.prefill or budget.per_layer)
    RANGE.check_rule(budget.rule, "experts")
    assert selection.named == bool((number is not None) + bool(header) + _says_something(experts, nested)) or (
        selection.auto is not None
    )


def _says_something(*objects: Any) -> bool:
    return any(isinstance(one, int) or bool(one) for one in objects)
