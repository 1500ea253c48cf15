"""Routing rules and repair on the kernels: what they compute, and that a row's bits depend on no other row's rule."""

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.backends.cpu.kernels.pack import Kind
from model.backends.cpu.kernels.rules import rule_arguments
from model.batch import BudgetRows, LayerBudget
from model.budget import RoutingRule
from model.shapes.mixtures import Infinity, Router
from tests.model.backends.cpu.kernels.cases import KINDS, Make, assert_close, check
from tests.model.backends.cpu.kernels.mixture_cases import (
    InfinityCase,
    RouteCase,
    Rules,
    TopKCase,
)
from tests.model.backends.cpu.kernels.rule_cases import (
    RuledRouteCase,
    random_rules,
    repaired_infinity_case,
    ruled_route_case,
    ruled_topk_case,
)
from tests.model.tiny import infinity

each_router = pytest.mark.parametrize("router", [Router(), Router(normalise=True)], ids=["plain", "normalised"])
each_kind = pytest.mark.parametrize("kind", KINDS)
SHAPES = [(1, 1), (1, 9), (7, 16), (50, 33), (120, 5), (3, 130)]  # rows, experts


@each_router
@pytest.mark.parametrize("rows, experts", SHAPES)
def test_routes_by_rules(router: Router, rows: int, experts: int) -> None:
    for seed in range(5):
        check(ruled_route_case(Make(seed), rows, experts, router))


@each_router
@pytest.mark.parametrize("rows, experts", SHAPES)
def test_experts_that_the_step_runs_are_reused(router: Router, rows: int, experts: int) -> None:
    for seed in range(5):
        case = ruled_route_case(Make(seed), rows, experts, router, reuse=True)
        assert_close(case.run(torch.arange(rows)), case.expected(), False)


def test_a_rule_is_a_row_of_numbers() -> None:
    rules = (RoutingRule("kept", 0.3, 0.9, True, 4, skip=2), RoutingRule(), RoutingRule("raw"), RoutingRule(16))
    rows_R6, rule_T, allowed_RE = rule_arguments(LayerBudget(torch.ones(4), 1, rules, torch.arange(4)))
    assert allowed_RE.shape == (0, 0)
    assert rows_R6.tolist() == [[-2, 0.3, 0.9, 1, 4, 2], [-1, *[0] * 5], [0] * 6, [16, *[0] * 5]]
    assert rule_T.tolist() == [0, 1, 2, 3]


def test_a_field_that_the_kernels_do_not_know_is_refused() -> None:
    @dataclass(frozen=True, slots=True)
    class Grown(RoutingRule):
        tilt: float = 0.5

    with pytest.raises(RuntimeError, match=r"rules must be \[R, 6\].*got \[1, 7\]"):
        RouteCase(torch.zeros(1, 4), torch.tensor([2]), Router(), Rules((Grown(),), torch.tensor([0]))).run(
            torch.arange(1)
        )


def test_kept_experts_are_rows_of_all_layers() -> None:
    kept = RoutingRule(kept=("110", "011"))
    of_step = BudgetRows(torch.ones(2, 2), 1, (2, 2), (RoutingRule(), kept), torch.arange(2))
    assert rule_arguments(of_step)[2].tolist() == [[1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 1, 1]]
    assert rule_arguments(of_step.layer(1))[2].tolist() == [[1, 1, 1], [0, 1, 1]]


@each_router
def test_kept_experts_are_routed_as_if_there_were_no_others(router: Router) -> None:
    """Bit for bit, whatever rule a token has beside them, and whatever its neighbours keep."""
    make = Make(7)
    for experts, left in ((9, 4), (33, 20), (130, 101), (16, 16)):
        case = ruled_route_case(make, 40, left, router)
        kept = sorted(make.rng.sample(range(experts), left))
        mask = "".join("1" if expert in kept else "0" for expert in range(experts))
        logits_TE = make.normal(40, experts, scale=2)
        logits_TE[:, kept] = case.logits_TE
        distinct = (*(replace(rule, kept=(mask,)) for rule in case.rules.distinct), RoutingRule())
        assert case.rules.rule_T is not None
        neighbours_T = torch.arange(40) % 5 == 0
        rule_T = case.rules.rule_T.masked_fill(neighbours_T, len(distinct) - 1)
        masked = RouteCase(logits_TE, case.counts_T, router, Rules(distinct, rule_T), case.trained)
        expected_TE = torch.full((40, experts), -1.0)
        expected_TE[:, kept] = RouteCase.run(case, torch.arange(40))
        found_TE = masked.run(torch.arange(40))
        assert torch.equal(found_TE[~neighbours_T], expected_TE[~neighbours_T])
        plain_TE = RouteCase(logits_TE, case.counts_T, router).run(torch.arange(40))
        assert torch.equal(found_TE[neighbours_T], plain_TE[neighbours_T])


