"""Routing against `choose`, the decoder's own: every family's rule, mixed counts, ties, and what is not a number."""

import pytest
import torch
from torch import Tensor

from model.backends.cuda.kernels.route import route
from model.batch import LayerBudget
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


def test_what_has_no_kernel_is_named() -> None:
    with pytest.raises(NotImplementedError, match="sparse mixer"):
        run(logits(), torch.ones(TOKENS), Router(score="sparse_mixer"), 2)
    with pytest.raises(ValueError, match="13 ranks cannot be routed to 12 experts"):
        run(logits(), torch.ones(TOKENS), Router(), 13)
