"""Fault isolation: finds the sequences that make a step fail, by running it again in halves down to single sequences.

The results of a part that succeeds are kept: the same tokens at the same positions give the same keys and values,
whatever the failed run has written. This does not hold for recurrent states; sequences with states are recomputed. It
depends on plans and a function that runs them, not on the scheduler.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from engine.plan import NO_MOE_WORK, NOT_OBSERVED, Chunk, MoEWork, Observed, Plan, Sampled, StepResult
from engine.types import Logprob
from model.errors import EngineDown, GenerationFailed

MAX_SINGLE_FAILURES = 64  # if so many fail alone and none succeeds, the model is at fault and the rest is not tried


def failure_message(fault: Exception) -> str:
    """The message for the caller about the fault that ends a request.

    Of an unknown fault only the class name, by which an operator finds it in the log: its message may leak too much.
    """
    if isinstance(fault, GenerationFailed):
        return str(fault)
    return f"the model failed while computing this request ({type(fault).__name__})"


@dataclass(slots=True)
class Isolation:
    """Runs plans, and collects three kinds of chunks: those that succeeded, with their results; those that failed in a
    run of their own; and those to recompute.

    `repeatable`: a plan may be run again, since a failed run changes nothing but keys and values.
    """

    run: Callable[[Plan], StepResult]
    repeatable: bool
    succeeded: list[Chunk] = field(default_factory=list)
    sampled: list[Sampled] = field(default_factory=list)
    prompt_logprobs: list[tuple[Logprob, ...] | None] = field(default_factory=list)
    observed: list[Observed] = field(default_factory=list)
    works: list[MoEWork] = field(default_factory=list)
    failed: list[tuple[Chunk, Exception]] = field(default_factory=list)
    recompute: list[Chunk] = field(default_factory=list)
    runs: int = 0

    def run_or_divide(self, plan: Plan) -> None:
        """Run a plan; if it fails, run its parts.

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
            self.succeeded += plan
            self.sampled += result.sampled
            self.prompt_logprobs += result.prompt_logprobs
            self.observed += result.observed or (NOT_OBSERVED,) * len(plan)
            self.works.append(result.work)

    def run_again(self, plan: Plan) -> None:
        """Handle a launched plan that has failed, perhaps for want of memory that another launch held: run it again
        with nothing beside it. One that may not be run again is computed again, in steps of its own."""
        if self.repeatable:
            self.run_or_divide(plan)
        else:
            self.recompute += plan

    def run_suspects_alone(self, plan: Plan) -> None:
        """Run a plan, with the sequences of an earlier failed step one by one, to find the one at fault."""
        if together := tuple(chunk for chunk in plan if chunk.start >= chunk.sequence.isolated_until):
            self.run_or_divide(together)
        for chunk in plan:
            if chunk.start < chunk.sequence.isolated_until:
                self.run_or_divide((chunk,))

    def divide(self, plan: Plan, error: Exception) -> None:
        """Handle a plan that has failed: run its halves, unless it is one chunk or may not be run again."""
        if len(plan) == 1:
            self.failed.append((plan[0], error))
        elif not self.repeatable:
            self.recompute += plan
        else:
            for part in (plan[::2], plan[1::2]):  # the answers of one call are neighbours: spread them over both halves
                self._retry(part, error)

    def _retry(self, plan: Plan, error: Exception) -> None:
        if not self.succeeded and len(self.failed) >= MAX_SINGLE_FAILURES:
            self.failed += [(chunk, error) for chunk in plan]
            return
        for chunk in plan:
            chunk.sequence.sampler_state = None  # it may have been half updated, and follows from the tokens
        self.run_or_divide(plan)

    @property
    def work(self) -> MoEWork:
        """The work of all parts that succeeded."""
        if len(self.works) == 1:
            return self.works[0]
        imbalance = max((work.load_imbalance for work in self.works), default=NO_MOE_WORK.load_imbalance)
        routed = sum(work.routed_pairs for work in self.works)
        trained = sum(work.trained_pairs for work in self.works)
        distinct = sum(work.distinct_experts for work in self.works)
        return MoEWork(routed_pairs=routed, trained_pairs=trained, distinct_experts=distinct, load_imbalance=imbalance)
