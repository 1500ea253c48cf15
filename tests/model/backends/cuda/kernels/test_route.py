"""Routing against `choose`, the decoder's own: every family's rule, mixed counts, ties, and what is not a number."""

import pytest
import torch
from torch import Tensor

from model.backends.cuda.kernels.route import TokenRules, route
from model.backends.cuda.kernels.sparse_mixer import sparse_mixer
from model.batch import LayerBudget
from model.budget import RoutingRule
from model.moe.router import choose
from model.shapes.mixtures import Router

EXPERTS, TOKENS = 12, 7

ROUTERS = {
    "olmoe": Router(),
    "qwen3_moe": Router(normalise=True),
    "mixtral": Router(normalise=True, logit_bias=True),
    "deepseek_v2": Router(scale=2.5, groups=4, kept_groups=2),
    "deepseek_v3": Router(
        score="sigmoid",
        normalise=True,
        selection_bias=True,
        groups=4,
        kept_groups=2,
        group_score="top2",
        eps=1e-20,
        scale=2.5,
    ),
    "minimax_m2": Router(score="sigmoid", normalise=True, selection_bias=True),
    "ernie4_5_moe": Router(normalise=True, selection_bias=True, eps=1e-3, clamp_sum=True),
    "llama4": Router(score="sigmoid"),
}


def logits() -> Tensor:
    """Those of every other token have many ties."""
    values_TE = torch.randn(TOKENS, EXPERTS, generator=torch.Generator().manual_seed(4))
    values_TE[::2] = values_TE[::2].round()
    return values_TE


def bias(wanted: bool, seed: int) -> Tensor | None:
    return torch.randn(EXPERTS, generator=torch.Generator().manual_seed(seed)) * 0.2 if wanted else None


def run(logits_TE: Tensor, counts_T: Tensor, router: Router, k_max: int) -> tuple[Tensor, Tensor]:
    """The kernel's experts and weights, in tensors that were full of something else."""
    expert_TK = torch.full((len(logits_TE), k_max), 99, dtype=torch.int32)
    weight_TK = torch.full((len(logits_TE), k_max), torch.nan)
    biases = bias(router.logit_bias, 1), bias(router.selection_bias, 2)
    route(logits_TE, counts_T, router, expert_TK, weight_TK, *biases)
    return expert_TK, weight_TK


def expected(logits_TE: Tensor, counts_T: Tensor, router: Router, k_max: int) -> tuple[Tensor, Tensor]:
    """What the decoder chooses, with the sentinel beyond each token's count."""
    if router.logit_bias:
        logits_TE = logits_TE + bias(True, 1)
    choice = choose(logits_TE, LayerBudget(counts_T, k_max), router, bias(router.selection_bias, 2), trained=2)
    runs_TK = choice.runs_TK
    return torch.where(runs_TK, choice.expert_TK, EXPERTS).int(), torch.where(runs_TK, choice.weight_TK, 0.0)


@pytest.mark.parametrize("router", ROUTERS.values(), ids=ROUTERS)
def test_every_rule_at_mixed_counts(router: Router) -> None:
    most = EXPERTS // router.groups * router.kept_groups
    counts_T = 1 + torch.arange(TOKENS) * 5 % most
    found, wanted = (function(logits(), counts_T, router, most) for function in (run, expected))
    assert torch.equal(found[0], wanted[0])
    torch.testing.assert_close(found[1], wanted[1], atol=1e-6, rtol=1e-5)


def test_a_tokens_bits_depend_on_no_other() -> None:
    """Alone, and with more ranks than it uses."""
    router, counts_T = ROUTERS["qwen3_moe"], torch.tensor([3, 1, 2, 3, 1, 2, 3])
    expert_TK, weight_TK = run(logits(), counts_T, router, 3)
    wide_expert_TK, wide_weight_TK = run(logits(), counts_T, router, EXPERTS)
    assert torch.equal(wide_expert_TK[:, :3], expert_TK) and torch.equal(wide_weight_TK[:, :3], weight_TK)
    assert (wide_expert_TK[:, 3:] == EXPERTS).all() and (wide_weight_TK[:, 3:] == 0).all()
    for token in range(TOKENS):
        one = slice(token, token + 1)
        expert_1K, weight_1K = run(logits()[one], counts_T[one], router, int(counts_T[token]))
        assert torch.equal(expert_1K[0], expert_TK[token, : counts_T[token]])
        assert torch.equal(weight_1K[0], weight_TK[token, : counts_T[token]])


