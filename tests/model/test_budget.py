"""Budgets: the counts of positions, compared with a brute-force model that has one entry per position."""

from itertools import chain

from hypothesis import given
from hypothesis import strategies as st

from model.budget import ExpertBudget, ExpertCounts

COUNTS = st.tuples(st.integers(1, 4), st.integers(1, 4))
BUDGETS = st.builds(ExpertBudget, COUNTS, st.just(()) | COUNTS)
SPAN = st.tuples(st.integers(0, 12), st.integers(1, 12))


def by_position(budget: ExpertBudget, prompt: int) -> list[ExpertCounts]:
    """The rule said once more, position by position, for the first 24."""
    return [budget.prefill or budget.per_layer] * prompt + [budget.per_layer] * (24 - prompt)


@given(BUDGETS, SPAN, st.integers(1, 14))
def test_runs_are_the_counts_of_their_positions(budget: ExpertBudget, span: tuple[int, int], prompt: int) -> None:
    start, length = span
    expected = by_position(budget, prompt)[start : start + length]
    runs = budget.runs(start, start + length, prompt)
    assert list(chain.from_iterable([counts] * tokens for counts, tokens in runs)) == expected
    assert [budget.at(start + i, prompt) for i in range(length)] == expected
    assert all(tokens > 0 for _, tokens in runs)
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


def test_equal_counts_in_both_phases_are_a_plain_budget() -> None:
    plain = ExpertBudget((2, 2))
    assert ExpertBudget((2, 2), prefill=(2, 2)) == plain and ExpertBudget((2, 2), prefill=(2, 2)).uniform == 2
    assert ExpertBudget((2, 2), prefill=(8, 8)) != plain and ExpertBudget((2, 2), prefill=(8, 8)).uniform is None
    assert ExpertBudget((2, 2), prefill=(8, 8)).without_counts == plain.without_counts
    assert ExpertBudget((2, 2), prefill=(8, 8)).at_most(2) == plain
