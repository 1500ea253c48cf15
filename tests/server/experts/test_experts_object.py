"""The field `experts`: every key has a strict type, and keys that say the same exclude each other."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.contrast import Contrast
from model.errors import InvalidRequest
from server.experts.experts_object import KEYS, Auto, ExpertsObject, read_experts

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, ExpertsObject()),
        ({}, ExpertsObject()),
        (3, ExpertsObject(count=3)),
        ({"count": [1, 2, 3], "threshold": None}, ExpertsObject(count=[1, 2, 3])),
        ({"normaliser": "raw"}, ExpertsObject(rule={"normaliser": "raw"})),
        ({"normaliser": "k2=16", "count": 4}, ExpertsObject(count=4, rule={"normaliser": 16})),
        ({"threshold": 0, "top_p": 1}, ExpertsObject(rule={"threshold": 0.0, "top_p": 1.0})),
        ({"repair": False, "reuse": 8}, ExpertsObject(rule={"repair": False, "reuse": 8})),
        ({"contrast": {}}, ExpertsObject(rule={"contrast": Contrast(0.5, 0.1, 2)})),
        ({"contrast": {"beta": 1, "alpha": None}}, ExpertsObject(rule={"contrast": Contrast(1.0)})),
        ({"profile": "k4", "repair": True}, ExpertsObject(rule={"repair": True}, profile="k4")),
        ({"count": 2, "set": "stories"}, ExpertsObject(count=2, expert_set="stories")),
        ({"auto": {"min_quality": 1}}, ExpertsObject(auto=Auto(min_quality=1.0))),
        (
            {"auto": {"max_itl_ms": 20.5, "min_quality": None, "adapt": True}},
            ExpertsObject(auto=Auto(max_itl_ms=20.5, adapt=True)),
        ),
    ],
)
def test_what_the_field_may_say(value: Any, expected: ExpertsObject) -> None:
    assert read_experts(value) == expected


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("normaliser", "k2=0", '"k2=N"'),
        ("normaliser", "k2=16 ", '"k2=N"'),
        ("normaliser", "RAW", '"raw"'),
        ("normaliser", 16, '"k2=N"'),
        ("normaliser", True, '"k2=N"'),
        ("threshold", 1.01, "between 0 and 1"),
        ("threshold", -0.1, "between 0 and 1"),
        ("threshold", True, "between 0 and 1"),
        ("threshold", "0.5", "between 0 and 1"),
        ("threshold", float("nan"), "between 0 and 1"),
        ("top_p", 2, "between 0 and 1"),
        ("top_p", [], "between 0 and 1"),
        ("repair", 1, "true or false"),
        ("repair", "true", "true or false"),
        ("reuse", -1, "between 0 and 4096"),
        ("reuse", 2.0, "between 0 and 4096"),
        ("reuse", True, "between 0 and 4096"),
        ("reuse", 10**400, "between 0 and 4096"),
        ("gate_offset", 101, "a number between -100 and 100"),
        ("gate_offset", True, "a number between -100 and 100"),
        ("free_bias", "1", "a number between -100 and 100"),
        ("free_bias", float("nan"), "a number between -100 and 100"),
        ("contrast", 0.5, "an object such as"),
        ("contrast.beta", "1", "a number"),
        ("contrast.alpha", True, "a number"),
        ("contrast.weak_rank", 2.0, "an integer"),
        ("profile", "", "a name"),
        ("set", ["a"], "a name"),
        ("profile", 4, "a name"),
        ("auto", True, "min_quality"),
        ("auto", 0.98, "min_quality"),
        ("auto", [], "min_quality"),
        ("auto", {}, "needs min_quality, max_itl_ms or both"),
        ("auto", {"adapt": True}, "needs min_quality"),
        ("auto.min_quality", 0, "above 0"),
        ("auto.min_quality", True, "above 0"),
        ("auto.min_quality", "0.9", "above 0"),
        ("auto.max_itl_ms", -5, "above 0"),
        ("auto.max_itl_ms", 10**400, "above 0"),
        ("auto.max_itl_ms", float("nan"), "above 0"),
        ("auto.adapt", 1, "true or false"),
        ("auto.min_qualty", 0.9, "did you mean experts.auto.min_quality"),
    ],
)
def test_a_wrong_value_is_refused_by_its_key(key: str, value: Any, allowed: str) -> None:
    outer, _, inner = key.partition(".")
    with pytest.raises(InvalidRequest) as error:
        read_experts({outer: {inner: value} if inner else value})
    assert error.value.param == f"experts.{key}"
    assert allowed in error.value.message
    assert f"experts.{key}" in error.value.message


def test_adapting_needs_a_bound_that_depends_on_the_load() -> None:
    with pytest.raises(InvalidRequest, match="max_itl_ms") as error:
        read_experts({"auto": {"min_quality": 0.9, "adapt": True}})
    assert error.value.param == "experts.auto.adapt"
    assert read_experts({"auto": {"min_quality": 0.9, "adapt": False}}).auto == Auto(min_quality=0.9)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("count", "prefill"),
        ("count", "decode"),
        ("count", "profile"),
        ("prefill", "profile"),
        ("count", "cascade"),
        ("decode", "cascade"),
        ("profile", "cascade"),
        *((key, "auto") for key in KEYS if key != "auto"),
    ],
)
def test_keys_that_exclude_each_other(one: str, other: str) -> None:
    values: dict[str, Any] = {
        "count": 4,
        "prefill": 4,
        "decode": 4,
        "normaliser": "raw",
        "threshold": 0.5,
        "top_p": 0.5,
        "repair": False,
        "reuse": 0,
        "gate_offset": 0.5,
        "free_bias": -1,
        "set": "stories",
        "contrast": {},
        "profile": "k4",
        "cascade": {"low": 1, "high": 4, "threshold": 1.5},
        "auto": {"min_quality": 0.9},
    }
    with pytest.raises(InvalidRequest, match=rf"experts\.{one} and experts\.{other} exclude each other") as error:
        read_experts({one: values[one], other: values[other]})
    assert error.value.param == "experts"
    read_experts({one: values[one], other: None})


@pytest.mark.parametrize(
    ("key", "meant"),
    [("normalizer", "normaliser"), ("treshold", "threshold"), ("counts", "count"), ("Auto", "auto"), ("topp", "top_p")],
)
def test_a_misspelt_key_names_the_right_one(key: str, meant: str) -> None:
    with pytest.raises(InvalidRequest, match=rf"did you mean experts\.{meant}\?") as error:
        read_experts({key: 1})
    assert (error.value.param, error.value.code) == (f"experts.{key}", "unknown_parameter")


@given(st.dictionaries(st.sampled_from(KEYS), JSON) | JSON)
def test_whatever_comes_is_read_or_refused_by_name(value: Any) -> None:
    try:
        read = read_experts(value)
    except InvalidRequest as error:
        assert error.param and error.param.partition(".")[0] == "experts"
    else:
        assert all(0 <= read.rule.get(key, 0) <= 1 for key in ("threshold", "top_p"))
