"""The engine: a scheduler and a runner, one step at a time. `Engine.step` is the loop body of continuous batching.

Where the runner's device computes by itself, step n+1 is planned and launched while it computes step n: the ids of the
tokens between them stay on the device, and the host reads them one step late. Elsewhere a step is planned, run and
committed. Tests and benchmarks call it directly. An error of the runner ends only the requests that cause it.
Not here: the process around it (see `engine/process/worker.py`).
"""

import logging
import time
from collections.abc import Callable

from engine.grammars.compiler import GrammarCompiler
from engine.grammars.matcher import Matcher
from engine.isolation import Isolation, failure_message
from engine.mask_waits import MaskWaits
from engine.open_step import OpenStep, step_stats
from engine.pace import LONG_STEP_SECONDS, Pace
from engine.plan import NO_MOE_WORK, MoEWork, OverlappingRunner, Plan, PlanStats, Runner, StepResult, sample_count
from engine.scheduler import Scheduler
from engine.types import Request, StepReport, TokenEvent
from model.budget import ExpertCounts
from model.errors import EngineDown

log = logging.getLogger(__name__)

Outcome = tuple[list[TokenEvent], MoEWork]
NO_RESULT = StepResult((), NO_MOE_WORK)


class Engine:
    """Runs requests to their end. Not thread-safe: use it from one thread.

    `overlapping`: the same runner, if it can launch steps without waiting for them. `repeatable`: a plan whose run
    failed may be run again (`engine/isolation.py`). `announce` is called before a long step with the seconds that it
    may take.
    """

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        grammars: GrammarCompiler | None = None,
        *,
        overlapping: OverlappingRunner | None = None,
        repeatable: bool = True,
    ) -> None:
        self.scheduler = scheduler
        self.announce: Callable[[float], None] = lambda _: None
        self.masks = MaskWaits(grammars)
        self._runner, self._repeatable = runner, repeatable
        self._overlapping = None if scheduler.speculator else overlapping  # drafts need the tokens before them
        self._open: OpenStep | None = None  # launched by the last `step`
        self._retries = 0  # in this step
        self._last_s = 0.0  # duration of the last step
        self._finished_at = 0.0  # when the device had computed the last launched step
        self._pace = Pace(compiles=self._overlapping is not None)

    @property
    def runner(self) -> Runner:
        """The runner that computes the plans."""
        return self._runner

    @property
    def has_work(self) -> bool:
        """Whether `step` would compute or report anything."""
        return self.scheduler.has_work or self._open is not None

    def add(self, request: Request, matcher: Matcher | None = None) -> None:
        """Queue a request. `matcher` follows its grammar; without one the grammar is compiled now.

        Raises:
            InvalidRequest: it could never be served.
        """
        if request.sampling.grammar and matcher is None:
            matcher = self.masks.compiler().compile(request.sampling.grammar)
        if matcher is not None:
            matcher.open()
        self.scheduler.add(request, matcher)

    def abort(self, request_id: str) -> None:
        """End a request; its blocks are free on return and its last event is in the next step's report."""
        self.scheduler.abort(request_id)

    def set_counts(self, request_id: str, counts: ExpertCounts) -> None:
        """Give the tokens of a request that are still to be computed these counts, one per MoE layer."""
        self.scheduler.set_counts(request_id, counts)

    def step(self) -> StepReport:
        """Plan, run and commit a step; of steps that overlap: launch one more, and commit the one before.

        Raises:
            EngineDown: the runner has lost its device; only a new process can help. Nothing else is raised.
        """
        started = time.perf_counter()
        self._retries = 0
        step, self._open = self._open, None
        try:
            step = step or self._plan()
            following = self._launch_ahead(step)
            events, work = self._finish(step, following)
            idle = not step.launched_at and not step.plan and not events
            if idle and self.has_work and not self.masks.wait_idle():
                raise RuntimeError("there is work, but nothing could be scheduled")
        except EngineDown:
            raise
        except Exception:
            # No request may wait for ever, and the block manager's state cannot be trusted any more.
            log.exception("the scheduler failed; every request ends and the cache is emptied")
            events, work = self.scheduler.reset("the engine failed and had to start afresh"), NO_MOE_WORK
            step, self._open = OpenStep((), PlanStats(), 0), None
        self._last_s = time.perf_counter() - started
        stats = step_stats(
            step,
            self.scheduler,
            events,
            work,
            seconds=self._last_s,
            retries=self._retries,
            masks_s=self.masks.seconds(),
        )
        return StepReport(tuple(events), stats)

    def _wait_for_masks(self) -> None:
        self.masks.wait(self._last_s, self.scheduler.queues.has_plain)

    def _plan(self) -> OpenStep:
        """A step after one that is committed; launched if steps overlap."""
        self._wait_for_masks()
        step = self._opened(self.scheduler.schedule())
        if self._overlapping is not None and step.plan and not self._runs_alone(step.plan):
            self._launch(self._overlapping, step)
            self._sample(self._overlapping, step, step.plan)
        return step

    def _opened(self, plan: Plan) -> OpenStep:
        prefilled = 0
        for chunk in plan:
            if chunk.start < (prompt := chunk.sequence.prompt_length):
                prefilled += min(chunk.length, prompt - chunk.start)
        return OpenStep(plan, self.scheduler.plan_stats, prefilled)

    def _launch_ahead(self, step: OpenStep) -> OpenStep | None:
        """The step after one that is launched, launched as well; None where there is none, or it cannot be known."""
        if self._overlapping is None or step.launched is None or step.error is not None:
            return None
        with self.scheduler.ahead(step.plan, repeatable=self._repeatable) as plan:
            following = self._opened(plan)
            if plan:
                self._launch(self._overlapping, following)
        return following if plan else None

    def _launch(self, runner: OverlappingRunner, step: OpenStep) -> None:
        self._expect(step.plan, step.stats)
        step.launched_at = time.perf_counter()
        try:
            step.launched = runner.launch(step.plan)
        except EngineDown:
            raise
        except Exception as error:
            step.error = error

    def _sample(self, runner: OverlappingRunner, step: OpenStep, plan: Plan) -> None:
        """Start to sample for `plan`, what is still wanted of the step."""
        step.plan = plan
        if step.error is not None:
            return
        try:
            runner.sample(step.launched, plan)
        except EngineDown:
            raise
        except Exception as error:
            step.error = error

    def _finish(self, step: OpenStep, following: OpenStep | None) -> Outcome:
        """Commit a step, and sample for the one that follows it. If the step fails, the one after it is withdrawn."""
        outcome = self._run(step)
        if following is None or self._overlapping is None:
            return outcome
        if step.error is not None:
            self.scheduler.withdraw(following.plan, repeatable=self._repeatable)
            return outcome
        if any(chunk.sequence.matcher is not None for chunk in following.plan):
            self._wait_for_masks()
        self._sample(self._overlapping, following, self.scheduler.still_open(following.plan))
        self._open = following
        return outcome

    def _run(self, step: OpenStep) -> Outcome:
        """Compute and commit a step; returns its events and its work."""
        plan = step.plan
        if step.launched is None and step.error is None and self._runs_alone(plan):
            return self._isolate(plan, None)
        result = NO_RESULT
        if plan:
            try:
                result = self._result(step)
            except EngineDown:
                raise
            except Exception as error:
                step.error = error
                return self._isolate(plan, error, launched=step.launched_at > 0)
        return self.scheduler.commit(
            plan, result.sampled, result.prompt_logprobs, observed=result.observed
        ), result.work

    def _runs_alone(self, plan: Plan) -> bool:
        """Whether the plan has sequences that are suspected of a fault, and cannot be run twice."""
        return not self._repeatable and any(chunk.start < chunk.sequence.isolated_until for chunk in plan)

    def _isolate(self, plan: Plan, error: Exception | None, launched: bool = False) -> Outcome:
        """Commit as much as can be computed of a plan that failed with `error`, or that has suspected sequences.
        `launched`: other steps were launched before and after it."""
        isolation = Isolation(self._compute, self._repeatable)
        if error is not None:
            log.error("a step of %d sequences failed", len(plan), exc_info=error)
            if launched:
                isolation.run_again(plan)
            else:
                isolation.divide(plan, error)
        else:
            isolation.run_suspects_alone(plan)
        self._retries = isolation.runs
        if error is not None or isolation.failed or isolation.recompute:
            log.error(
                "of %d sequences %d end, %d are computed again (%d more runs)",
                len(plan),
                len(isolation.failed),
                len(isolation.recompute),
                isolation.runs,
            )
        for chunk, fault in isolation.failed:
            self.scheduler.fail_chunks([chunk], failure_message(fault))
        good = tuple(isolation.succeeded)
        events = self.scheduler.commit(
            good, isolation.sampled, isolation.prompt_logprobs, isolation.recompute, isolation.observed
        )
        return events, isolation.work

    def _result(self, step: OpenStep) -> StepResult:
        """The result of a launched step, or of one that is run now. Raises what its launch has raised."""
        if step.error is not None:
            raise step.error
        if step.launched is None or self._overlapping is None:
            return self._compute(step.plan)
        result = self._overlapping.finish(step.launched)
        began, self._finished_at = max(step.launched_at, self._finished_at), time.perf_counter()
        self._pace.record(step.plan, self._finished_at - began)
        return _checked(step.plan, result)

    def _compute(self, plan: Plan) -> StepResult:
        self._expect(plan, self.scheduler.plan_stats)
        started = time.perf_counter()
        result = self._runner.run(plan)
        self._pace.record(plan, time.perf_counter() - started)
        return _checked(plan, result)

    def _expect(self, plan: Plan, stats: PlanStats) -> None:
        """Announce a plan that may take long."""
        expected = self._pace.expect(plan, stats.estimated_s)
        if expected > LONG_STEP_SECONDS:
            self.announce(expected)


def _checked(plan: Plan, result: StepResult) -> StepResult:
    if len(result.sampled) != sample_count(plan):
        raise ValueError(f"the plan samples {sample_count(plan)} tokens, the runner returned {len(result.sampled)}")
    return result
