"""Brownout: how far requests that name no expert count are lowered while there is more work than can be done.

A state machine over the load: pure, the time is an argument. It handles levels, not what they stand for: 0 is none,
and each further one costs less.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

RAISE_WAIT_S = 0.25  # a sequence that has waited so long for a slot is too many
RAISE_AFTER_S = 0.2  # the load is too high for so long before each step up
LOWER_AFTER_S = 2.0  # the load has room for so long before each step down
NEAR = 0.9  # of the latency that the operator allows: from here on the level is raised, so that it is kept
ROOM = 0.75  # of the slots that the sequences may take at the next lower level, as far as can be told


@dataclass(frozen=True, slots=True)
class Pressure:
    """The load at a moment."""

    waiting: int  # sequences that wait for a slot
    oldest_wait_s: float
    itl_ratio: float  # time per token over that of an unloaded server
    running: float  # sequences in the batch, averaged
    slots: int  # that it has


class Brownout:
    """`costs`: the time of a step at each level, from level 0 on, in any unit. `max_itl_ratio`: the time per token that
    is allowed, over an unloaded server's; infinite: only the queue counts.

    Between the loads that raise the level and those that lower it lies a band in which it stays. It is lowered only
    where the next lower level is not expected to be raised again: sequences then take longer, and so more run at once.
    """

    def __init__(self, costs: Sequence[float], max_itl_ratio: float = math.inf) -> None:
        self.level = 0
        self._costs, self._near = tuple(costs), NEAR * max_itl_ratio
        self._high_since: float | None = None
        self._low_since: float | None = None

    def update(self, now: float, pressure: Pressure) -> bool:
        """Take account of the load at `now`; returns whether the level has changed, which it does by one at a time."""
        high, low = self._is_high(pressure), self._has_room(pressure)
        self._high_since = (self._high_since if self._high_since is not None else now) if high else None
        self._low_since = (self._low_since if self._low_since is not None else now) if low else None
        if self._high_since is not None and now - self._high_since >= RAISE_AFTER_S:
            return self._move(1, now)
        if self._low_since is not None and now - self._low_since >= LOWER_AFTER_S:
            return self._move(-1, now)
        return False

    def _is_high(self, pressure: Pressure) -> bool:
        return pressure.oldest_wait_s >= RAISE_WAIT_S or pressure.itl_ratio >= self._near

    def _has_room(self, pressure: Pressure) -> bool:
        if self.level == 0 or pressure.waiting:
            return False
        longer = self._costs[self.level - 1] / self._costs[self.level]
        fits = pressure.running * longer <= ROOM * pressure.slots
        return fits and pressure.itl_ratio * longer < self._near

    def _move(self, by: int, now: float) -> bool:
        before = self.level
        self.level = min(max(0, before + by), len(self._costs) - 1)
        self._high_since = now if by > 0 else None
        self._low_since = now if by < 0 else None
        return self.level != before
