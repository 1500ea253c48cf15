"""Every kind of router: scores, biases, groups, scales and least sums, with and without rules of requests."""

from dataclasses import replace

import pytest
import torch

from model.budget import RoutingRule
from model.shapes.mixtures import Router
from tests.model.backends.cpu.kernels.cases import KINDS, Make, assert_close, check, ops
from tests.model.backends.cpu.kernels.mixture_cases import RouteCase, Rules, route_case, topk_case
from tests.model.backends.cpu.kernels.rule_cases import random_rules

ROUTERS = {
    "sigmoid": Router("sigmoid"),
    "normalised": Router("sigmoid", normalise=True),
    "glm4": Router("sigmoid", normalise=True, scale=2.5, selection_bias=True, eps=1e-20),
    "ernie": Router(normalise=True, selection_bias=True, eps=0.3, clamp_sum=True),
    "deepseek-v2": Router(scale=16.0, groups=4, kept_groups=2),
    "deepseek-v3": Router(
        "sigmoid",
        normalise=True,
        scale=2.5,
        selection_bias=True,
        groups=4,
        kept_groups=3,
        group_score="top2",
        eps=1e-20,
    ),
}
MIXER = Router("sparse_mixer", jitter=0.3)
each = pytest.mark.parametrize("name", ROUTERS)
SHAPES = [(1, 8), (50, 16), (7, 132)]  # rows, experts


def most(router: Router, experts: int) -> int:
    return experts // router.groups * router.kept_groups


@each
@pytest.mark.parametrize("ties", [False, True])
def test_choices(name: str, ties: bool) -> None:
    router = ROUTERS[name]
    for rows, experts in SHAPES:
        check(route_case(Make(rows), rows, experts, router, ties, most(router, experts)))


def test_the_sparse_mixer() -> None:
    for rows, experts in SHAPES:
        check(route_case(Make(rows), rows, experts, MIXER, most=2))


def ruled(make: Make, rows: int, experts: int, router: Router, reuse: bool = False) -> RouteCase:
    """Each row by a rule of its own."""
    limit = most(router, experts)
    case = route_case(make, rows, experts, router, most=limit - 2)
    rules = random_rules(make, case.counts_T, limit, reuse)
    return replace(case, rules=rules, trained=make.rng.randint(1, limit))


@each
def test_choices_by_rules(name: str) -> None:
    for rows, experts in SHAPES:
        check(ruled(Make(rows), rows, experts, ROUTERS[name]))


@each
def test_what_the_step_runs_is_reused(name: str) -> None:
    for rows, experts in SHAPES:
        case = ruled(Make(rows + 1), rows, experts, ROUTERS[name], reuse=True)
        assert_close(case.run(torch.arange(rows)), case.expected(), False)


@pytest.mark.parametrize("router", [ROUTERS["sigmoid"], ROUTERS["glm4"], ROUTERS["ernie"], MIXER], ids=str)
def test_kept_experts_are_routed_as_if_there_were_no_others(router: Router) -> None:
    """Bit for bit."""
    make = Make(5)
    for experts, left in ((9, 4), (130, 101)):
        limit = 2 if router == MIXER else left - 2
        case = route_case(make, 40, left, router, most=limit)
        case = replace(case, trained=2)
        kept = sorted(make.rng.sample(range(experts), left))
        logits_TE, bias_E = make.normal(40, experts, scale=2), make.normal(experts)
        logits_TE[:, kept] = case.logits_TE
        if case.selection_bias_E is not None:
            bias_E[kept] = case.selection_bias_E
        rule = RoutingRule(kept=("".join("1" if expert in kept else "0" for expert in range(experts)),))
        if router != MIXER:
            rule = replace(rule, normaliser="kept", top_p=0.5)
            case = replace(case, rules=Rules((replace(rule, kept=()),), torch.zeros(40).long()))
        rules = Rules((rule,), torch.zeros(40).long())
        biases = bias_E if router.selection_bias else None
        found_TE = RouteCase(logits_TE, case.counts_T, router, rules, 2, biases).run(torch.arange(40))
        assert torch.equal(found_TE[:, kept], case.run(torch.arange(40)))
        assert (found_TE >= 0).sum() == (found_TE[:, kept] >= 0).sum()


@each
def test_what_is_not_a_number_comes_last(name: str) -> None:
    """Also where nothing is one, each expert is there once."""
    case = route_case(Make(3), 3, 16, ROUTERS[name])
    case.logits_TE[0, 3], case.logits_TE[1] = torch.nan, torch.nan
    case = replace(case, counts_T=torch.tensor([most(ROUTERS[name], 16) // 2, 7, 3]))
    found_TE = case.run(torch.arange(3))
    if ROUTERS[name].score == "sigmoid":
        assert found_TE[0, 3] == -1 and found_TE[0].isfinite().all()
    assert found_TE[1].isnan().sum() == 7 and found_TE[2].isfinite().all()


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_extreme_scores(score: str) -> None:
    """Large logits are ranked by themselves; scores that vanish are chosen in order, and weigh nothing."""
    logits = torch.tensor([[99.0, 98.0, 97.0, -200.0], [-200.0, -300.0, -150.0, -torch.inf]])
    router = Router(score)  # type: ignore[arg-type]
    for count in (1, 2, 3):
        check(RouteCase(logits, torch.tensor([count] * 2), router))
        kept = Rules((RoutingRule("kept"),), torch.tensor([0, 0]))
        check(RouteCase(logits[:, :3], torch.tensor([count] * 2), router, kept, trained=3))


@each
def test_threads_change_nothing(name: str) -> None:
    case = ruled(Make(2), 60, 256, ROUTERS[name])
    results = []
    for threads in (1, 3):
        ops.set_threads(threads)
        results.append(case.run(torch.arange(60)))
    assert torch.equal(*results)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_of_inputs(kind: str) -> None:
    """A weight multiplies what the expert reads."""
    router = Router("sigmoid", weigh_input=True)
    case = topk_case(Make(4), 20, 24, 16, 6, kind, router=router, bias=True)  # type: ignore[arg-type]
    check(case)
    outputs = replace(case, shape=replace(router, weigh_input=False))
    assert not torch.allclose(outputs.run(torch.arange(20)), case.run(torch.arange(20)), atol=0.1)
