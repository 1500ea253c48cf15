"""A sparse mixture of kernels against the decoder's own module, at mixed counts; a row's bits alone and in a batch."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from model.backends.cuda.kernels.norm import Norm, residual_norm
from model.backends.cuda.kernels.operands import Weight
from model.backends.cuda.kernels.route import TokenRules
from model.backends.cuda.layer import MoELayer, moe_layer, refusal, row_tile
from model.backends.cuda.quantise import precision_for, quantised
from model.batch import LayerBudget
from model.budget import RoutingRule
from model.moe.repair import RepairTables, repaired
from model.moe.topk import TopKMixture
from model.options import Options, Quantize, QuantizeLayers
from model.shapes.mixtures import Dense, Router, TopK
from tests.model.tiny import randomise, use

WIDTH = 32


@pytest.fixture(autouse=True)
def poisoned(poison: None) -> None:
    """Nothing may be read that was not written."""


SHAPES = {
    "olmoe": TopK(6, 20, 2),
    "qwen3_moe": TopK(6, 20, 2, Router(normalise=True)),
    "mixtral": TopK(4, 70, 2, Router(normalise=True)),
    "gpt_oss": TopK(
        5, 20, 2, Router(normalise=True, logit_bias=True), activation="swiglu_clamped", bias=True, interleaved=True
    ),
    "qwen2_moe": TopK(6, 20, 2, shared=Dense(24, "silu"), shared_gate=True),
    "deepseek_v3": TopK(
        8,
        20,
        2,
        Router("sigmoid", True, 2.5, selection_bias=True, groups=4, kept_groups=2, group_score="top2", eps=1e-20),
        shared=Dense(24, "silu"),
    ),
    "llama4": TopK(6, 20, 1, Router("sigmoid", weigh_input=True), shared=Dense(24, "silu")),
    "phimoe": TopK(6, 20, 2, Router("sparse_mixer")),
}


def mixture(shape: TopK, dtype: torch.dtype = torch.float32) -> TopKMixture:
    module = TopKMixture(WIDTH, shape)
    randomise(module)
    return module.requires_grad_(False).to(dtype)


def tokens(count: int) -> Tensor:
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(3))


def dequantised(matrix: Tensor, kind: Quantize) -> Tensor:
    made = quantised(Weight(matrix if matrix.ndim == 3 else matrix[None]), kind)
    assert made.scale_EO is not None
    return (made.values_EOD.float() * made.scale_EO[..., None]).view(matrix.shape)


def run(layer: MoELayer, x_TD: Tensor, counts: list[int]) -> Tensor:
    """What the mixture adds to a residual of zeros."""
    residual_TD = torch.zeros(x_TD.shape)
    layer(x_TD, torch.tensor(counts), max(counts), residual_TD)
    return residual_TD


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_mixed_counts_as_the_decoder_computes_them(shape: TopK) -> None:
    module, x_TD = mixture(shape), tokens(11)
    counts = [1 + token % shape.maximum for token in range(11)]
    assert {1, shape.maximum} <= {*counts}
    found_TD = run(moe_layer(module), x_TD, counts)
    torch.testing.assert_close(found_TD, module(x_TD, use(counts)), atol=2e-5, rtol=2e-5)


def test_half_precision() -> None:
    module, counts = mixture(SHAPES["qwen3_moe"]), [2, 6, 1]
    wanted_TD = module(tokens(3), use(counts))
    found_TD = run(moe_layer(module.half()), tokens(3).half(), counts)
    torch.testing.assert_close(found_TD, wanted_TD, atol=5e-3, rtol=5e-3)


@pytest.mark.parametrize(("name", "covered"), [("gpt_oss", "experts"), ("qwen2_moe", "experts"), ("qwen2_moe", "all")])
@pytest.mark.parametrize("kind", ["int8-weights", "fp8-weights"])
def test_experts_of_8_bits(name: str, covered: QuantizeLayers, kind: Quantize) -> None:
    """As a module whose weights are those of 8 bits; the router and the gate of the shared part stay."""
    module, counts = mixture(SHAPES[name]), [3, 1, 2]
    layer = moe_layer(module, precision=precision_for(Options(quantize=kind, quantize_layers=covered)))
    changed: list[Tensor] = [module.gate_up, module.down]
    if covered == "all":
        changed += [module.shared.up.weight, module.shared.down.weight]
    for matrix in changed:
        matrix.copy_(dequantised(matrix, kind))
    torch.testing.assert_close(run(layer, tokens(3), counts), module(tokens(3), use(counts)), atol=2e-5, rtol=2e-5)


def test_single_pairs_take_no_layout() -> None:
    """Two pairs of 16 experts: each is a tile of its own."""
    module, x_TD = mixture(TopK(16, 20, 2)), tokens(2)
    torch.testing.assert_close(run(moe_layer(module), x_TD, [1, 1]), module(x_TD, use([1, 1])), atol=1e-5, rtol=1e-5)


def test_rows_alone_have_the_bits_that_they_have_in_a_batch(chains: None) -> None:
    """Also where the batch has taller tiles, and where the largest count is another's."""
    module, x_TD = mixture(SHAPES["deepseek_v3"]), tokens(9)
    layer, counts = moe_layer(module), [1, 4, 2, 3, 1, 2, 4, 1, 3]
    together_TD = run(layer, x_TD, counts)
    assert torch.equal(run(layer, x_TD.repeat(6, 1), counts * 6)[-9:], together_TD)
    for token in (0, 3, 8):
        assert torch.equal(run(layer, x_TD[token, None], [counts[token]])[0], together_TD[token])


