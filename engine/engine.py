"""The engine: a scheduler and a runner, one step at a time. `Engine.step` is the loop body of continuous batching.

It is synchronous: tests and benchmarks use it directly. An error of the runner ends only the requests that cause it.
Not here: the process around it (see `engine/process/worker.py`).
"""

import logging
import time
from collections.abc import Callable

from engine.grammars.compiler import GrammarCompiler
from engine.grammars.mask_client import MaskClient
from engine.grammars.matcher import Matcher
from engine.isolation import Isolation, failure_message
from engine.pace import LONG_STEP_SECONDS, Pace
from engine.plan import NO_MOE_WORK, MoEWork, Plan, Runner, StepResult, sample_count
from engine.scheduler import Scheduler
from engine.types import Request, StepReport, StepStats, TokenEvent
from model.budget import ExpertCounts
from model.errors import EngineDown, InvalidRequest

log = logging.getLogger(__name__)

Outcome = tuple[list[TokenEvent], MoEWork]
NO_RESULT = StepResult((), NO_MOE_WORK)
MASK_WAIT_SECONDS, MASK_WAIT_SHARE = 0.002, 0.1  # a step waits for masks this long, or this share of the last step
IDLE_WAIT_SECONDS = 0.02  # how long it waits if there is nothing else to do


