"""How long the next step may take, from how long the last ones took: for the process that waits for its report.

Rough and rather too long: it tells a long step from a process that hangs, and schedules nothing. It knows plans, no
models; `engine/cost.py` has the fine estimate where there is one.
"""

from engine.plan import Plan

LONG = 0.25  # seconds; what is expected to take longer is announced
FIRST = 30.0  # seconds expected of a first step of which nothing is known
CONTEXT = 256  # tokens of context that cost as much to attend to as one more token costs otherwise
FADES = 0.9  # of the slowest pace, per chunk that was faster


class Pace:
    """What steps took, by kind: those that read prompts by their work, others simply as the last one."""

    def __init__(self) -> None:
        self._step: float | None = None  # seconds of the last one
        self._per_work = 0.0
        self._work = 0

    def expect(self, plan: Plan, estimate: float) -> float:
        """Seconds that the plan may take; `estimate` is the cost model's, 0 without one."""
        self._work = _work(plan)
        if self._step is None:
            return estimate or FIRST
        return max(estimate, self._step + self._work * self._per_work)

    def record(self, seconds: float) -> None:
        """The plan that was asked about took so long."""
        self._step = seconds
        if self._work:
            self._per_work = max(seconds / self._work, FADES * self._per_work)


def _work(plan: Plan) -> int:
    """Of chunks of several tokens: each token, and more the longer its context is."""
    if sum(chunk.length for chunk in plan) == len(plan):
        return 0
    return sum(chunk.length * (CONTEXT + chunk.start + chunk.length) for chunk in plan if chunk.length > 1)
