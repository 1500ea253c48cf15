"""The grid of counts that a calibration measures."""

from collections.abc import Sequence

from model.expert_range import ExpertRange

EVERY = 8  # all counts up to this one, and from there on twice the one before


def grid(experts: ExpertRange, asked: Sequence[int]) -> tuple[int, ...]:
    """The counts asked for, or a grid over the whole range; always with the trained count.

    Raises:
        InvalidRequest: a count that the checkpoint cannot run.
    """
    for count in asked:
        experts.budget(count, "--counts")
    return tuple(sorted({*(asked or _all(experts)), experts.trained}))


def _all(experts: ExpertRange) -> set[int]:
    counts = set(range(experts.minimum, min(EVERY, experts.maximum) + 1))
    count = 2 * EVERY
    while count < experts.maximum:
        counts.add(count)
        count *= 2
    return counts | {experts.maximum}
