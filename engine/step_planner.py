"""The step planner: the plan of one step within its tokens and its time, and preemption.

Decoding sequences come first (`engine/decodes.py`), then prompts by arrival (`engine/prefill.py`); out of blocks, the
youngest is preempted. Not here: committing a plan (see `engine/scheduler.py`).
"""

import math
from collections.abc import Callable

from engine.blocks import BlockManager
from engine.cost import NO_COST, StepBudget, StepCost, prefill_share
from engine.decodes import DecodePlanner
from engine.plan import Plan, PlanStats
from engine.prefill import PrefillPlanner
from engine.queues import Queues
from engine.sequence import Sequence
from engine.speculation import Speculator


class _OutOfBlocks(Exception):
    """A plan that is made ahead would have to preempt."""


class StepPlanner:
    """Plans steps from the queues, and allocates the blocks of what it plans. For its arguments see `Scheduler`."""

    def __init__(
        self,
        blocks: BlockManager,
        queues: Queues,
        max_running: int,
        max_step_tokens: int,
        chunked: bool,
        clock: Callable[[], float],
        *,
        cost: StepCost | None,
        step_seconds: float,
        min_chunk: int,
        speculator: Speculator | None,
    ) -> None:
        self.cost = cost
        self.step_seconds = step_seconds if step_seconds and chunked else math.inf
        self.stats = PlanStats()  # of the last plan
        self._blocks, self._queues, self._clock, self._speculator = blocks, queues, clock, speculator
        self._max_step_tokens, self._min_chunk = max_step_tokens, min_chunk
        self._decodes = DecodePlanner(blocks, queues, self.preempt)
        self._prefills = PrefillPlanner(blocks, queues, max_running, chunked, clock)
        self._may_preempt = True

    def plan(self) -> Plan:
        """The next step's chunks."""
        self.stats = PlanStats()
        step_budget = StepBudget(self.cost or NO_COST, self._max_step_tokens, self.step_seconds, self._min_chunk)
        plan = self._decodes.plan(step_budget, self._speculator)
        if self._queues.partial_prefill or (self._queues.waiting and not self._prefills.full):
            if step_budget.time_bounded:
                step_budget.reserve_for_prompts(prefill_share(self._queues.longest_wait(self._clock())))
            plan += self._prefills.plan(step_budget, self.stats)
        self.stats.estimated_s = step_budget.load.seconds if plan else 0.0
        self.stats.snapshots_displaced = self._blocks.plan_snapshots(plan)
        return tuple(plan)

    def plan_without_preempting(self) -> Plan:
        """The same, or an empty plan where a sequence would have to be preempted."""
        self._may_preempt = False
        try:
            return self.plan()
        except _OutOfBlocks:
            return ()
        finally:
            self._may_preempt = True

    def preempt(self, sequence: Sequence) -> None:
        """Take a running sequence's blocks and queue it again."""
        if not self._may_preempt:
            raise _OutOfBlocks
        self._blocks.release(sequence)
        sequence.preemptions += 1
        self.stats.preemptions += 1
        self._queues.requeue(sequence, self._clock())
