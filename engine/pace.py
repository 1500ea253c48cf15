"""An upper estimate of how long the next step takes, from the last steps: for the process that waits for its report.

It is rough and rather too long: it distinguishes a long step from a process that hangs, and plays no part in
scheduling. It depends on plans, not on models; `engine/cost.py` has the precise estimate.
"""

from engine.plan import Plan

LONG_STEP_SECONDS = 0.25  # a step that is expected to take longer is announced
FIRST_STEP_SECONDS = 30.0  # expected of the first step, if there is no estimate
CONTEXT_TOKENS = 256  # so many tokens of context cost as much as one token without context
DECAY = 0.9  # of the slowest pace, per faster step
COMPILE_SECONDS = 5.0  # expected of a step of a new size where kernels are compiled when they first run
EVEN = 16  # compilers of kernels tell multiples of it from other sizes


class Pace:
    """Expects a step to take as long as the last one, and prefill in it to take time in proportion to its work.

    `compiles`: a step of a size that is new may have to wait for kernels.
    """

    def __init__(self, compiles: bool = False) -> None:
        self._compiles, self._sizes = compiles, set[tuple[int, bool, bool]]()
        self._step: float | None = None  # seconds of the last step
        self._per_work = 0.0

    def expect(self, plan: Plan, estimate: float) -> float:
        """The seconds that a plan may take; `estimate` is the cost model's, 0 without one."""
        if self._step is None:
            return estimate or FIRST_STEP_SECONDS
        return max(estimate, self._step + _work(plan) * self._per_work, self._compile_seconds(plan))

    def _compile_seconds(self, plan: Plan) -> float:
        if not self._compiles or (size := _size(plan)) in self._sizes:
            return 0.0
        self._sizes.add(size)
        return COMPILE_SECONDS

    def record(self, plan: Plan, seconds: float) -> None:
        """Record how long a plan took."""
        self._step = seconds
        if work := _work(plan):
            self._per_work = max(seconds / work, DECAY * self._per_work)


def _size(plan: Plan) -> tuple[int, bool, bool]:
    """What kernels are compiled for, about: how many tokens there are, and whether they are all single."""
    tokens = sum(chunk.length * chunk.sequence.row_count for chunk in plan)
    return tokens.bit_length(), tokens % EVEN == 0, all(chunk.length == 1 for chunk in plan)


def _work(plan: Plan) -> int:
    """The work of a plan's prefill: its tokens, each weighted by its context. 0 if all chunks are single tokens."""
    work = 0
    for chunk in plan:
        if chunk.length > 1:
            work += chunk.length * chunk.sequence.row_count * (CONTEXT_TOKENS + chunk.start + chunk.length)
    return work
