"""The engine: a scheduler and a runner, one step at a time. `step` reads like the definition of continuous batching.

Synchronous, knows no process and no socket: tests and benchmarks use it directly. A fault of the runner ends the
requests that it comes from and nothing else.
"""

import logging
import time
from collections.abc import Callable

from engine.grammars.compiler import GrammarCompiler
from engine.grammars.mask_client import MaskClient
from engine.grammars.matcher import Matcher
from engine.isolation import Isolation
from engine.pace import LONG, Pace
from engine.plan import NO_MOE_WORK, MoEWork, Plan, Runner, StepResult, sample_count
from engine.scheduler import Scheduler
from engine.types import Request, StepReport, StepStats, TokenEvent
from model.errors import EngineDown, InvalidRequest

log = logging.getLogger(__name__)

Outcome = tuple[list[TokenEvent], MoEWork]
NOTHING = StepResult((), NO_MOE_WORK)
MASK_WAIT_SECONDS, SHARE = 0.002, 0.1  # how long a step waits for masks: in seconds, or a share of the last step's time
IDLE_SECONDS = 0.02  # the same where there is nothing else to do


class Engine:
    """Runs requests to their end. Not thread-safe: one loop calls everything.

    `repeatable`: a plan whose run broke off may be run again (`engine/isolation.py`). `announce` hears, before a long
    step, how many seconds it may take.
    """

    def __init__(
        self, runner: Runner, scheduler: Scheduler, grammars: GrammarCompiler | None = None, *, repeatable: bool = True
    ) -> None:
        self.scheduler = scheduler
        self.announce: Callable[[float], None] = lambda _: None
        self._runner, self._grammars, self._repeatable = runner, grammars, repeatable
        self._retries = 0  # in this step
        self._last_s = 0.0  # what the last step took
        self._masks_s = 0.0  # what masks have taken so far
        self._pace = Pace()

    @property
    def runner(self) -> Runner:
        """What computes the plans."""
        return self._runner

    @property
    def has_work(self) -> bool:
        """Whether `step` would do or report anything."""
        return self.scheduler.has_work

    def add(self, request: Request, matcher: Matcher | None = None) -> None:
        """Queue a request. `matcher` is of its grammar, which is compiled now where none is given.

        Raises:
            InvalidRequest: it could never be served.
        """
        if request.sampling.grammar and matcher is None:
            matcher = self.compiler().compile(request.sampling.grammar)
        if matcher is not None:
            matcher.open()
        self.scheduler.add(request, matcher)

    def compiler(self) -> GrammarCompiler:
        """What compiles grammars for this model.

        Raises:
            InvalidRequest: it has no vocabulary to compile for.
        """
        if self._grammars is None:
            raise InvalidRequest("this engine has no tokenizer, which grammars need", "grammar")
        return self._grammars

    @property
    def awaited(self) -> list[MaskClient]:
        """What becomes readable when a mask that an answer waits for has come."""
        return self._grammars.processes.awaited if self._grammars else []

    def collect_masks(self) -> None:
        """Take in masks that have come, without waiting."""
        if self._grammars is not None:
            self._grammars.processes.collect()

    def _settle(self) -> None:
        """Take in masks. A step waits for the usual ones: not for long, where that would hold up answers without."""
        if self._grammars is not None and self._grammars.processes.busy:
            short = max(MASK_WAIT_SECONDS, SHARE * self._last_s)
            self._grammars.processes.settle(short if self.scheduler.queues.has_plain else IDLE_SECONDS)

    def _spent_on_masks(self) -> float:
        """Seconds since this was last asked."""
        before, self._masks_s = self._masks_s, self._grammars.processes.seconds if self._grammars else 0.0
        return self._masks_s - before

    def _await_masks(self) -> bool:
        """Where nothing can be done without a mask, wait for one, but not for long; false where none is due."""
        if self._grammars is None or not self._grammars.processes.busy:
            return False
        self._grammars.processes.wait(IDLE_SECONDS)
        return True

    def abort(self, request_id: str) -> None:
        """End a request; its blocks are free on return and its last event is in the next step's report."""
        self.scheduler.abort(request_id)

    def step(self) -> StepReport:
        """Schedule, run, commit.

        Raises:
            EngineDown: the runner has lost its device; only a new process can help. Nothing else is raised.
        """
        started = time.perf_counter()
        self._retries = 0
        plan: Plan = ()
        try:
            self._settle()
            plan = self.scheduler.schedule()
            read = sum(max(0, min(chunk.length, chunk.sequence.prompt_length - chunk.start)) for chunk in plan)
            events, work = self._run(plan)
            if not plan and not events and self.has_work and not self._await_masks():
                raise RuntimeError("there is work, but nothing could be scheduled")
        except EngineDown:
            raise
        except Exception:
            # Nobody may wait for ever, and a broken bookkeeping cannot be trusted with anyone's blocks.
            log.exception("the scheduler failed; every request ends and the cache is emptied")
            events, work, read = self.scheduler.reset("the engine failed and had to start afresh"), NO_MOE_WORK, 0
        self._last_s = time.perf_counter() - started
        return StepReport(tuple(events), self._stats(plan, events, work, read, self._last_s))

    def _run(self, plan: Plan) -> Outcome:
        """Compute and commit a plan."""
        if not self._repeatable and any(chunk.start < chunk.sequence.isolated_until for chunk in plan):
            return self._isolate(plan, None)
        result = NOTHING
        if plan:
            try:
                result = self._compute(plan)
            except EngineDown:
                raise
            except Exception as error:
                return self._isolate(plan, error)
        return self.scheduler.commit(plan, result.sampled, result.scores), result.work

    def _isolate(self, plan: Plan, error: Exception | None) -> Outcome:
        """Commit what can be computed of a plan that failed with `error`, or has sequences that may be at fault."""
        isolation = Isolation(self._compute, self._repeatable)
        if error is not None:
            log.error("a step of %d sequences failed", len(plan), exc_info=error)
            isolation.divide(plan, error)
        else:
            isolation.take_apart(plan)
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
            # The class name tells an operator what to look for; the text of a foreign exception may tell too much.
            self.scheduler.fail_chunks(
                [chunk], f"the model failed while computing this request ({type(fault).__name__})"
            )
        good = tuple(isolation.good)
        events = self.scheduler.commit(good, isolation.sampled, isolation.scores, isolation.recompute)
        return events, isolation.work

    def _compute(self, plan: Plan) -> StepResult:
        expected = self._pace.expect(plan, self.scheduler.plan_stats.estimated_s)
        if expected > LONG:
            self.announce(expected)
        started = time.perf_counter()
        result = self._runner.run(plan)
        self._pace.record(time.perf_counter() - started)
        if len(result.sampled) != sample_count(plan):
            raise ValueError(f"the plan samples {sample_count(plan)} tokens, the runner returned {len(result.sampled)}")
        return result

    def _stats(self, plan: Plan, events: list[TokenEvent], work: MoEWork, read: int, seconds: float) -> StepStats:
        scheduler = self.scheduler
        return StepStats(
            seconds=seconds,
            estimated_s=scheduler.plan_stats.estimated_s,
            prompt_tokens=read,
            generated_tokens=sum(event.token is not None for event in events),
            routed_pairs=work.routed_pairs,
            trained_pairs=work.trained_pairs,
            distinct_experts=work.distinct_experts,
            mixed=len({counts for chunk in plan for counts, _ in chunk.count_runs}) > 1,
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
            masks_s=self._spent_on_masks(),
        )
