"""How loaded the engine is, from the reports of its steps: how long steps take now, and against what was calibrated.

The time is an argument; it does not depend on the queue or on requests. A step's time is averaged over about the last
second; steps before an idle time do not count.
"""

import math
from collections.abc import Sequence

from engine.cost import StepCost, StepLoad
from engine.types import StepStats
from model.budget import FAMILY_RULE, ExpertBudget
from model.expert_range import ExpertRange
from server.experts.policies import Load, predicted_itl
from weights.calibration import Option

AVERAGED_S = 1.0  # a step weighs by its length against this
ALONE_WEIGHT = 0.01  # of a step of one sequence alone, in the average of what an unloaded server takes
ALONE = 1.5  # sequences, on average: with fewer, most steps are of one
IDLE_S = 10.0  # after so long without a step nothing of before counts
MAX_RATIO = 20.0  # that one step counts for: a process that was stopped for a while says nothing of the next steps


class LoadMeter:
    """Averages over the steps that decoded.

    `unloaded_ms` is a step of one sequence with the default budget on this machine: at first as estimated when the
    engine was loaded, then as the steps of sequences that run alone are. Without an estimate and a calibration it is 0
    and nothing is compared with it.
    """

    def __init__(
        self, options: Sequence[Option], default: ExpertBudget, experts: ExpertRange, cost: StepCost | None
    ) -> None:
        self._layers, self._trained = max(1, experts.layers), max(1, experts.trained)
        uniform = [one for one in options if one.budget.uniform and one.budget.rule == FAMILY_RULE and one.speed]
        self._options = sorted(uniform, key=lambda option: option.mean_count)
        calibrated = self._default_ms = self._calibrated_ms(default.mean(0, 1), 1)
        measured = StepLoad(cost).seconds_alone(default.per_layer) * 1000 if cost is not None else 0.0
        self.unloaded_ms = measured or calibrated
        self._first_slowdown = self._slowdown = measured / calibrated if measured and calibrated else 1.0
        self._itl_ms = self._running = 0.0
        self._last_at = -math.inf

    def record(self, stats: StepStats, now: float) -> None:
        """Take account of a step that ended at `now`; one that generated nothing is passed over."""
        if not stats.generated_tokens or not stats.running:
            return
        self._forget(now)
        weight = 1.0 if self._last_at == -math.inf else 1 - math.exp(-stats.seconds / AVERAGED_S)
        self._last_at = now
        self._itl_ms += weight * (stats.seconds * 1000 - self._itl_ms)
        self._running += weight * (stats.running - self._running)
        if stats.trained_pairs and (calibrated := self._calibrated_ms(self._count_of(stats), stats.running)):
            ratio = min(MAX_RATIO, stats.seconds * 1000 / calibrated)
            self._slowdown += (1 - math.exp(-stats.seconds / AVERAGED_S)) * (ratio - self._slowdown)
            if stats.running == 1 and not stats.prompt_tokens:
                alone = min(ratio * self._default_ms, 2 * self.unloaded_ms)
                self.unloaded_ms += ALONE_WEIGHT * (alone - self.unloaded_ms)

    def _forget(self, now: float) -> None:
        if now - self._last_at > IDLE_S:
            self._slowdown, self._itl_ms, self._running, self._last_at = self._first_slowdown, 0.0, 0.0, -math.inf

    def _count_of(self, stats: StepStats) -> float:
        return self._trained * stats.routed_pairs / stats.trained_pairs

    def _calibrated_ms(self, count: float, running: int) -> float:
        """What a step was calibrated to take at a mean count, between the options nearest to it; 0 without any."""
        if not self._options:
            return 0.0
        above = next((one for one in self._options if one.mean_count >= count), self._options[-1])
        below = next((one for one in reversed(self._options) if one.mean_count <= count), self._options[0])
        low, high = (predicted_itl(one, Load(running)) or 0.0 for one in (below, above))
        gap = above.mean_count - below.mean_count
        return low if gap <= 0 else low + (high - low) * (count - below.mean_count) / gap

    def slowdown(self, now: float) -> float:
        """How many times as long as calibrated steps take; before the first step as this machine was when it loaded."""
        self._forget(now)
        return self._slowdown

    def itl_ratio(self, now: float) -> float:
        """A step's time over an unloaded one's; 0 while nothing runs, or nothing is known to compare with.

        While sequences run alone it is at most 1: whatever slows them down then is not the load of this server.
        """
        self._forget(now)
        ratio = self._itl_ms / self.unloaded_ms if self.unloaded_ms else 0.0
        return min(1.0, ratio) if self._running < ALONE else ratio

    def running(self, now: float) -> float:
        """Sequences in the batch, averaged."""
        self._forget(now)
        return self._running
