"""A cost with round constants, and what it says of a plan: token by token, the slow way round."""

from collections.abc import Iterable

from engine.cost import ExpertPool, StepCost
from engine.plan import Chunk

LAYERS = 2
COST = StepCost(fixed=2e-3, per_token=2e-5, per_pair=2e-5, per_expert=5e-5, pools=(ExpertPool(16),) * LAYERS)


def work_of(pools: tuple[ExpertPool, ...], chunks: Iterable[Chunk]) -> tuple[int, int, float]:
    """Tokens, routed pairs and expected distinct experts of a step of these chunks."""
    tokens = [c.sequence.counts_at(c.start + index) for c in chunks for index in range(len(c.tokens))]  # with drafts
    distinct = 0.0
    for layer, pool in enumerate(pools):
        untouched = float(pool.experts)
        for counts in tokens:
            untouched *= pool.untouched_probability(counts[layer])
        distinct += pool.experts - untouched
    return len(tokens), sum(map(sum, tokens)), distinct


def seconds(cost: StepCost, chunks: Iterable[Chunk]) -> float:
    """The cost of a step of these chunks."""
    return cost.seconds(*work_of(cost.pools, chunks))
