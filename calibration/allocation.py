"""Splits a total of experts over the layers, so that layers which need few give to those which need many.

As LExI (arXiv 2509.02753) and Alloc-MoE (2604.08133) do, but with the KL divergence of the whole model as the measure:
first of each layer alone, which a dynamic programme adds up; then of whole splits, between which a short hill climb
moves single experts. The cost of a profile is that of a uniform count. It handles counts, not how they are run.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

from calibration.found import Found
from calibration.run import Run
from calibration.scoring import Windows
from model.budget import ExpertBudget, ExpertCounts

Costs = tuple[float, ...]  # of one layer: KL at each count, from 1 to the trained one
Measure = Callable[[Sequence[ExpertCounts]], list[float]]  # KL of splits
MIN_GAIN = 0.01  # of the KL divergence, relatively: a profile that gains less is not kept
SEARCH_TOKENS = 4096  # of the deciding text: a search runs many splits
MOVES = 12  # of the hill climb at most


def search(run: Run) -> Found:
    """Profiles at the cost of each uniform count of the grid between 1 and the trained one, where they lower the KL."""
    found = Found()
    trained = run.experts.trained
    targets = [count for count in run.counts if run.experts.minimum < count < trained]
    if not targets or run.experts.layers < 2:
        return found
    text = part_of(run.decide, SEARCH_TOKENS)

    def measure(splits: Sequence[ExpertCounts]) -> list[float]:
        return [score.kl for score in run.score([ExpertBudget(split) for split in splits], text)]

    below = [count for count in run.counts if count < trained]
    costs = layer_costs(run.experts.layers, trained, below, measure)
    for target in targets:
        uniform = run.uniform(target).per_layer
        counts = climb((cheapest_split(costs, sum(uniform)), uniform), costs, measure)
        plain, profile = run.score([run.uniform(target), ExpertBudget(counts)], run.decide)
        if profile.kl < plain.kl * (1 - MIN_GAIN):
            found.profiles[f"p{target}"] = counts
            found.options[f"p{target}"] = ExpertBudget(counts)
    return found


def part_of(text: Windows, tokens: int) -> Windows:
    """The first windows of a text, with about so many tokens."""
    each = max(1, text.tokens // len(text.windows))
    kept = text.windows[: max(1, tokens // each)]
    return replace(text, name=f"{text.name}, first {len(kept)}", windows=kept)


def layer_costs(layers: int, trained: int, counts: Sequence[int], measure: Measure) -> list[Costs]:
    """The KL of the model when one layer alone runs fewer experts: measured at `counts`, linear between them."""
    whole = (trained,) * layers
    places = [(layer, count) for layer in range(layers) for count in counts]
    measured = measure([(*whole[:layer], count, *whole[layer + 1 :]) for layer, count in places])
    known: list[dict[int, float]] = [{trained: 0.0} for _ in range(layers)]
    for (layer, count), kl in zip(places, measured, strict=True):
        known[layer][count] = kl
    return [interpolated(each, trained) for each in known]


def interpolated(known: Mapping[int, float], trained: int) -> Costs:
    """Costs of all counts from those of some; below the least known count its cost holds."""
    costs = []
    for count in range(1, trained + 1):
        above = min(each for each in known if each >= count)
        below = max((each for each in known if each <= count), default=above)
        part = (count - below) / (above - below) if above > below else 0.0
        costs.append(known[below] + part * (known[above] - known[below]))
    return tuple(costs)


def cheapest_split(costs: Sequence[Costs], total: int) -> ExpertCounts:
    """The counts, at least 1 each, that sum to `total` with the least sum of costs: a dynamic programme."""
    best: dict[int, tuple[float, ExpertCounts]] = {0: (0.0, ())}  # by experts given to the layers so far
    for number, layer in enumerate(costs):
        left = len(costs) - number - 1  # layers that still need one each
        grown: dict[int, tuple[float, ExpertCounts]] = {}
        for used, (cost, counts) in best.items():
            for count, more in enumerate(layer, start=1):
                key, candidate = used + count, (cost + more, (*counts, count))
                if key + left <= total and (key not in grown or candidate < grown[key]):
                    grown[key] = candidate
        best = grown
    return best[total][1]


def climb(starts: Sequence[ExpertCounts], costs: Sequence[Costs], measure: Measure) -> ExpertCounts:
    """From the best of the starts, move one expert at a time between two layers while that lowers the measured KL; the
    likeliest moves first."""
    lowest, counts = min(zip(measure(starts), starts, strict=True))
    tried = 0
    while tried < MOVES:
        for moved in _moves(counts, costs):
            tried += 1
            kl = measure([moved])[0]
            if kl < lowest:
                lowest, counts = kl, moved
                break
            if tried == MOVES:
                return counts
        else:
            return counts
    return counts


def _moves(counts: ExpertCounts, costs: Sequence[Costs]) -> Iterator[ExpertCounts]:
    """All splits that are one move away, by what the costs of single layers say of them."""
    layers, found = range(len(counts)), []
    for giver in layers:
        for taker in layers:
            if giver == taker or counts[giver] == 1 or counts[taker] == len(costs[taker]):
                continue
            moved = list(counts)
            moved[giver] -= 1
            moved[taker] += 1
            said = sum(costs[layer][count - 1] for layer, count in enumerate(moved))
            found.append((said, tuple(moved)))
    for _, moved_counts in sorted(found):
        yield moved_counts