def test_large_logits_of_a_sigmoid_stay_apart() -> None:
    """The sigmoid of each is 1 in float32."""
    expert_TK, weight_TK = run(torch.arange(20.0, 32.0)[None], torch.tensor([3]), ROUTERS["llama4"], 3)
    assert expert_TK.tolist() == [[11, 10, 9]] and weight_TK.tolist() == [[1.0, 1.0, 1.0]]


def test_no_count_is_no_expert() -> None:
    """A row that only fills a bucket of a graph."""
    expert_TK, weight_TK = run(logits(), torch.tensor([0, 2] * 3 + [0]), ROUTERS["mixtral"], 2)
    assert (expert_TK[::2] == EXPERTS).all() and (weight_TK[::2] == 0).all()
    assert (expert_TK[1::2] < EXPERTS).all()


@pytest.mark.parametrize(
    ("name", "value"),
    [("olmoe", torch.nan), ("olmoe", torch.inf), ("deepseek_v3", torch.nan), ("deepseek_v3", -torch.inf)],
)
def test_experts_stay_in_range_whatever_the_logits(value: float, name: str) -> None:
    logits_TE, router = logits(), ROUTERS[name]
    logits_TE[2, 4], logits_TE[5] = value, value
    counts_T = torch.full((TOKENS,), 6)
    expert_TK, _ = run(logits_TE, counts_T, router, 6)
    for chosen in expert_TK.tolist():
        assert len({*chosen}) == 6 and {*chosen} <= {*range(EXPERTS)}
    clean_TK, _ = run(logits(), counts_T, router, 6)
    others = [token for token in range(TOKENS) if token not in (2, 5)]
    assert torch.equal(expert_TK[others], clean_TK[others])


def test_half_precision_logits() -> None:
    half_TE, counts_T = logits().half(), torch.arange(TOKENS) % 4 + 1
    found = run(half_TE, counts_T, ROUTERS["olmoe"], 4)
    wanted = expected(half_TE.float(), counts_T, ROUTERS["olmoe"], 4)
    assert torch.equal(found[0], wanted[0])
    torch.testing.assert_close(found[1], wanted[1])


RULES = (
    RoutingRule(),
    RoutingRule("raw"),
    RoutingRule("kept", threshold=0.4),
    RoutingRule(5, top_p=0.5),
    RoutingRule("kept", top_p=0.4),
    RoutingRule(skip=1),
    RoutingRule(6, threshold=0.3, top_p=0.9, skip=2),
)


@pytest.mark.parametrize("name", ["olmoe", "qwen3_moe", "deepseek_v3", "ernie4_5_moe"])
def test_rules_of_requests(name: str) -> None:
    """Every token has a rule of its own, and counts lie on both sides of the trained one, 3."""
    router, counts_T = ROUTERS[name], torch.tensor([2, 2, 2, 2, 6, 1, 4])
    budget = LayerBudget(counts_T, 6, RULES, torch.tensor([0, 1, 2, 3, 4, 5, 6]))
    selection_bias_E = bias(router.selection_bias, 2)
    choice = choose(logits(), budget, router, selection_bias_E, trained=3)
    expert_TK, weight_TK = torch.full((TOKENS, 6), 99, dtype=torch.int32), torch.full((TOKENS, 6), torch.nan)
    rules = TokenRules.of(budget, trained=3)
    route(logits(), counts_T, router, expert_TK, weight_TK, None, selection_bias_E, rules)
    wanted_TK = choice.routes_TK[:, :6]
    assert int(choice.used_T[4]) < 6  # its share is reached earlier
    assert torch.equal(expert_TK, torch.where(wanted_TK >= 0, wanted_TK, EXPERTS))
    weight_TE, _ = choice.by_expert(EXPERTS)
    found_TE = torch.zeros(TOKENS, EXPERTS + 1).scatter(-1, expert_TK.long(), weight_TK)[:, :EXPERTS]
    torch.testing.assert_close(found_TE, weight_TE, atol=1e-6, rtol=1e-5)


