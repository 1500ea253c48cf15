"""Finds for each count below the trained one the normaliser of the router's weights that changes answers least.

The candidates are those of `RoutingRule.normaliser`, among them k2-normalisation (arXiv 2609.04575): k experts run, and
their weights are divided by the mass of the k2 best. Not here: how weights are computed (`model/moe/router.py`).
"""

from calibration.found import Found
from calibration.run import Run
from model.budget import ExpertBudget, Normaliser, RoutingRule
from model.shapes.mixtures import TopK

MIN_GAIN = 0.01  # of the KL divergence, relatively: less is left alone


def search(run: Run) -> Found:
    """The best normaliser of each count of the grid below the trained one, where one lowers the KL divergence."""
    found = Found()
    shape = run.config.mixtures[0]
    if not isinstance(shape, TopK) or run.experts.rule_refusal:
        return found
    for count in (count for count in run.counts if count < run.experts.trained):
        tried = [normalised(run, count, each) for each in candidates(shape, count)]
        plain, *others = run.score([run.uniform(count), *tried], run.decide)
        best = min(range(len(tried)), key=lambda index: others[index].kl)
        if others[best].kl < plain.kl * (1 - MIN_GAIN):
            normaliser = tried[best].rule.normaliser
            found.normalisers[str(count)] = normaliser
            found.options[f"k{count}-{spelled(normaliser)}"] = tried[best]
    return found


def candidates(shape: TopK, count: int) -> tuple[Normaliser, ...]:
    """What to try beside the family's rule, without what equals it or another candidate.

    Where the family normalises, its rule is "kept", and k2 = all experts is "raw"; where it does not, its rule is
    "raw", which k2 = the trained count is as well.
    """
    middle = (count + shape.trained) // 2
    sums = {count + 1, middle, 2 * shape.trained}
    if shape.router.normalise:
        sums.add(shape.trained)
    else:
        sums.discard(shape.trained)
    named: Normaliser = "raw" if shape.router.normalise else "kept"
    return (named, *sorted(n for n in sums if count < n < shape.experts))


def normalised(run: Run, count: int, normaliser: Normaliser) -> ExpertBudget:
    """The budget of one count in every layer with this normaliser."""
    return ExpertBudget(run.uniform(count).per_layer, rule=RoutingRule(normaliser=normaliser))


def spelled(normaliser: Normaliser) -> str:
    """As requests spell it: "raw", "k2=16"."""
    return f"k2={normaliser}" if isinstance(normaliser, int) else normaliser
