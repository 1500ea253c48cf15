"""Contrasted logits: the published formula in float64, row by row, and nothing else of a step's logits changes."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from engine.plan import Chunk, Plan, rows_of
from engine.sampling.contrast import LEFT_OUT, contrasted, joined
from engine.sequence import Sequence
from model.contrast import Contrast
from tests.engine.fake import request

VOCABULARY = 13


def formula(strong: list[float], weak: list[float], contrast: Contrast) -> list[float]:
    """SCMoE's (arXiv 2405.14507), with minus infinity for what is left out."""
    least = math.log(contrast.alpha) + max(strong)
    pairs = zip(strong, weak, strict=True)
    return [(1 + contrast.beta) * s - contrast.beta * w if s >= least else -math.inf for s, w in pairs]


def logits(rows: int, seed: int = 0) -> Tensor:
    return 2 * torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(seed))


def of(contrasts: list[Contrast]) -> tuple[Tensor, Tensor]:
    betas, alphas = [each.beta for each in contrasts], [math.log(each.alpha) for each in contrasts]
    return torch.tensor(betas), torch.tensor(alphas)


CONTRASTS = st.builds(Contrast, beta=st.floats(0.01, 10), alpha=st.floats(1e-3, 1.0))


@given(st.lists(CONTRASTS, min_size=1, max_size=4), st.integers(0, 99))
def test_rows_follow_the_formula(contrasts: list[Contrast], seed: int) -> None:
    strong_PV, weak_PV = logits(len(contrasts), seed), logits(len(contrasts), seed + 1000)
    found_PV = contrasted(strong_PV, weak_PV, *of(contrasts))
    assert torch.isfinite(found_PV).all(), "samplers take finite logits only"
    for row, contrast in enumerate(contrasts):
        strong_V = strong_PV[row]
        expected = formula(strong_V.double().tolist(), weak_PV[row].double().tolist(), contrast)
        edge = math.log(contrast.alpha) + float(strong_V.max())
        for token, value in enumerate(expected):
            if abs(float(strong_V[token]) - edge) < 1e-4 and contrast.alpha < 1:
                continue  # as float32 rounds it
            if value == -math.inf:
                assert found_PV[row, token] == strong_V[token] + LEFT_OUT
            else:
                assert float(found_PV[row, token]) == pytest.approx(value, abs=1e-4)


def test_only_the_best_tokens_are_left_at_alpha_1() -> None:
    strong_PV = torch.tensor([[1.0, 3.0, 3.0, 2.9]])
    found_V = contrasted(strong_PV, torch.tensor([[0.0, 5.0, 4.0, 0.0]]), *of([Contrast(0.5, 1.0)]))[0]
    assert found_V[1:3].tolist() == [2.0, 2.5] and (found_V[[0, 3]] < -9e4).all()
    assert float(found_V.softmax(-1)[0]) == 0.0 and float((found_V / 100).softmax(-1)[0]) == 0.0, "at any temperature"


def test_what_is_left_out_keeps_the_order_of_the_strong_row() -> None:
    strong_PV = torch.tensor([[9.0, 1.0, 2.0, -3.0]])
    found_V = contrasted(strong_PV, torch.tensor([[0.0, 9.0, -9.0, 0.0]]), *of([Contrast()]))[0]
    assert found_V.argsort(descending=True).tolist() == [0, 2, 1, 3]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("which", ["strong", "weak"])
def test_a_row_is_not_finite_where_one_of_its_two_is_not(which: str, bad: float) -> None:
    rows = {"strong": logits(2), "weak": logits(2, 1)}
    rows[which][1, 5] = bad
    found_PV = contrasted(rows["strong"], rows["weak"], *of([Contrast()] * 2))
    assert torch.isfinite(found_PV[0]).all() and not torch.isfinite(found_PV[1]).all()


def plan_of(*contrasts: Contrast | None, **options: Any) -> Plan:
    sequences = [Sequence(request(str(number), contrast=each, **options), 0.0) for number, each in enumerate(contrasts)]
    return tuple(Chunk(sequence, 0, 3) for sequence in sequences)


def test_two_rows_of_a_plan_become_one_and_others_keep_their_bits() -> None:
    first, last = Contrast(0.3, 0.2), Contrast(0.9, 0.01, 3)
    plan = plan_of(None, first, None, last)
    logits_RV = logits(6)
    found_RV = joined(logits_RV, plan)
    assert torch.equal(found_RV[[0, 2]], logits_RV[[0, 3]])
    assert torch.equal(found_RV[[1]], contrasted(logits_RV[[1]], logits_RV[[2]], *of([first])))
    assert torch.equal(found_RV[[3]], contrasted(logits_RV[[4]], logits_RV[[5]], *of([last])))


def test_rows_that_score_a_prompt_stay_the_strong_ones() -> None:
    plan = plan_of(Contrast(), None, prompt_logprobs=0)
    logits_RV = logits(3 + 2 * 2)  # to sample from, then two of each prompt
    found_RV = joined(logits_RV, plan)
    assert torch.equal(found_RV[1:], logits_RV[2:]) and len(found_RV) == 6


def test_a_plan_without_contrast_is_not_touched() -> None:
    plan, logits_RV = plan_of(None, Contrast(beta=0)), logits(2)
    assert rows_of(plan) is plan and joined(logits_RV, plan) is logits_RV


def test_a_weak_row_has_the_same_tokens_and_its_own_budget() -> None:
    own, weak = rows_of(plan_of(Contrast(weak_rank=3), prompt_logprobs=0))
    assert weak.sequence.tokens is own.sequence.tokens and weak.sequence.blocks is not own.sequence.blocks
    assert weak.sequence.request.budget.rule.skip == 2 and weak.count_runs == (((1, 1), 3),)
    assert not weak.scored_positions and own.scored_positions
