"""Calibrates the rules that run fewer experts where the router is sure, to a wanted number of experts on average.

`threshold` keeps an expert if its score is at least this part of the best one's (as SER in ik_llama.cpp); `top_p` keeps
experts until their share of all scores reaches it (dynamic top-p, arXiv 2403.07652). Found by bisection on the pairs
that ran. Not here: the rules themselves (`model/moe/router.py`).
"""

from collections.abc import Callable

from calibration.allocation import MIN_GAIN, SEARCH_TOKENS, part_of
from calibration.found import Found
from calibration.run import Run
from model.budget import ExpertBudget, RoutingRule

STEPS = 7  # of bisection
DIGITS = 3  # of a threshold in the file


def search(run: Run) -> Found:
    """For each count of the grid below the trained one, the rules that run as many experts on average and lose less."""
    found = Found()
    if run.experts.rule_refusal:
        return found
    text = part_of(run.decide, SEARCH_TOKENS)

    def mean_count(rule: RoutingRule) -> float:
        return run.score([_budget(run, rule)], text)[0].pairs_per_token / run.experts.layers

    for count in (count for count in run.counts if run.experts.minimum < count < run.experts.trained):
        threshold = bisect(lambda value: mean_count(RoutingRule(threshold=value)), count, falls=True)
        top_p = bisect(lambda value: mean_count(RoutingRule(top_p=value)), count, falls=False)
        rules = RoutingRule(threshold=threshold), RoutingRule(top_p=top_p)
        budgets = [_budget(run, rule) for rule in rules if rule.adaptive]
        plain, *scores = run.score([run.uniform(count), *budgets], run.decide)
        for budget, score in zip(budgets, scores, strict=True):
            if score.kl < plain.kl * (1 - MIN_GAIN):
                _keep(found, count, budget)
    return found


def _budget(run: Run, rule: RoutingRule) -> ExpertBudget:
    """At most the trained count in every layer, with this rule."""
    return ExpertBudget(run.uniform(run.experts.trained).per_layer, rule=rule)


def _keep(found: Found, count: int, budget: ExpertBudget) -> None:
    if budget.rule.threshold:
        found.thresholds[str(count)] = budget.rule.threshold
        found.options[f"threshold-{count}"] = budget
    else:
        found.options[f"top_p-{count}"] = budget


def bisect(measure: Callable[[float], float], target: float, falls: bool) -> float:
    """The value in 0..1 at which `measure`, which falls or rises with it, is as near to `target` as may be, not above.

    0, which stands for no rule, if no value that was tried stays under the target.
    """
    low, high, best = 0.0, 1.0, 0.0
    for _ in range(STEPS):
        middle = round((low + high) / 2, DIGITS)
        fits = measure(middle) <= target
        if fits:
            best = middle
        if fits == falls:
            high = middle
        else:
            low = middle
    return best