REUSES = (
    RoutingRule(),
    RoutingRule(reuse=3),
    RoutingRule(reuse=1, threshold=0.6, skip=1),
    RoutingRule("raw", reuse=20),
)


@pytest.mark.parametrize("name", ["olmoe", "qwen3_moe", "deepseek_v3"])
def test_experts_that_the_batch_runs_anyway(name: str) -> None:
    """One token has no count: what it would choose is no part of the batch, and it reuses nothing."""
    router, counts_T = ROUTERS[name], torch.tensor([2, 1, 2, 0, 4, 1, 3])
    most = EXPERTS // router.groups * router.kept_groups
    budget = LayerBudget(counts_T, 4, REUSES, torch.tensor([0, 1, 2, 3, 1, 3, 3]))
    selection_bias_E = bias(router.selection_bias, 2)
    present_T = torch.arange(TOKENS) != 3
    of_present = LayerBudget(counts_T[present_T], 4, REUSES, budget.rule_T[present_T])
    choice = choose(logits()[present_T], of_present, router, selection_bias_E, trained=2)
    rules = TokenRules.of(budget, trained=2)
    assert rules is not None and rules.most_reuse == 20
    expert_TK, weight_TK = (
        torch.full((TOKENS, EXPERTS), 99, dtype=torch.int32),
        torch.full((TOKENS, EXPERTS), torch.nan),
    )
    route(logits(), counts_T, router, expert_TK, weight_TK, None, selection_bias_E, rules)
    wanted_TK = choice.routes_TK
    assert torch.equal(expert_TK[present_T], torch.where(wanted_TK >= 0, wanted_TK, EXPERTS))
    assert (expert_TK[3] == EXPERTS).all() and (weight_TK[3] == 0).all()
    weight_TE, _ = choice.by_expert(EXPERTS)
    found_TE = torch.zeros(TOKENS, EXPERTS + 1).scatter(-1, expert_TK.long(), weight_TK)[present_T, :EXPERTS]
    torch.testing.assert_close(found_TE, weight_TE, atol=1e-6, rtol=1e-5)
    used_T = (expert_TK < EXPERTS).sum(-1)
    assert int(used_T.max()) <= most and (used_T > counts_T).any()


def test_rules_come_from_the_device_without_a_copy_back() -> None:
    """The meta device has no values: whatever read one would fail."""
    counts_T = torch.ones(TOKENS, dtype=torch.int64, device="meta")
    budget = LayerBudget(counts_T, 1, (*REUSES, RoutingRule(repair=True)), torch.zeros_like(counts_T))
    rules = TokenRules.of(budget, trained=2)
    assert rules is not None and rules.reuse_T is not None and rules.repair_T is not None
    assert {rules.normaliser_T.dtype, rules.reuse_T.dtype, rules.repair_T.dtype} == {torch.int32}
    assert TokenRules.of(LayerBudget(counts_T, 1), trained=2) is None


@pytest.mark.parametrize("jitter", [0.01, 0.3])
def test_the_sparse_mixer(jitter: float) -> None:
    """Logits with ties; one token has no count."""
    counts_T = torch.tensor([2, 1, 2, 0, 2, 1, 2])
    expert_TK, weight_TK = torch.full((TOKENS, 2), 99, dtype=torch.int32), torch.full((TOKENS, 2), torch.nan)
    sparse_mixer(logits(), counts_T, jitter, expert_TK, weight_TK)
    router = Router("sparse_mixer", jitter=jitter)
    choice = choose(logits(), LayerBudget(counts_T, 2), router, None, trained=2)
    assert torch.equal(expert_TK, torch.where(choice.runs_TK, choice.expert_TK, EXPERTS).int())
    torch.testing.assert_close(weight_TK, torch.where(choice.runs_TK, choice.weight_TK, 0.0), atol=1e-6, rtol=1e-5)


def test_what_has_no_kernel_is_named() -> None:
    with pytest.raises(ValueError, match="sparse mixer has a kernel of its own"):
        run(logits(), torch.ones(TOKENS), Router(score="sparse_mixer"), 2)
    with pytest.raises(ValueError, match="13 ranks cannot be routed to 12 experts"):
        run(logits(), torch.ones(TOKENS), Router(), 13)