@pytest.mark.parametrize(
    ("rule", "count", "said"),
    [
        (RoutingRule(kept=("11100",)), 4, "a count of 4 after 0 skipped experts does not fit 3"),
        (RoutingRule(kept=("11100",), skip=1), 3, "a count of 3 after 1 skipped experts does not fit 3"),
        (RoutingRule(4, kept=("11100",)), 2, "a rule lets 3 experts run, but weighs by more"),
        (
            RoutingRule(kept=("11000",)),
            1,
            "a rule lets 2 experts run, but weighs by more",
        ),  # than the trained count's 3
        (RoutingRule(kept=("1100",)), 1, "allowed is of 4 experts, not of 5"),
        (RoutingRule(skip=4), 2, "a count of 2 after 4 skipped experts does not fit 5"),
    ],
)
def test_what_leaves_too_few_experts_is_refused(rule: RoutingRule, count: int, said: str) -> None:
    with pytest.raises(RuntimeError, match=said):
        weights(rule, count)


PROBABILITIES = torch.tensor([[0.4, 0.3, 0.1, 0.15, 0.05]])


def weights(rule: RoutingRule, count: int, normalise: bool = False, trained: int = 3) -> list[float]:
    """Of the five experts above, -1 for those that do not run."""
    rules = Rules((rule,), torch.tensor([0]))
    case = RouteCase(PROBABILITIES.log(), torch.tensor([count]), Router(normalise=normalise), rules, trained)
    return [round(weight, 5) for weight in case.run(torch.arange(1))[0].tolist()]


@pytest.mark.parametrize(
    "rule, count, family, expected",
    [
        (RoutingRule("raw"), 2, True, [0.4, 0.3, -1, -1, -1]),
        (RoutingRule("raw"), 3, True, [0.47059, 0.35294, -1, 0.17647, -1]),  # the trained count: the family's rule
        (RoutingRule("kept"), 2, True, [0.57143, 0.42857, -1, -1, -1]),
        (RoutingRule("kept"), 2, False, [0.48571, 0.36429, -1, -1, -1]),  # 0.85 over 0.7
        (RoutingRule("kept"), 3, False, [0.4, 0.3, -1, 0.15, -1]),
        (RoutingRule(4), 2, True, [0.42105, 0.31579, -1, -1, -1]),  # over 0.95
        (RoutingRule(4), 2, False, [0.35789, 0.26842, -1, -1, -1]),  # 0.85 over 0.95
        (RoutingRule(1), 2, True, [1.0, 0.75, -1, -1, -1]),
        (RoutingRule(threshold=0.3), 5, False, [0.4, 0.3, -1, 0.15, -1]),
        (RoutingRule(threshold=1.0), 5, True, [1.0, -1, -1, -1, -1]),
        (RoutingRule(top_p=0.75), 5, False, [0.4, 0.3, -1, 0.15, -1]),
        (RoutingRule(top_p=0.3), 5, True, [1.0, -1, -1, -1, -1]),
        (RoutingRule(top_p=1.0), 4, False, [0.4, 0.3, 0.1, 0.15, -1]),
        (RoutingRule("kept", top_p=0.3), 2, False, [0.85, -1, -1, -1, -1]),
        (RoutingRule(reuse=3), 2, False, [0.4, 0.3, -1, -1, -1]),  # no other token runs another expert
        (RoutingRule(skip=1), 1, True, [-1, 1.0, -1, -1, -1]),  # rank 2 of SCMoE
        (RoutingRule(skip=1), 2, False, [-1, 0.3, -1, 0.15, -1]),
        (RoutingRule(skip=3), 2, True, [-1, -1, 0.66667, -1, 0.33333]),
        (RoutingRule("kept", skip=1), 2, False, [-1, 0.56667, -1, 0.28333, -1]),  # 0.85 over 0.45
        (RoutingRule(2, skip=1), 1, False, [-1, 0.36429, -1, -1, -1]),  # 0.85 over 0.7
        (RoutingRule(threshold=0.6, skip=1), 4, False, [-1, 0.3, -1, -1, -1]),
        (RoutingRule(top_p=0.4, skip=1), 4, False, [-1, 0.3, -1, 0.15, -1]),
    ],
)
def test_a_rule_by_hand(rule: RoutingRule, count: int, family: bool, expected: list[float]) -> None:
    assert weights(rule, count, family) == expected


def test_reuse_by_hand() -> None:
    """The first token runs 0 and 1, the second 4; both may add one, and the first also has the right to two.

    Where the second skips 4, it runs 0 and adds 1.
    """
    logits = torch.tensor([[0.4, 0.3, 0.1, 0.15, 0.05], [0.2, 0.1, 0.15, 0.05, 0.5]]).log()
    one, two = RoutingRule(reuse=1), RoutingRule("kept", reuse=2)
    past = RoutingRule(skip=1, reuse=3)
    for rules, expected in (
        ((one, past), [[0.4, 0.3, -1, -1, -1], [0.2, 0.1, -1, -1, -1]]),
        ((one, one), [[0.4, 0.3, -1, -1, 0.05], [0.2, -1, -1, -1, 0.5]]),
        ((RoutingRule(), two), [[0.4, 0.3, -1, -1, -1], [0.2125, 0.10625, -1, -1, 0.53125]]),
    ):
        case = RouteCase(logits, torch.tensor([2, 1]), Router(), Rules(rules, torch.arange(2)), 3)
        torch.testing.assert_close(case.run(torch.arange(2)), torch.tensor(expected))


