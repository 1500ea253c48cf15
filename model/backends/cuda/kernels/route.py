"""Routing: from router logits to each token's best experts and their weights, as `choose` in `model/moe/router.py`.

Every token gets `k_max` ranks. Those beyond its own count, which is read on the device, get the sentinel expert E,
which no other kernel computes or counts. A count's choice is a prefix of the next count's. Of equal scores the lower
expert comes first; what is not a number comes last. Not here: the sparse mixer (see `sparse_mixer.py`).

The rules of requests are those of `model/moe/rules.py`. A program routes one token, so that its sums are the same in
any batch; with `reuse` a first launch marks the experts that all tokens run of themselves. Axes in kernels: E experts,
K ranks, G groups, each padded to a power of two.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.backends.cuda.kernels.ranking import best_of, ranking
from model.batch import LayerBudget
from model.devices import tensor_on
from model.moe.rules import KEPT, RAW, TRAINED, number
from model.shapes.mixtures import Router

_TRAINED, _RAW, _KEPT = tl.constexpr(TRAINED), tl.constexpr(RAW), tl.constexpr(KEPT)
_SMALLEST = tl.constexpr(torch.finfo(torch.float32).tiny)


@dataclass(frozen=True, slots=True)
class TokenRules:
    """The routing rule of each token, on the device. `normaliser_T` has the numbers of `model/moe/rules.py`.

    Without `reuse_T` or `repair_T` no token's rule has it.
    """

    normaliser_T: Tensor  # int32
    threshold_T: Tensor  # float32
    top_p_T: Tensor  # float32
    trained: int
    ranks: int  # how many ranks any of them looks at for its normaliser
    reuse_T: Tensor | None = None  # int32
    repair_T: Tensor | None = None  # int32; 0: no
    most_reuse: int = 0  # the largest of `reuse_T`
    skip_T: Tensor | None = None  # int32
    most_skip: int = 0  # the largest of `skip_T`

    @classmethod
    def of(cls, budget: LayerBudget, trained: int) -> "TokenRules | None":
        """Those of a layer's budget, which are not waited for; None where all tokens have their family's."""
        rules, rule_T = budget.rules, budget.rule_T
        if not rules or rule_T is None:
            return None
        normalisers, reuses = [number(rule) for rule in rules], [rule.reuse for rule in rules]
        skips = [rule.skip for rule in rules]

        def column(values: Sequence[float], dtype: torch.dtype = torch.int32) -> Tensor:
            return tensor_on(values, rule_T.device)[rule_T].to(dtype)

        return cls(
            column(normalisers),
            column([rule.threshold for rule in rules], torch.float32),
            column([rule.top_p for rule in rules], torch.float32),
            trained,
            max(trained, *normalisers),
            column(reuses) if any(reuses) else None,
            column([rule.repair for rule in rules]) if any(rule.repair for rule in rules) else None,
            max(reuses),
            column(skips) if any(skips) else None,
            max(skips),
        )


@triton.jit
def _shares(
    weights, own, mass, best_n, count, trained, normaliser, eps, normalise: tl.constexpr, clamp_sum: tl.constexpr,
    has_rules: tl.constexpr
):  # fmt: skip
    """The weights of what a token runs. The sums are those of all that it runs, of the trained count's best, and of the
    normaliser's best."""
    divisor, as_trained = own, True
    if has_rules:
        as_trained = (normaliser == _TRAINED) | (count >= trained)
        divisor = tl.where(as_trained | (normaliser == _KEPT), own, best_n)
    shares = weights
    if normalise:
        shares = weights / (tl.maximum(divisor, eps) if clamp_sum else divisor + eps)
    elif has_rules:
        shares = tl.where(as_trained, weights, weights * (mass / tl.maximum(divisor, _SMALLEST)))
    if has_rules:
        shares = tl.where((normaliser == _RAW) & (as_trained == 0), weights, shares)
    return shares


