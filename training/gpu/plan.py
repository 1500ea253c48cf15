"""How one network is trained: numbers of a run, the counts that a step's rows draw, and the learning rate's course.

It does not depend on tensors.
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Plan:
    """How one network is trained. `counts`: see `draw_counts`. `distil`: weight of the largest count's distribution."""

    steps: int = 400
    rows: int = 64
    length: int = 512
    counts: str = "log"
    distil: float = 0.0
    muon_lr: float = 0.02
    adam_lr: float = 4e-3
    route_lr: float = 4e-3  # of everything that routes
    decay: float = 0.05
    balance: float = 0.01
    by_block: bool = True  # Muon treats the weights of each block or expert as matrices of their own
    warmup: int = 40
    seed: int = 1


def draw_counts(style: str, rows: int, largest: int) -> list[int]:
    """The counts of a step's rows, in falling order; the same for every step.

    "uniform" and "log" (log-uniform) spread the rows evenly over 1..largest; "sandwich" gives a quarter of them 1, a
    quarter the largest count and the rest "log"; a number is the count of all rows. 8 rows of "log" up to 16 have
    14, 10, 7, 5, 3, 2, 2, 1.
    """
    if style.isdigit():
        return [int(style)] * rows
    if style == "sandwich":
        quarter = rows // 4
        middle = draw_counts("log", rows - 2 * quarter, largest)
        return sorted([1] * quarter + [largest] * quarter + middle, reverse=True)
    if style not in ("log", "uniform"):
        raise ValueError(f"counts must be log, uniform, sandwich or a number, got {style!r}")
    shares = [(row + 0.5) / rows for row in range(rows)]
    if style == "uniform":
        drawn = [1 + int(share * largest) for share in shares]
    else:
        drawn = [_log_uniform(share, largest) for share in shares]
    return sorted(drawn, reverse=True)


def _log_uniform(share: float, largest: int) -> int:
    """The count at this share of log2 1..largest. The margins give the first and the last count rows of their own."""
    span = math.log2(largest) + 0.17
    return min(largest, max(1, round(2 ** (share * span - 0.085))))


def schedule(plan: Plan, step: int) -> float:
    """The factor of all learning rates: linear warm-up, then a cosine down to a fiftieth."""
    if step < plan.warmup:
        return (step + 1) / plan.warmup
    progress = (step - plan.warmup) / max(1, plan.steps - plan.warmup)
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
