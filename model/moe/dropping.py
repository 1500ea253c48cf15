"""Choices that do not run: second experts of little weight (a policy of ST-MoE's code, arXiv 2202.08906), and what does
not fit an expert's capacity (Switch Transformers, arXiv 2101.03961 §2.2).

Tokens compete with those of their own sequence in one step alone, so that an answer does not depend on its neighbours.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from model.batch import Span
from model.moe.base import Choice, running_sum
from model.shapes.dropping import Dropping
from model.shapes.mixtures import Router

SMALLEST = torch.finfo(torch.float32).tiny


def kept(
    choice: Choice, scores_TE: Tensor, spans: Callable[[], Sequence[Span]], dropping: Dropping, router: Router
) -> Choice:
    """The choice without what is dropped. `spans`: the rows of each sequence."""
    runs_TK = choice.runs_TK
    if dropping.threshold:
        first_TK = runs_TK.cumsum(-1) == 1
        runs_TK = runs_TK & (first_TK | (choice.weight_TK / router.scale > dropping.threshold))
    if dropping.has_capacity:
        runs_TK = _within_capacity(choice.expert_TK, runs_TK, scores_TE, spans(), dropping)
    if not (dropping.renormalised and router.normalise):
        return replace(choice, runs_TK=runs_TK)
    sum_T1 = running_sum(choice.weight_TK * runs_TK).clamp(min=SMALLEST)
    return replace(choice, weight_TK=choice.weight_TK / sum_T1 * router.scale, runs_TK=runs_TK)


def _within_capacity(
    expert_TK: Tensor, runs_TK: Tensor, scores_TE: Tensor, spans: Sequence[Span], dropping: Dropping
) -> Tensor:
    runs_TK = runs_TK.clone()
    for span in spans:
        rows, limit = slice(span.first, span.first + span.rows), dropping.capacity(span.rows)
        if span.rows > limit:
            best_T = scores_TE[rows].amax(-1) if dropping.prioritised else None
            runs_TK[rows] &= _fits(expert_TK[rows], runs_TK[rows], limit, best_T, scores_TE.shape[1])
    return runs_TK


def _fits(expert_TK: Tensor, runs_TK: Tensor, limit: int, best_T: Tensor | None, experts: int) -> Tensor:
    """Which of one sequence's choices are among the first `limit` of their expert; what is dropped counts as well."""
    tokens, ranks = expert_TK.shape
    order_T = torch.arange(tokens) if best_T is None else best_T.argsort(descending=True, stable=True)
    order_T = order_T.to(expert_TK.device)
    expert_R, runs_R = expert_TK[order_T].T.flatten(), runs_TK[order_T].T.flatten()  # first choices, then second ones
    taken_RE = (F.one_hot(expert_R, experts) * runs_R[:, None]).cumsum(0)
    fits_R = taken_RE.gather(1, expert_R[:, None])[:, 0] <= limit
    fits_TK = torch.empty_like(runs_TK)
    fits_TK[order_T] = fits_R.view(ranks, tokens).T
    return fits_TK
