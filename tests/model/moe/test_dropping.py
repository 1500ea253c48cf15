"""Choices that do not run equal their definition, token by token; sequences do not compete with each other."""

from math import ceil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.batch import Span
from model.moe.base import Choice
from model.moe.dropping import kept
from model.shapes.dropping import Dropping
from model.shapes.mixtures import Router

EXPERTS, SCALE = 4, 0.8


def choice(seed: int, tokens: int, counts: list[int]) -> tuple[Choice, torch.Tensor]:
    """The best experts of random scores, as a router that normalises weighs them."""
    scores_TE = torch.randn(tokens, EXPERTS, generator=torch.Generator().manual_seed(seed)).softmax(-1)
    best = scores_TE.sort(dim=-1, descending=True, stable=True)
    runs_TK = torch.arange(EXPERTS) < torch.tensor(counts)[:, None]
    weight_TK = best.values / (best.values * runs_TK).sum(-1, keepdim=True) * SCALE
    return Choice(best.indices, weight_TK, runs_TK), scores_TE


def expected(made: Choice, scores_TE: torch.Tensor, spans: list[Span], dropping: Dropping) -> list[dict[int, float]]:
    """Of each token, the experts that run and their weights."""
    wanted = [
        [(int(e), float(w)) for e, w, r in zip(*row, strict=True) if r]
        for row in zip(made.expert_TK, made.weight_TK, made.runs_TK, strict=True)
    ]
    wanted = [
        [pair for rank, pair in enumerate(row) if rank == 0 or pair[1] / SCALE > dropping.threshold] for row in wanted
    ]
    left: list[dict[int, float]] = [{} for _ in wanted]
    for span in spans:
        rows = range(span.first, span.first + span.rows)
        order = sorted(rows, key=lambda row: -float(scores_TE[row].max())) if dropping.prioritised else rows
        most = ceil(dropping.share * span.rows) if dropping.share else dropping.tokens or span.rows * EXPERTS
        asked = [0] * EXPERTS
        for rank in range(EXPERTS):
            for row in order:
                if rank < len(wanted[row]):
                    expert, weight = wanted[row][rank]
                    asked[expert] += 1
                    if asked[expert] <= most:
                        left[row][expert] = weight
    if dropping.renormalised:
        left = [{e: w / sum(row.values()) * SCALE for e, w in row.items()} for row in left]
    return left


@given(
    seed=st.integers(0, 1000),
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    threshold=st.sampled_from([0.0, 0.25, 0.6]),
    capacity=st.sampled_from([(0, 0.0), (1, 0.0), (3, 0.0), (0, 0.2), (0, 0.7)]),
    prioritised=st.booleans(),
    renormalised=st.booleans(),
    data=st.data(),
)
@settings(max_examples=80, deadline=None)
def test_the_definition(
    seed: int,
    lengths: list[int],
    threshold: float,
    capacity: tuple[int, float],
    prioritised: bool,
    renormalised: bool,
    data: st.DataObject,
) -> None:
    counts = data.draw(st.lists(st.integers(1, EXPERTS), min_size=sum(lengths), max_size=sum(lengths)))
    made, scores_TE = choice(seed, sum(lengths), counts)
    spans = [Span(sum(lengths[:row]), length, length) for row, length in enumerate(lengths)]
    dropping = Dropping(threshold, *capacity, prioritised, renormalised)
    found = kept(made, scores_TE, lambda: spans, dropping, Router(normalise=True, scale=SCALE))
    for row, wanted in enumerate(expected(made, scores_TE, spans, dropping)):
        ran = {int(found.expert_TK[row, k]): float(found.weight_TK[row, k]) for k in found.runs_TK[row].nonzero()[:, 0]}
        assert ran == pytest.approx(wanted, rel=1e-5)


def test_what_no_expert_can_have_is_refused() -> None:
    for threshold, share in [(1.0, 0.0), (-0.1, 0.0), (0.0, -0.5)]:
        with pytest.raises(ValueError, match="second_expert_threshold must be"):
            Dropping(threshold, share=share)
    with pytest.raises(ValueError, match="expert_capacity must be a whole number"):
        Dropping(tokens=-1)
