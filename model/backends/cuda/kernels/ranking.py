"""How a router ranks experts: what each is worth to a token, its biases, and the groups in which a token chooses.

Of equal scores the lower expert comes first; what is not a number comes last. Axes: E experts and G groups, each padded
to a power of two.
"""

import triton
import triton.language as tl


@triton.jit
def _scores(logits, real, score: tl.constexpr):
    """What each expert is worth: a sigmoid of its own, or a softmax over all."""
    if score == "sigmoid":
        worth = tl.sigmoid(logits)
    else:
        powers = tl.where(real, tl.exp(logits - tl.max(tl.where(real, logits, float("-inf")), axis=0)), 0.0)
        worth = powers / tl.sum(powers, axis=0)
    return worth


@triton.jit
def best_of(ranked, is_open, places, end: tl.constexpr):
    """The place of the best open value, the lowest of equal ones; `end` if none is open."""
    best = tl.max(tl.where(is_open, ranked, float("-inf")), axis=0)
    return tl.min(tl.where(is_open & (ranked == best), places, end), axis=0)


@triton.jit
def _group_scores(ranked, group_of, group, groups, top2: tl.constexpr, end: tl.constexpr):
    """Of each group [G]: its best score, or the sum of its two best."""
    worth = tl.full(group.shape, float("-inf"), tl.float32)
    place = tl.arange(0, end)
    for one in range(groups):
        member = group_of == one
        first = best_of(ranked, member, place, end)
        total = tl.max(tl.where(place == first, ranked, float("-inf")), axis=0)
        if top2:
            total += tl.max(tl.where(member & (place != first), ranked, float("-inf")), axis=0)
        worth = tl.where(group == one, total, worth)
    return worth


@triton.jit
def _in_kept_groups(ranked, real, experts, groups, kept, top2: tl.constexpr, E: tl.constexpr, G: tl.constexpr):
    """Which experts lie in the token's best groups."""
    group_of = tl.arange(0, E) // (experts // groups)
    group = tl.arange(0, G)
    worth = _group_scores(ranked, group_of, group, groups, top2, E)
    group_open = group < groups
    inside = tl.full([E], 0, tl.int1)
    for _ in range(kept):
        chosen = best_of(worth, group_open, group, G)
        group_open = group_open & (group != chosen)
        inside = inside | (group_of == chosen)
    return inside & real


@triton.jit
def ranking(
    logits, logit_bias, selection_bias, token, experts, groups, kept_groups, score: tl.constexpr,
    has_logit_bias: tl.constexpr, has_selection_bias: tl.constexpr, top2: tl.constexpr, E: tl.constexpr, G: tl.constexpr
):  # fmt: skip
    """Of each expert [E]: what it is worth to the token, by what it is ranked, and whether it comes before the others,
    which are outside the token's groups."""
    place = tl.arange(0, E)
    real = place < experts
    logit = tl.load(logits + token * experts + place, mask=real, other=0.0).to(tl.float32)
    if has_logit_bias:
        logit += tl.load(logit_bias + place, mask=real, other=0.0).to(tl.float32)
    worth = _scores(logit, real, score)
    ranked = worth
    if has_selection_bias:
        ranked += tl.load(selection_bias + place, mask=real, other=0.0).to(tl.float32)
    elif score == "sigmoid" and G == 1:
        ranked = logit  # the same order, but large ones do not become equal
    ranked = tl.where(ranked == ranked, ranked, float("-inf"))
    first = real
    if G > 1:
        first = _in_kept_groups(ranked, real, experts, groups, kept_groups, top2, E, G)
    return worth, ranked, first