@each_router
def test_at_the_trained_count_no_normaliser_changes_a_bit(router: Router) -> None:
    logits_TE, counts_T = Make(1).normal(40, 20), torch.full((40,), 6)
    family = RouteCase(logits_TE, counts_T, router).run(torch.arange(40))
    rules = Rules((RoutingRule("raw"), RoutingRule("kept"), RoutingRule(9)), torch.arange(40) % 3)
    assert torch.equal(RouteCase(logits_TE, counts_T, router, rules, trained=6).run(torch.arange(40)), family)


TOPK = [(24, 12, 5), (40, 33, 16), (70, 64, 9)]  # width, expert width, experts


@each_kind
@each_router
@pytest.mark.parametrize("width, units, experts", TOPK)
def test_topk_blocks_by_rules(kind: Kind, router: Router, width: int, units: int, experts: int) -> None:
    for rows in (1, 6, 110):
        check(ruled_topk_case(Make(rows), rows, width, units, experts, kind, router=router))


RUNS = [
    (infinity(units=96, block=16), 16),
    (infinity(units=100, block=1, keep_ratio=0.1), 64),
    (infinity(units=96, block=2, draws="points", aggregate="norm"), 64),
]


@each_kind
@pytest.mark.parametrize("config, run", RUNS, ids=str)
def test_infinity_blocks_are_repaired(kind: Kind, config: Infinity, run: int) -> None:
    for rows in (1, 6, 110):
        case = repaired_infinity_case(Make(rows), rows, 48, config, run, kind)
        check(case)
        whole = case.run(torch.arange(rows))
        case.crossover_rows = 1 << 40  # read unit by unit where that is possible
        assert torch.equal(case.run(torch.arange(rows)), whole)


def test_a_layer_that_keeps_nothing_is_still_shifted() -> None:
    """Scores of zero are masks of zero: no pairs, and so no sums, but what the repair adds."""
    for run, units_alone in ((48, False), (48, True)):
        case = repaired_infinity_case(Make(4), 6, 16, infinity(block=4), run, "float")
        case.scores.packed.zero_()
        case.crossover_rows = 1 << 40 if units_alone else 0
        check(case)
        family_T = case.use.budget.rule_T == 0
        assert torch.equal(case.run(torch.arange(6))[family_T], case.x_TD[family_T])


def without_rules(case: TopKCase) -> TopKCase:
    return replace(case, rules=Rules())


@each_kind
def test_rows_without_a_rule_keep_the_bits_of_a_step_without_rules(kind: Kind) -> None:
    """Also where a neighbour reuses what they run."""
    case = ruled_topk_case(Make(3), 60, 40, 33, 16, kind, router=Router(normalise=True))
    case.rules = random_rules(Make(5), case.counts_T, 16, reuse=True)
    assert case.rules.rule_T is not None
    family_T = case.rules.rule_T == 0
    plain = without_rules(case).run(torch.arange(60))
    assert torch.equal(case.run(torch.arange(60))[family_T], plain[family_T])


def test_repair_at_a_count_whose_row_is_one_and_zero_changes_nothing() -> None:
    case = ruled_topk_case(Make(3), 30, 40, 33, 16, "bfloat16", router=Router(normalise=True))
    assert case.repair.scale is not None and case.repair.shift is not None
    case.rules = Rules((RoutingRule(repair=True),), torch.zeros(30, dtype=torch.int64))
    case.repair.scale[5], case.repair.shift[5] = 1, 0
    case.counts_T[:10] = 5
    found, plain = case.run(torch.arange(30)), without_rules(case).run(torch.arange(30))
    assert torch.equal(found[:10], plain[:10]) and not torch.equal(found[10:], plain[10:])


@st.composite
def batches(draw: st.DrawFn) -> tuple[int, Kind, bool, list[int]]:
    """A seed, a kind, a family's rule, and rows in any order and number."""
    rows = draw(st.lists(st.integers(0, 24), min_size=1, max_size=40))
    return draw(st.integers(0, 1 << 30)), draw(st.sampled_from(KINDS)), draw(st.booleans()), rows


@settings(deadline=None)
@given(batches())
def test_a_row_has_the_same_bits_alone_and_among_any_rules(batch: tuple[int, Kind, bool, list[int]]) -> None:
    seed, kind, normalise, rows = batch
    router = Router(normalise=normalise)
    make, rows_r = Make(seed), torch.tensor(rows)
    cases: list[RuledRouteCase | TopKCase | InfinityCase] = [
        ruled_route_case(make, 25, 12, router),
        ruled_topk_case(make, 25, 24, 12, 7, kind, router=router),
        repaired_infinity_case(make, 25, 16, infinity(block=2, keep_ratio=0.1), 48, kind),
    ]
    for case in cases:
        together: Tensor = case.run(rows_r)
        for at, row in enumerate(rows):
            assert torch.equal(together[at], case.run(torch.tensor([row]))[0])
