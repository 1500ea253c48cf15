"""Resolving the expert count of a request: four places to ask for one, one budget or one refusal."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.budget import ExpertBudget
from model.errors import InvalidRequest
from model.expert_range import ExpertRange
from server.experts.requested_count import requested_in_body, requested_in_header
from server.experts.selection import aliases_for, count_in_header, echoed_count, resolve

RANGE = ExpertRange(layers=3, trained=4, minimum=1, maximum=8)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


def counts(body: dict[str, Any], headers: list[str] | None = None) -> tuple[int, ...]:
    return resolve(RANGE, 4, [*requested_in_body(body), *requested_in_header(headers or [])]).budget.per_layer


@pytest.mark.parametrize(
    ("body", "headers", "expected"),
    [
        ({}, [], (4, 4, 4)),
        ({"num_experts": None, "experts": None}, [], (4, 4, 4)),
        ({"num_experts": 1}, [], (1, 1, 1)),
        ({"num_experts": 8}, ["8"], (8, 8, 8)),
        ({}, ["2"], (2, 2, 2)),
        ({"experts": {"count": 2}}, [], (2, 2, 2)),
        ({"experts": 2}, [], (2, 2, 2)),
        ({"experts": 2, "num_experts": 2}, ["2"], (2, 2, 2)),
        ({"experts": {"count": [1, 2, 3]}}, [], (1, 2, 3)),
        ({"experts": {}}, [], (4, 4, 4)),
        ({"experts": {"count": None, "prefill": None}}, [], (4, 4, 4)),
        ({"experts": {"count": [2, 2, 2]}, "num_experts": 2}, ["2"], (2, 2, 2)),
        ({"extra_body": {"num_experts": 3}}, [], (3, 3, 3)),
        ({"extra_body": "not an object"}, [], (4, 4, 4)),
    ],
)
def test_every_way_to_ask(body: dict[str, Any], headers: list[str], expected: tuple[int, ...]) -> None:
    assert counts(body, headers) == expected


@pytest.mark.parametrize("value", [0, -1, 9, 10**9, 10**400, "8", 2.5, 2.0, True, False, float("nan"), [], [4], {}, ""])
def test_a_bad_count_is_refused_with_value_and_range(value: Any) -> None:
    with pytest.raises(InvalidRequest) as error:
        counts({"num_experts": value})
    assert error.value.param == "num_experts"
    assert "1 and 8" in error.value.message
    assert repr(value)[:60] in error.value.message


@pytest.mark.parametrize("value", ["0", "9", "-1", "2.0", "two", "", "٣", "9" * 30, "+2", " 2"])
def test_a_bad_header_is_refused(value: str) -> None:
    with pytest.raises(InvalidRequest) as error:
        counts({}, [value])
    assert error.value.param == "num_experts"


@pytest.mark.parametrize(
    "value", [[4, 4], [4, 4, 4, 4], [], [0, 4, 4], [True, 4, 4], [4, "4", 4], [4, 4, 9], "4", [[4], 4]]
)
def test_a_bad_list_is_refused(value: Any) -> None:
    with pytest.raises(InvalidRequest) as error:
        counts({"experts": {"count": value}})
    assert error.value.param == "experts"


@pytest.mark.parametrize(
    ("experts", "word"),
    [
        ({"prefill": 8, "mask": "legal"}, "experts.mask is not supported yet"),
        ({"prefil": 8}, "experts.prefil is unknown; did you mean experts.prefill"),
        ({"count": 4, "prefill": 8}, "experts.count and experts.prefill exclude each other"),
        ({"count": 4, "decode": 4}, "experts.count and experts.decode exclude each other"),
        ({"count": {}}, "experts.count in the body must be an integer"),
        ({"cuont": 4}, "experts.cuont is unknown; did you mean experts.count"),
        (4.5, "object"),
        (True, "object"),
        ("4", "object"),
        ([4], "object"),
    ],
)
def test_other_expert_rules_are_refused_by_name(experts: Any, word: str) -> None:
    with pytest.raises(InvalidRequest, match=word) as error:
        counts({"experts": experts})
    assert error.value.param is not None and error.value.param.partition(".")[0] == "experts"


@pytest.mark.parametrize(
    ("body", "headers"),
    [
        ({"num_experts": 2}, ["4"]),
        ({"num_experts": 2, "experts": {"count": 4}}, []),
        ({"num_experts": 2, "experts": 4}, []),
        ({"num_experts": 2, "extra_body": {"num_experts": 4}}, []),
        ({"experts": {"count": [2, 2, 4]}}, ["2"]),
        ({}, ["2", "4"]),
    ],
)
def test_two_ways_that_disagree_are_refused(body: dict[str, Any], headers: list[str]) -> None:
    with pytest.raises(InvalidRequest, match="agree"):
        counts(body, headers)


@pytest.mark.parametrize(
    "key",
    [
        "num_expert",
        "n_experts",
        "num_experts_per_tok",
        "numExperts",
        "NUM_EXPERTS",
        "expert_count",
        "moe_top_k",
        "num_exprets",
        "num-experts",
    ],
)
def test_a_misspelt_field_names_the_right_one(key: str) -> None:
    for body in ({key: 2}, {"extra_body": {key: 2}}):
        with pytest.raises(InvalidRequest, match="num_experts") as error:
            counts(body)
        assert error.value.param == key


@pytest.mark.parametrize("key", ["temperature", "user", "metadata", "top_k", "n", "num_ctx", "extra", "tempo"])
def test_ordinary_fields_are_not_taken_for_expert_fields(key: str) -> None:
    assert counts({key: 2}) == (4, 4, 4)


@given(JSON, JSON | st.dictionaries(st.sampled_from(["count", "prefill", "decode"]), JSON), st.text(max_size=5))
def test_whatever_comes_is_a_budget_in_range_or_a_refusal(number: Any, experts: Any, header: str) -> None:
    try:
        budget = counts({"num_experts": number, "experts": experts}, [header] if header else [])
    except InvalidRequest as error:
        assert error.param
    else:
        assert len(budget) == RANGE.layers and all(type(k) is int and 1 <= k <= 8 for k in budget)


@pytest.mark.parametrize(
    ("experts", "prefill", "decode"),
    [
        ({"prefill": 8, "decode": 2}, (8, 8, 8), (2, 2, 2)),
        ({"prefill": 8}, (8, 8, 8), (4, 4, 4)),
        ({"decode": 1, "prefill": None}, (4, 4, 4), (1, 1, 1)),
        ({"prefill": [1, 2, 3], "decode": 8, "count": None}, (1, 2, 3), (8, 8, 8)),
        ({"prefill": 3, "decode": [3, 3, 3]}, (3, 3, 3), (3, 3, 3)),
        ({"decode": 4}, (4, 4, 4), (4, 4, 4)),
    ],
)
def test_prompts_and_answers_have_counts_of_their_own(experts: Any, prefill: Any, decode: Any) -> None:
    for body in ({"experts": experts}, {"extra_body": {"experts": experts}}):
        budget = resolve(RANGE, 4, requested_in_body(body)).budget
        assert [budget.at(position, 2) for position in range(4)] == [prefill, prefill, decode, decode]
        assert (budget.prefill == ()) == (prefill == decode), "equal counts are one count"


@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize("value", [0, 9, -1, "8", 2.0, True, {}, {"count": 2}, [4, 4], [4, 4, 9], [4, "4", 4], []])
def test_a_bad_count_of_a_phase_is_refused_by_its_field(phase: str, value: Any) -> None:
    with pytest.raises(InvalidRequest, match=f"experts.{phase}") as error:
        counts({"experts": {"prefill": 2, "decode": 2} | {phase: value}})
    assert error.value.param == f"experts.{phase}"
    assert "1 and 8" in error.value.message or "3 MoE layers" in error.value.message
    wrong = 9 if value == [4, 4, 9] else "'4'" if value == [4, "4", 4] else value
    assert str(wrong) in error.value.message or f"{len(value)} entries" in error.value.message


def test_counts_by_phase_agree_with_every_other_way_or_are_refused() -> None:
    phases = {"experts": {"prefill": 2, "decode": 4}}
    for other in ({"num_experts": 2}, {"num_experts": 4}, {"extra_body": {"experts": {"prefill": 4, "decode": 2}}}):
        with pytest.raises(InvalidRequest, match=r"\{'prefill': 2, 'decode': 4\}.*must agree"):
            counts(phases | other)
    with pytest.raises(InvalidRequest, match="must agree"):
        counts(phases, ["2"])
    assert counts({"experts": {"prefill": 2, "decode": 2}, "num_experts": 2}, ["2"]) == (2, 2, 2)
    assert counts(phases | {"extra_body": phases}) == (4, 4, 4)
    with pytest.raises(InvalidRequest, match=r"experts\.prefill was given, but this model has no"):
        resolve(ExpertRange(0, 0, 0, 0), 0, requested_in_body(phases))


def test_aliases_cover_powers_of_two_and_the_operators_words() -> None:
    assert aliases_for({"fast": 3}, RANGE) == {"k1": 1, "k2": 2, "k4": 4, "k8": 8, "fast": 3}
    with pytest.raises(InvalidRequest, match="aliases"):
        aliases_for({"fast": 9}, RANGE)
    assert aliases_for({}, ExpertRange(0, 0, 0, 0)) == {}


def test_a_count_is_echoed_as_an_integer_unless_layers_differ() -> None:
    assert echoed_count(RANGE.budget(2)) == 2 and isinstance(echoed_count(RANGE.budget(2)), int)
    assert echoed_count(RANGE.budget([1, 2, 2])) == 1.6667


def test_counts_by_phase_are_echoed_as_a_mean_over_tokens_and_in_the_header_as_they_are() -> None:
    budget = ExpertBudget((1, 2, 3), prefill=(8, 8, 8))
    assert echoed_count(budget, 3, 1) == 6.5
    assert echoed_count(budget, 4, 0) == 8 and isinstance(echoed_count(budget, 4, 0), int)
    assert count_in_header(budget) == "8:2" and count_in_header(RANGE.budget(4)) == "4"
