"""Which rows of a failed step are at fault: the step is run again in halves, until a part works or is one row.

A part that works counts: the same tokens at the same positions give the same keys and values, whatever a run that broke
off has written before. States of recurrent layers are not like that; sequences that have them are computed again.
It knows plans and a way to run them, no scheduler.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from engine.plan import NO_MOE_WORK, Chunk, MoEWork, Plan, Sampled, StepResult
from engine.types import Logprob
from model.errors import EngineDown

HOPELESS = 64  # rows that fail one by one while none has worked: the fault is the model's, and the rest is not tried


@dataclass(slots=True)
class Isolation:
    """Runs plans, and keeps what worked (`good`, with its results), what failed as one row, and what must be set back.

    `repeatable`: a plan may be run again, since a run that broke off leaves nothing but keys and values.
    """

    run: Callable[[Plan], StepResult]
    repeatable: bool
    good: list[Chunk] = field(default_factory=list)
    sampled: list[Sampled] = field(default_factory=list)
    scores: list[tuple[Logprob, ...] | None] = field(default_factory=list)
    works: list[MoEWork] = field(default_factory=list)
    failed: list[tuple[Chunk, Exception]] = field(default_factory=list)
    recompute: list[Chunk] = field(default_factory=list)
    runs: int = 0

    def take(self, plan: Plan) -> None:
        """Run a plan, or as much of it as can be run.

        Raises:
            EngineDown: the device is lost.
        """
        try:
            self.runs += 1
            result = self.run(plan)
        except EngineDown:
            raise
        except Exception as error:
            self.divide(plan, error)
        else:
            self.good += plan
            self.sampled += result.sampled
            self.scores += result.scores
            self.works.append(result.work)

    def take_apart(self, plan: Plan) -> None:
        """Run a plan; sequences that were set back are run one by one, to show whose fault that was."""
        if together := tuple(chunk for chunk in plan if chunk.start >= chunk.sequence.isolated_until):
            self.take(together)
        for chunk in plan:
            if chunk.start < chunk.sequence.isolated_until:
                self.take((chunk,))

    def divide(self, plan: Plan, error: Exception) -> None:
        """Go on with a plan that has failed."""
        if len(plan) == 1:
            self.failed.append((plan[0], error))
        elif not self.repeatable:
            self.recompute += plan
        else:
            for part in (plan[::2], plan[1::2]):  # so that rows of one call, which are neighbours, are not tried first
                self._retry(part, error)

    def _retry(self, plan: Plan, error: Exception) -> None:
        if not self.good and len(self.failed) >= HOPELESS:
            self.failed += [(chunk, error) for chunk in plan]
            return
        for chunk in plan:
            chunk.sequence.sampler_state = None  # it may have been half updated, and follows from the tokens
        self.take(plan)

    @property
    def work(self) -> MoEWork:
        """That of all parts that worked."""
        if len(self.works) == 1:
            return self.works[0]
        return MoEWork(
            sum(work.routed_pairs for work in self.works),
            sum(work.trained_pairs for work in self.works),
            sum(work.distinct_experts for work in self.works),
            max((work.load_imbalance for work in self.works), default=NO_MOE_WORK.load_imbalance),
        )
