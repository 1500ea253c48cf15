"""Budgets: the counts of positions, compared with a brute-force model that has one entry per position."""

from dataclasses import replace
from itertools import chain, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.budget import FAMILY_RULE, ExpertBudget, ExpertCounts, RoutingRule
from model.contrast import Contrast
from model.errors import InvalidRequest
from model.expert_range import ExpertRange

COUNTS = st.tuples(st.integers(1, 4), st.integers(1, 4))
CHANGES = st.dictionaries(st.integers(1, 24), COUNTS, max_size=3).map(lambda found: tuple(sorted(found.items())))
BUDGETS = st.builds(ExpertBudget, COUNTS, st.just(()) | COUNTS, changes=st.just(()) | CHANGES)
SPAN = st.tuples(st.integers(0, 12), st.integers(1, 12))


def by_position(budget: ExpertBudget, prompt: int) -> list[ExpertCounts]:
    """The rule said once more, position by position, for the first 24."""
    counts = [budget.prefill or budget.per_layer] * prompt + [budget.per_layer] * (24 - prompt)
    for position, changed in budget.changes:
        counts[position:] = [changed] * (24 - position)
    return counts


@given(BUDGETS, SPAN, st.integers(1, 14))
def test_runs_are_the_counts_of_their_positions(budget: ExpertBudget, span: tuple[int, int], prompt: int) -> None:
    start, length = span
    expected = by_position(budget, prompt)[start : start + length]
    runs = budget.runs(start, start + length, prompt)
    assert list(chain.from_iterable([counts] * tokens for counts, tokens in runs)) == expected
    assert [budget.at(start + i, prompt) for i in range(length)] == expected
    assert all(tokens > 0 for _, tokens in runs)
    assert not budget.changes or all(before != after for (before, _), (after, _) in pairwise(runs)), "one form"
    assert budget.pairs(start, start + length, prompt) == sum(map(sum, expected))
    assert budget.largest(start, start + length, prompt) == tuple(map(max, zip(*expected, strict=True)))


@given(BUDGETS, st.integers(1, 4), st.integers(1, 14))
def test_a_limit_holds_at_every_position(budget: ExpertBudget, limit: int, prompt: int) -> None:
    limited = by_position(budget.at_most(limit), prompt)
    expected = [tuple(min(limit, count) for count in counts) for counts in by_position(budget, prompt)]
    assert limited == expected


@given(BUDGETS, st.integers(1, 14), st.integers(0, 10))
def test_the_mean_is_over_the_tokens_of_prompt_and_answer(budget: ExpertBudget, prompt: int, generated: int) -> None:
    counts = list(chain.from_iterable(by_position(budget, prompt)[: prompt + generated]))
    assert abs(budget.mean(prompt, generated) - sum(counts) / len(counts)) < 1e-12
    assert budget.mean(prompt, generated) == counts[0] or len(set(counts)) > 1


@given(BUDGETS, st.integers(0, 12), COUNTS, st.integers(1, 14))
def test_a_change_holds_from_its_position_on(
    budget: ExpertBudget, position: int, counts: ExpertCounts, prompt: int
) -> None:
    expected = by_position(budget, prompt)
    expected[position:] = [counts] * (24 - position)
    changed = budget.changed(position, counts)
    assert by_position(changed, prompt) == expected
    assert changed.changed(position, counts) == changed and changed.without_counts == budget.without_counts
    assert changed.uniform is None or {*changed.per_layer} == {changed.uniform}


def test_equal_counts_in_both_phases_are_a_plain_budget() -> None:
    plain = ExpertBudget((2, 2))
    assert ExpertBudget((2, 2), prefill=(2, 2)) == plain and ExpertBudget((2, 2), prefill=(2, 2)).uniform == 2
    assert ExpertBudget((2, 2), prefill=(8, 8)) != plain and ExpertBudget((2, 2), prefill=(8, 8)).uniform is None
    assert ExpertBudget((2, 2), prefill=(8, 8)).without_counts == plain.without_counts
    assert ExpertBudget((2, 2), prefill=(8, 8)).at_most(2) == plain


TOPK = ExpertRange(layers=2, trained=4, minimum=1, maximum=8, repaired=(1, 2))


@pytest.mark.parametrize(
    "rule",
    [
        FAMILY_RULE,
        RoutingRule("raw", threshold=0.5, top_p=1.0, repair=True, reuse=8, skip=7),
        RoutingRule("kept"),
        RoutingRule(1),
        RoutingRule(8),
    ],
)
def test_rules_that_a_model_runs_pass(rule: RoutingRule) -> None:
    TOPK.check_rule(rule, "experts")


@pytest.mark.parametrize(
    ("rule", "field", "said"),
    [
        (RoutingRule(9), "normaliser", "k2=9 must be between 1 and 8"),
        (RoutingRule(0), "normaliser", "k2=0 must be between 1 and 8"),
        (RoutingRule(threshold=1.5), "threshold", "between 0 and 1, got 1.5"),
        (RoutingRule(threshold=float("nan")), "threshold", "between 0 and 1, got nan"),
        (RoutingRule(top_p=-0.1), "top_p", "between 0 and 1, got -0.1"),
        (RoutingRule(reuse=9), "reuse", "between 0 and 8 for this model, got 9"),
    ],
)
def test_values_outside_a_rules_range_are_named(rule: RoutingRule, field: str, said: str) -> None:
    with pytest.raises(InvalidRequest, match=said) as error:
        TOPK.check_rule(rule, "experts")
    assert error.value.param == f"experts.{field}"


