"""Repair of a mixture's output: by the row of a token's count, only where its rule has it, neutral as trained."""

import pytest
import torch
from torch import Tensor

from model.backends.torch.attend import WholeAttend
from model.batch import Batch, BudgetRows, LayerBudget
from model.budget import FAMILY_RULE, RoutingRule
from model.decoder import Decoder, Layer
from model.moe.repair import RepairTables, repaired
from model.shapes.feed_forward import FeedForward
from tests.model.tiny import budget_rows, decoder, infinity, llama_like, topk

RULES = (FAMILY_RULE, RoutingRule(repair=True))
KINDS = {"topk": topk(), "infinity": infinity()}
each_kind = pytest.mark.parametrize("shape", KINDS.values(), ids=KINDS)
WIDTH, TRAINED = 24, 2


def tables(shape: FeedForward) -> RepairTables:
    """Made-up statistics of every count."""
    generator = torch.Generator().manual_seed(4)
    size = (shape.maximum + 1, WIDTH)
    scale_KD, shift_KD = torch.rand(size, generator=generator) + 0.5, torch.randn(size, generator=generator)
    scale_KD[TRAINED], shift_KD[TRAINED] = 1, 0
    return RepairTables(scale_KD, shift_KD)


def logits(model: Decoder, counts: list[int], rules: list[int]) -> Tensor:
    """Of one sequence with these counts and numbers of rules."""
    tokens = len(counts)
    plain = budget_rows(torch.tensor(counts)[None])
    budget = BudgetRows(plain.counts_LT, plain.k_max, plain.pairs_L, RULES, torch.tensor(rules))
    whole_T = torch.arange(tokens)
    batch = Batch(whole_T, whole_T, torch.zeros(tokens, dtype=torch.int64), budget, whole_T)
    result: Tensor = model(batch, WholeAttend(tokens))
    return result


def served(shape: FeedForward) -> Decoder:
    model = decoder(llama_like(shape))
    layer = model.layers[0]
    assert isinstance(layer, Layer)
    layer.repair = tables(shape)
    return model


def given(counts: list[int], rules: list[int]) -> LayerBudget:
    return LayerBudget(torch.tensor(counts), max(counts), RULES, torch.tensor(rules))


@each_kind
def test_the_row_of_the_count_scales_and_shifts(shape: FeedForward) -> None:
    y_TD = torch.randn(4, WIDTH)
    found = repaired(y_TD, given([1, 1, 2, 3], [1, 0, 1, 1]), of := tables(shape))
    expected = [y_TD[0] * of.scale_KD[1] + of.shift_KD[1], y_TD[1], y_TD[2], y_TD[3] * of.scale_KD[3] + of.shift_KD[3]]
    assert torch.equal(found, torch.stack(expected))
    rounded = repaired(y_TD.bfloat16(), given([1, 1, 2, 3], [1, 0, 1, 1]), of)
    assert rounded.dtype == torch.bfloat16 and torch.allclose(rounded.float(), found, atol=0.05)


@each_kind
def test_a_decoder_repairs_only_who_asks_for_it(shape: FeedForward) -> None:
    model = served(shape)
    plain = logits(model, [1, 1, 3], [0, 0, 0])
    asked = logits(model, [1, 1, 3], [0, 0, 1])
    assert torch.equal(plain[:2], asked[:2]) and not torch.allclose(plain[2], asked[2], atol=1e-2)


@each_kind
def test_repair_changes_nothing_at_the_trained_count(shape: FeedForward) -> None:
    model = served(shape)
    assert torch.equal(logits(model, [TRAINED] * 5, [0] * 5), logits(model, [TRAINED] * 5, [1] * 5))


@each_kind
def test_repair_without_statistics_is_an_error(shape: FeedForward) -> None:
    with pytest.raises(ValueError, match="no statistics"):
        logits(decoder(llama_like(shape)), [1], [1])