def test_the_residual_and_the_next_norm() -> None:
    module, x_TD, counts = mixture(SHAPES["olmoe"]), tokens(5), [1, 6, 2, 3, 4]
    residual_TD, norm, out_TD = 5 * tokens(5), Norm(torch.ones(WIDTH), 1e-5), torch.full((5, WIDTH), torch.nan)
    wanted_TD = residual_TD + 0.5 * module(x_TD, use(counts))
    moe_layer(module)(x_TD, torch.tensor(counts), 6, residual_TD, norm, out_TD, scale=0.5)
    torch.testing.assert_close(residual_TD, wanted_TD, atol=2e-5, rtol=2e-5)
    again_TD = torch.full_like(out_TD, torch.nan)
    residual_norm(residual_TD, norm, again_TD)
    assert torch.equal(out_TD, again_TD)


def test_a_threshold_leaves_pairs_out() -> None:
    """As the decoder leaves them out, so that the layer computes fewer."""
    module, x_TD, counts = mixture(SHAPES["qwen3_moe"]), tokens(5), [1, 6, 2, 3, 4]
    rules = (RoutingRule("kept"), RoutingRule("raw", threshold=0.5))
    rule_T = torch.tensor([0, 1, 0, 1, 1])
    budget = LayerBudget(torch.tensor(counts), 6, rules, rule_T)
    residual_TD = torch.zeros(5, WIDTH)
    given = (x_TD, budget.counts_T, 6, residual_TD)
    routing = moe_layer(module)(*given, rules=TokenRules.of(budget, module.config.trained))
    torch.testing.assert_close(residual_TD, module(x_TD, replace(use(counts), budget=budget)), atol=2e-5, rtol=2e-5)
    assert int(routing.loads_E.sum()) < sum(counts)


def test_experts_that_the_batch_runs_anyway() -> None:
    module, x_TD, counts = mixture(SHAPES["deepseek_v3"]), tokens(5), [1, 4, 2, 1, 1]
    rules, rule_T = (RoutingRule(), RoutingRule(reuse=2)), torch.tensor([0, 1, 0, 1, 1])
    budget, residual_TD = LayerBudget(torch.tensor(counts), 4, rules, rule_T), torch.zeros(5, WIDTH)
    given = (x_TD, budget.counts_T, 4, residual_TD)
    routing = moe_layer(module)(*given, rules=TokenRules.of(budget, module.config.trained))
    torch.testing.assert_close(residual_TD, module(x_TD, replace(use(counts), budget=budget)), atol=2e-5, rtol=2e-5)
    assert int(routing.loads_E.sum()) > sum(counts)


def test_repair_by_the_row_of_a_tokens_count() -> None:
    """Beside tokens without it; the shared part is repaired too, and the residual's factor comes after it."""
    module, x_TD, counts = mixture(SHAPES["qwen2_moe"]), tokens(5), [1, 6, 2, 3, 1]
    rules, rule_T = (RoutingRule(), RoutingRule(repair=True)), torch.tensor([0, 1, 1, 1, 1])
    budget = LayerBudget(torch.tensor(counts), 6, rules, rule_T)
    generator = torch.Generator().manual_seed(6)
    tables = RepairTables(*(torch.randn(7, WIDTH, generator=generator) for _ in range(2)))
    wanted_TD = repaired(module(x_TD, replace(use(counts), budget=budget)), budget, tables)
    of_requests, residual_TD = TokenRules.of(budget, module.config.trained), torch.zeros(5, WIDTH)
    moe_layer(module, tables)(x_TD, budget.counts_T, 6, residual_TD, scale=0.5, rules=of_requests)
    torch.testing.assert_close(residual_TD, 0.5 * wanted_TD, atol=5e-5, rtol=5e-5)
    with pytest.raises(ValueError, match="no statistics were loaded"):
        moe_layer(module)(x_TD, budget.counts_T, 6, residual_TD, rules=of_requests)


def test_loads_count_the_pairs_that_ran() -> None:
    module, x_TD, counts = mixture(SHAPES["olmoe"]), tokens(5), [1, 6, 2, 3, 4]
    routing = moe_layer(module)(x_TD, torch.tensor(counts), 6, torch.zeros(5, WIDTH))
    assert torch.equal(routing.loads_E, module.route(module.logits(x_TD), use(counts)).load_E)
    assert int(routing.loads_E.sum()) == sum(counts)


def test_tiles_follow_the_rows_of_an_expert() -> None:
    assert [row_tile(rows).rows for rows in (0, 16, 17, 64, 65, 5000)] == [16, 16, 32, 64, 128, 128]


def test_a_sparse_mixer_with_more_than_its_own_rule_is_refused_by_name() -> None:
    shape = TopK(4, 8, 2, Router("sparse_mixer", scale=2.0))
    assert "a sparse mixer with biases" in refusal(shape) and refusal(SHAPES["phimoe"]) is None
    with pytest.raises(ValueError, match="a sparse mixer with biases"):
        moe_layer(mixture(shape))