RULED: list[tuple[str, RoutingRule]] = [
    ("normaliser", RoutingRule("raw")),
    ("threshold", RoutingRule(threshold=0.1)),
    ("top_p", RoutingRule(top_p=0.1)),
    ("reuse", RoutingRule(reuse=1)),
    ("skip", RoutingRule(skip=1)),
]


def test_a_rule_leaves_every_count_its_experts() -> None:
    TOPK.check(ExpertBudget((6, 2), prefill=(1, 1), rule=RoutingRule(skip=2)), "experts")
    for budget in (ExpertBudget((7, 2)), ExpertBudget((1, 1), (7, 1)), ExpertBudget((1, 1), changes=((9, (1, 7)),))):
        with pytest.raises(InvalidRequest, match=r"experts.skip=2 leaves 6 of the 8 experts .* than the count 7") as e:
            TOPK.check(replace(budget, rule=RoutingRule(skip=2)), "experts")
        assert e.value.param == "experts.skip"
        TOPK.check(budget, "experts")


@pytest.mark.parametrize(("field", "rule"), [*RULED, ("repair", RoutingRule(repair=True))])
def test_a_model_that_runs_no_rule_says_why(field: str, rule: RoutingRule) -> None:
    closed = replace(TOPK, rule_refusal="because of its router", repair_refusal="because of its kernels")
    with pytest.raises(InvalidRequest, match=rf"experts.{field} is refused: because of its (router|kernels)"):
        closed.check_rule(rule, "experts")
    with pytest.raises(InvalidRequest, match=f"x.{field} was given, but this model has no mixture-of-experts layers"):
        ExpertRange(0, 0, 0, 0).check_rule(rule, "x")
    closed.check_rule(FAMILY_RULE, "experts")


def test_repair_needs_statistics_and_no_router() -> None:
    with pytest.raises(InvalidRequest, match=r"experts.repair is refused: .*moedial calibrate"):
        replace(TOPK, repaired=()).check_rule(RoutingRule(repair=True), "experts")
    replace(TOPK, rule_refusal="draws").check_rule(RoutingRule(repair=True), "experts")


SETS = replace(TOPK, layers=2, total=8)


@pytest.mark.parametrize(
    ("budget", "field", "said"),
    [
        (ExpertBudget((4, 6)), "set", "keeps 5 experts of a layer, fewer than the count 6"),
        (ExpertBudget((1, 1), (6, 1)), "set", "keeps 5 experts of a layer, fewer than the count 6"),
        (ExpertBudget((4, 4), rule=RoutingRule(skip=2)), "skip", "=2 leaves 3 of the 5 experts .* than the count 4"),
        (ExpertBudget((4, 4), rule=RoutingRule(6)), "normaliser", "k2=6 is more than the 5 experts"),
    ],
)
def test_a_set_keeps_enough_experts_for_the_counts(budget: ExpertBudget, field: str, said: str) -> None:
    kept = replace(budget.rule, kept=("11110100", "01111110"))
    with pytest.raises(InvalidRequest, match=rf"experts.{field} ?{said}") as error:
        SETS.check(replace(budget, rule=kept), "experts")
    assert error.value.param == f"experts.{field}"
    SETS.check(ExpertBudget((5, 5), rule=RoutingRule(5, kept=kept.kept)), "experts")


@pytest.mark.parametrize("kept", [("11110100",), ("1111010", "0111111"), ("1111012x", "11111111")])
def test_a_set_is_of_the_models_layers_and_experts(kept: tuple[str, ...]) -> None:
    with pytest.raises(InvalidRequest, match=r"experts.set must say of 2 layers which of 8 experts are kept"):
        SETS.check_rule(RoutingRule(kept=kept), "experts")
    with pytest.raises(InvalidRequest, match=r"experts.set is refused: it draws"):
        replace(SETS, set_refusal="it draws").check_rule(RoutingRule(kept=kept), "experts")


def test_a_set_keeps_the_trained_count() -> None:
    with pytest.raises(InvalidRequest, match=r"experts.set keeps 3 experts of a layer, fewer than the trained count 4"):
        SETS.check(ExpertBudget((1, 1), rule=RoutingRule(kept=("11100000", "11111111"))), "experts")


def test_both_rows_of_a_contrast_keep_the_experts_of_a_set() -> None:
    kept = ("11110100", "01111110")
    budget = ExpertBudget((4, 4), rule=RoutingRule("raw", kept=kept), contrast=Contrast(weak_rank=5))
    SETS.check(budget, "experts")
    assert budget.weak == ExpertBudget((1, 1), rule=RoutingRule(skip=4, kept=kept))
    with pytest.raises(InvalidRequest, match=r"experts\.contrast\.weak_rank .* between 1 and 5"):
        SETS.check(replace(budget, contrast=Contrast(weak_rank=6)), "experts")