class Engine:
    """Runs requests to their end. Not thread-safe: use it from one thread.

    `repeatable`: a plan whose run failed may be run again (`engine/isolation.py`). `announce` is called before a long
    step with the seconds that it may take.
    """

    def __init__(
        self, runner: Runner, scheduler: Scheduler, grammars: GrammarCompiler | None = None, *, repeatable: bool = True
    ) -> None:
        self.scheduler = scheduler
        self.announce: Callable[[float], None] = lambda _: None
        self._runner, self._grammars, self._repeatable = runner, grammars, repeatable
        self._retries = 0  # in this step
        self._last_s = 0.0  # duration of the last step
        self._masks_s = 0.0  # time spent on masks so far
        self._pace = Pace()

    @property
    def runner(self) -> Runner:
        """The runner that computes the plans."""
        return self._runner

    @property
    def has_work(self) -> bool:
        """Whether `step` would compute or report anything."""
        return self.scheduler.has_work

    def add(self, request: Request, matcher: Matcher | None = None) -> None:
        """Queue a request. `matcher` follows its grammar; without one the grammar is compiled now.

        Raises:
            InvalidRequest: it could never be served.
        """
        if request.sampling.grammar and matcher is None:
            matcher = self.compiler().compile(request.sampling.grammar)
        if matcher is not None:
            matcher.open()
        self.scheduler.add(request, matcher)

    def compiler(self) -> GrammarCompiler:
        """The grammar compiler for this model's vocabulary.

        Raises:
            InvalidRequest: the model has no tokenizer.
        """
        if self._grammars is None:
            raise InvalidRequest("this engine has no tokenizer, which grammars need", "grammar")
        return self._grammars

    @property
    def awaited(self) -> list[MaskClient]:
        """The clients that become readable when a mask has come that an answer waits for."""
        return self._grammars.processes.awaited if self._grammars else []

    def collect_masks(self) -> None:
        """Process the masks that have come, without waiting."""
        if self._grammars is not None:
            self._grammars.processes.collect()

    def _wait_for_masks(self) -> None:
        """Wait for the usual masks, but only briefly if answers without a grammar would be delayed."""
        if self._grammars is not None and self._grammars.processes.busy:
            short = max(MASK_WAIT_SECONDS, MASK_WAIT_SHARE * self._last_s)
            self._grammars.processes.settle(short if self.scheduler.queues.has_plain else IDLE_WAIT_SECONDS)

    def _mask_seconds(self) -> float:
        """Seconds spent on masks since the last call."""
        before = self._masks_s
        self._masks_s = self._grammars.processes.seconds if self._grammars else 0.0
        return self._masks_s - before

    def _wait_for_any_mask(self) -> bool:
        """Wait briefly for a mask if the step has nothing else to do; returns whether one is due."""
        if self._grammars is None or not self._grammars.processes.busy:
            return False
        self._grammars.processes.wait(IDLE_WAIT_SECONDS)
        return True

    def abort(self, request_id: str) -> None:
        """End a request; its blocks are free on return and its last event is in the next step's report."""
        self.scheduler.abort(request_id)

    def set_counts(self, request_id: str, counts: ExpertCounts) -> None:
        """Give the tokens of a request that are still to be computed these counts, one per MoE layer."""
        self.scheduler.set_counts(request_id, counts)

    def step(self) -> StepReport:
        """Schedule, run, commit.

        Raises:
            EngineDown: the runner has lost its device; only a new process can help. Nothing else is raised.
        """
        started = time.perf_counter()
        self._retries = 0
        plan: Plan = ()
        try:
            self._wait_for_masks()
            plan = self.scheduler.schedule()
            prefilled = sum(max(0, min(chunk.length, chunk.sequence.prompt_length - chunk.start)) for chunk in plan)
            events, work = self._run(plan)
            if not plan and not events and self.has_work and not self._wait_for_any_mask():
                raise RuntimeError("there is work, but nothing could be scheduled")
        except EngineDown:
            raise
        except Exception:
            # No request may wait for ever, and the block manager's state cannot be trusted any more.
            log.exception("the scheduler failed; every request ends and the cache is emptied")
            events, work, prefilled = self.scheduler.reset("the engine failed and had to start afresh"), NO_MOE_WORK, 0
        self._last_s = time.perf_counter() - started
        return StepReport(tuple(events), self._stats(plan, events, work, prefilled, self._last_s))

    def _run(self, plan: Plan) -> Outcome:
        """Compute and commit a plan; returns its events and its work."""
        if not self._repeatable and any(chunk.start < chunk.sequence.isolated_until for chunk in plan):
            return self._isolate(plan, None)
        result = NO_RESULT
        if plan:
            try:
                result = self._compute(plan)
            except EngineDown:
                raise
            except Exception as error:
                return self._isolate(plan, error)
        return self.scheduler.commit(
            plan, result.sampled, result.prompt_logprobs, observed=result.observed
        ), result.work

    def _isolate(self, plan: Plan, error: Exception | None) -> Outcome:
        """Commit as much as can be computed of a plan that failed with `error`, or that has suspected sequences."""
        isolation = Isolation(self._compute, self._repeatable)
        if error is not None:
            log.error("a step of %d sequences failed", len(plan), exc_info=error)
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

    def _compute(self, plan: Plan) -> StepResult:
        expected = self._pace.expect(plan, self.scheduler.plan_stats.estimated_s)
        if expected > LONG_STEP_SECONDS:
            self.announce(expected)
        started = time.perf_counter()
        result = self._runner.run(plan)
        self._pace.record(time.perf_counter() - started)
        if len(result.sampled) != sample_count(plan):
            raise ValueError(f"the plan samples {sample_count(plan)} tokens, the runner returned {len(result.sampled)}")
        return result

    def _stats(self, plan: Plan, events: list[TokenEvent], work: MoEWork, prefilled: int, seconds: float) -> StepStats:
        scheduler = self.scheduler
        generated = sum(event.token is not None for event in events)
        count_sets = {counts for chunk in plan for counts, _ in chunk.count_runs}
        return StepStats(
            seconds=seconds,
            estimated_s=scheduler.plan_stats.estimated_s,
            prompt_tokens=prefilled,
            generated_tokens=generated,
            routed_pairs=work.routed_pairs,
            trained_pairs=work.trained_pairs,
            distinct_experts=work.distinct_experts,
            mixed=len(count_sets) > 1,
            load_imbalance=work.load_imbalance,
            preemptions=scheduler.plan_stats.preemptions,
            prefix_queries=scheduler.plan_stats.prefix_queries,
            prefix_hits=scheduler.plan_stats.prefix_hits,
            drafted=scheduler.plan_stats.drafted,
            accepted=scheduler.plan_stats.accepted,
            running=scheduler.running,
            waiting=scheduler.waiting,
            oldest_waiting_s=scheduler.oldest_waiting_s,
            blocks_used=scheduler.blocks.used,
            blocks_total=scheduler.blocks.total,
            retries=self._retries,
            masks_s=self._mask_seconds(),
        )