@triton.jit
def _route(
    logits,
    logit_bias,
    selection_bias,
    counts,
    normalisers,
    thresholds,
    top_ps,
    reuses,
    skips,
    used,
    expert_out,
    weight_out,
    experts,
    k_max,
    looked_at,
    trained,
    groups,
    kept_groups,
    eps,
    scale,
    score: tl.constexpr,
    has_logit_bias: tl.constexpr,
    has_selection_bias: tl.constexpr,
    top2: tl.constexpr,
    normalise: tl.constexpr,
    clamp_sum: tl.constexpr,
    has_rules: tl.constexpr,
    has_skip: tl.constexpr,
    reuse: tl.constexpr,
    E: tl.constexpr,
    K: tl.constexpr,
    G: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    worth, ranked, first = ranking(
        logits, logit_bias, selection_bias, token, experts, groups, kept_groups, score, has_logit_bias,
        has_selection_bias, top2, E, G
    )  # fmt: skip
    place = tl.arange(0, E)
    is_open = place < experts
    slot = tl.arange(0, K)
    count = tl.load(counts + token).to(tl.int32)
    chosen = tl.full([K], 0, tl.int32) + experts
    weights = tl.zeros([K], tl.float32)
    normaliser, threshold, top_p, share, left_to_reuse, skip = 0, 0.0, 0.0, 1.0, 0, 0
    if has_rules:
        normaliser = tl.load(normalisers + token)
        threshold = tl.load(thresholds + token)
        top_p = tl.load(top_ps + token)
        share = top_p if score == "softmax" else top_p * tl.sum(tl.where(is_open, worth, 0.0), axis=0)
    if has_skip:
        skip = tl.load(skips + token)
    if reuse == "add":
        left_to_reuse = tl.where(count > 0, tl.load(reuses + token), 0)
    # Sums in the order of ranks: of all so far but skipped ones, of those that run, of the trained count's, of the
    # normaliser's.
    so_far, own, mass, best_n, best_worth = 0.0, 0.0, 0.0, 0.0, 0.0
    runs_on, filled = count > 0, 0
    for k in range(looked_at):
        inside = tl.max((is_open & first).to(tl.int32), axis=0) > 0
        best = best_of(ranked, tl.where(inside, is_open & first, is_open), place, E)
        is_open = is_open & (place != best)
        this = tl.sum(tl.where(place == best, worth, 0.0), axis=0)
        runs_on = runs_on & (k < skip + count)
        if has_rules:
            best_worth = tl.where(k == skip, this, best_worth)
            stops = (this < threshold * best_worth) | ((top_p > 0) & (so_far >= share))
            runs_on = runs_on & ((k <= skip) | (stops == 0))
            so_far += tl.where(k >= skip, this, 0.0)
            mass += tl.where(k < trained, this, 0.0)
            best_n += tl.where(k < tl.maximum(normaliser, 1), this, 0.0)
        runs = runs_on & (k >= skip)
        if reuse == "add":
            ranks_above = tl.max(tl.where(place == best, ranked, float("-inf")), axis=0) > float("-inf")
            joins = (runs_on == 0) & inside & ranks_above & (left_to_reuse > 0) & (tl.load(used + best) != 0)
            left_to_reuse -= joins.to(tl.int32)
            runs = runs | joins
        own += tl.where(runs, this, 0.0)
        chosen = tl.where((slot == filled) & runs, best, chosen)
        weights = tl.where((slot == filled) & runs, this, weights)
        filled += runs.to(tl.int32)
    if reuse == "mark":
        tl.store(used + chosen, 1, mask=chosen < experts)
    else:
        shares = _shares(weights, own, mass, best_n, count, trained, normaliser, eps, normalise, clamp_sum, has_rules)
        at = token * k_max + slot
        tl.store(expert_out + at, chosen, mask=slot < k_max)
        tl.store(weight_out + at, tl.where(chosen < experts, shares * scale, 0.0), mask=slot < k_max)


def route(
    logits_TE: Tensor,
    counts_T: Tensor,
    router: Router,
    expert_TK: Tensor,
    weight_TK: Tensor,
    logit_bias_E: Tensor | None = None,
    selection_bias_E: Tensor | None = None,
    rules: TokenRules | None = None,
) -> None:
    """Write the experts that each token runs, int32, best first, and their weights, float32.

    These are its `counts_T` best, or fewer by its rule, and what it reuses. K, the number of columns, is the most that
    a token may run; the other columns of a token get expert E and weight 0.
    """
    tokens, experts = logits_TE.shape
    k_max = expert_TK.shape[1]
    if router.score == "sparse_mixer":
        raise ValueError("the sparse mixer has a kernel of its own")
    if k_max > experts:
        raise ValueError(f"{k_max} ranks cannot be routed to {experts} experts")
    padded = triton.next_power_of_2(experts)
    modes = {
        "score": router.score,
        "has_logit_bias": logit_bias_E is not None,
        "has_selection_bias": selection_bias_E is not None,
        "top2": router.group_score == "top2",
        "normalise": router.normalise,
        "clamp_sum": router.clamp_sum,
        "has_rules": rules is not None,
        "has_skip": rules is not None and rules.skip_T is not None,
        "E": padded,
        "G": triton.next_power_of_2(router.groups),
        "num_warps": max(1, min(8, padded // 256)),
        "enable_fp_fusion": False,
    }
    of_rules = (counts_T,) * 5
    used_E, reuse, own_ranks, looked_at = counts_T, "none", k_max, k_max
    if rules is not None:
        reuse_T = counts_T if rules.reuse_T is None else rules.reuse_T
        skip_T = counts_T if rules.skip_T is None else rules.skip_T
        of_rules = (rules.normaliser_T, rules.threshold_T, rules.top_p_T, reuse_T, skip_T)
        own_ranks = min(experts, k_max + rules.most_skip)
        looked_at = min(experts, max(own_ranks, rules.ranks))
        if rules.reuse_T is not None:
            used_E, reuse, looked_at = counts_T.new_zeros(experts, dtype=torch.int32), "add", experts
    given = (
        logits_TE,
        logits_TE if logit_bias_E is None else logit_bias_E,
        logits_TE if selection_bias_E is None else selection_bias_E,
        counts_T,
        *of_rules,
        used_E,
        expert_TK,
        weight_TK,
        experts,
        k_max,
    )
    sizes = (0 if rules is None else rules.trained, router.groups, router.kept_groups)
    factors = (float(router.eps), float(router.scale))
    modes["K"] = triton.next_power_of_2(k_max)
    if reuse == "add":
        _route[(tokens,)](*given, own_ranks, *sizes, *factors, reuse="mark", **modes)
    _route[(tokens,)](*given, looked_at, *sizes, *factors, reuse=reuse, **modes)
