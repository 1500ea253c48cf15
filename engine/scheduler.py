"""The scheduler of continuous batching: it plans which tokens a step computes, and commits the step's results.

A plan is made by `engine/step_planner.py`. While a device computes one, the next can be planned (`ahead`). What was
computed is written to the sequences by `engine/results.py`.
"""

import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager

from engine.ahead import computed, holds
from engine.blocks import BlockManager
from engine.cost import StepCost
from engine.fits import require_fits, require_scores
from engine.grammars.matcher import Matcher
from engine.open_plans import OpenPlans
from engine.plan import NOT_OBSERVED, Chunk, Observed, Plan, PlanStats, PromptLogprobs, Sampled, require_results
from engine.queues import Queues
from engine.results import Results
from engine.sequence import Sequence
from engine.speculation import Speculator
from engine.step_planner import StepPlanner
from engine.types import Request, TokenEvent
from model.budget import ExpertCounts
from model.errors import InvalidRequest
from model.expert_range import ExpertRange


class Scheduler:
    """Plans steps of at most `max_running` rows (two for self-contrast, else one) and `max_step_tokens` tokens.

    With a `cost` and `step_seconds`, a step that decodes prefills only as much as keeps its estimated time within
    `step_seconds`, but at least `min_chunk` tokens, and at least a share of the step that grows with the age of the
    oldest waiting sequence. Prompts are cut by cost: one with many experts gets a shorter chunk. `cost` may be set
    between steps.

    With `chunked=False` (mixtures that mix tokens) a prompt is prefilled whole, and a preempted sequence is recomputed
    as it was first computed: the prompt in one chunk, then token by token. Such a prompt may exceed `max_step_tokens`
    as the only prompt of its step, and is never cut by cost.

    A `speculator` proposes drafts for sequences that decode. Drafts use only tokens of the step and blocks that no
    other sequence needs.

    `experts`: what the model can run, to refuse other routing rules and to tell what the trained count would cost;
    `score_refusal`: why it has no log-probabilities of prompts; empty: it has.
    """

    def __init__(
        self,
        blocks: BlockManager,
        max_running: int,
        max_step_tokens: int,
        max_model_len: int,
        chunked: bool = True,
        clock: Callable[[], float] = time.monotonic,
        *,
        cost: StepCost | None = None,
        step_seconds: float = 0.0,
        min_chunk: int = 16,
        speculator: Speculator | None = None,
        experts: ExpertRange | None = None,
        score_refusal: str = "",
    ) -> None:
        if not 1 <= max_running <= max_step_tokens:
            raise ValueError(
                f"max_step_tokens {max_step_tokens} must be at least max_running {max_running}, at least 1"
            )
        if blocks.prefix_cache and not chunked:
            raise ValueError("a model that must prefill prompts whole cannot use a prefix cache")
        if speculator is not None and not chunked:
            raise ValueError("a model that mixes tokens cannot verify drafts")
        if min_chunk < 1:
            raise ValueError(f"min_chunk must be at least 1, or prompts would never be prefilled; got {min_chunk}")
        self.blocks = blocks
        self.max_running, self.max_step_tokens, self.max_model_len = max_running, max_step_tokens, max_model_len
        self.speculator = speculator
        self._chunked, self._clock = chunked, clock
        self.queues = Queues()
        self._waiting, self._running = self.queues.waiting, self.queues.running
        self._experts, self._score_refusal = experts, score_refusal
        self._planner = StepPlanner(
            blocks,
            self.queues,
            max_running,
            max_step_tokens,
            chunked,
            clock,
            cost=cost,
            step_seconds=step_seconds,
            min_chunk=min_chunk,
            speculator=speculator,
        )
        self._open = OpenPlans()
        self._results = Results(blocks, self.queues, max_model_len, chunked, clock, speculator)

    @property
    def running(self) -> int:
        """Sequences that hold blocks."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Sequences in the queue, preempted ones included."""
        return len(self._waiting)

    @property
    def oldest_waiting_s(self) -> float:
        """Seconds for which the oldest waiting sequence has waited for its next token; 0 if none waits."""
        return self.queues.longest_wait(self._clock())

    @property
    def cost(self) -> StepCost | None:
        """What steps cost; None: they are not bounded in time."""
        return self._planner.cost

    @cost.setter
    def cost(self, cost: StepCost | None) -> None:
        self._planner.cost = cost

    @property
    def plan_stats(self) -> PlanStats:
        """Of the last plan."""
        return self._planner.stats

    @property
    def has_work(self) -> bool:
        """Whether a step would compute or report anything."""
        return bool(self._running or self._waiting or self._results.events)

    def add(self, request: Request, matcher: Matcher | None = None) -> None:
        """Queue a request; `matcher` follows its grammar.

        Raises:
            InvalidRequest: it is empty, its id is taken, it could never fit in the context or the cache, or the model
                does not run its routing rule, or does not score prompts.
        """
        if request.id in self._running or request.id in self._waiting:
            raise InvalidRequest(f"a request with id {request.id!r:.64} is already running", "id", "duplicate_id")
        require_fits(request, self.max_model_len, self.blocks.total, self.blocks.block_size, self.max_running)
        require_scores(request, self._score_refusal)
        if self._experts is not None:
            self._experts.check(request.budget, "experts")
        self.queues.add(Sequence(request, self._clock(), matcher, self._experts))

    def abort(self, request_id: str) -> None:
        """End a request; its last event comes with the next commit. An unknown id is ignored: it may just have ended.

        Its blocks are free on return, or, if it is part of the running step, after that step's commit.
        """
        if request_id in self._open:
            self._open.abort(request_id)
        elif sequence := self._running.get(request_id) or self._waiting.get(request_id):
            self._results.finish(sequence, "abort")

    def set_counts(self, request_id: str, counts: ExpertCounts) -> None:
        """Give the tokens of a request that are still to be computed these counts, one per MoE layer; those of an open
        plan are being computed. An unknown id is ignored: it may just have ended."""
        if sequence := self._running.get(request_id) or self._waiting.get(request_id):
            self.blocks.forget_hashes(sequence, sequence.set_counts(counts, self._open.end_of(request_id)))

    def schedule(self) -> Plan:
        """Choose the next step's chunks and allocate their blocks. Every plan must be committed or failed.

        Raises:
            RuntimeError: the last plan is still open.
        """
        if self._open:
            raise RuntimeError("the last plan is neither committed nor failed")
        return self._opened(self._planner.plan())

    @contextmanager
    def ahead(self, plan: Plan, *, repeatable: bool) -> Iterator[Plan]:
        """The plan after `plan`, which is open, made as if that were committed. Inside the context each sequence that
        `plan` samples for has the token `LATE`, until that token is known; nothing else is to be done there but to
        launch the new plan.

        Left out are sequences that end with `plan`, and, unless a chunk is `repeatable`, those with a grammar, whose
        masks may be late. The plan is empty where a sequence would have to be preempted, or where one is suspected of a
        fault and must run alone. After `plan` is committed, `still_open` tells what is left of the new one.

        Raises:
            RuntimeError: `plan` is not the only open one, drafts are made, which need the tokens before them, or there
                are snapshots, which are kept when a plan is committed.
        """
        if len(self._open) != 1 or self.speculator is not None or self.blocks.snapshots is not None:
            raise RuntimeError("one plan must be open to plan ahead of its commit, and none with drafts or snapshots")
        ending = {chunk.sequence.id for chunk in plan if holds(chunk, repeatable, self.max_model_len)}
        held = ending | {chunk.sequence.id for chunk in plan if self._open.is_aborting(chunk.sequence.id)}
        with computed(plan, held, self.queues, self._chunked):
            suspects = not repeatable and self.queues.has_suspects
            yield () if suspects else self._opened(self._planner.plan_without_preempting())

    def still_open(self, plan: Plan) -> Plan:
        """The chunks of a plan made ahead that are still wanted, now that the plan before it is committed: of sequences
        that run on, and whose masks are there."""
        wanted = tuple(
            chunk for chunk in plan if self._running.get(chunk.sequence.id) is chunk.sequence and chunk.sequence.ready
        )
        self._open.replace_last(wanted)
        return wanted

    def withdraw(self, plan: Plan, *, repeatable: bool) -> None:
        """Take back a plan made ahead, as if it had not been launched. Sequences that started with it wait again;
        unless its chunks are `repeatable`, all of its sequences are computed again."""
        self._open.drop_last()
        for chunk in plan:
            sequence = chunk.sequence
            goes_on = repeatable and (sequence.pending == 1 or self.queues.partial_prefill is sequence)
            if self._running.get(sequence.id) is sequence and not goes_on:
                self._planner.preempt(sequence)

    def _opened(self, plan: Plan) -> Plan:
        """The same plan, which is open from now on unless it is empty."""
        if plan:
            self._open.add(plan)
        return plan

    def commit(
        self,
        plan: Plan,
        sampled: Seq[Sampled],
        prompt_logprobs: Seq[PromptLogprobs] = (),
        recompute: Seq[Chunk] = (),
        observed: Seq[Observed] = (),
    ) -> list[TokenEvent]:
        """Apply a step's results and return all events since the last commit. Of two open plans, the first.

        Results are in plan order: one `Sampled` per sampling chunk, one entry of `prompt_logprobs` per chunk with
        scored positions; of `observed` one per chunk, or none. Sequences of `recompute` chunks are computed again,
        from their first token or from a snapshot of their states.

        Raises:
            ValueError: the number of results is wrong; nothing has changed.
        """
        samples, scores = [chunk.samples for chunk in plan], [bool(chunk.scored_positions) for chunk in plan]
        require_results(sum(samples), len(sampled), sum(scores), len(prompt_logprobs))
        results, scored = iter(sampled), iter(prompt_logprobs)
        seen_of = observed or (NOT_OBSERVED,) * len(plan)
        for chunk, seen, does_sample, does_score in zip(plan, seen_of, samples, scores, strict=True):
            found = next(scored) if does_score else ()
            result, aborted = next(results) if does_sample else None, self._open.is_aborting(chunk.sequence.id)
            self._results.apply(chunk, result, found, seen=seen, aborted=aborted, plan_stats=self.plan_stats)
        if self.speculator is not None:
            self.speculator.record_step(self.plan_stats.estimated_s, len(sampled) + self.plan_stats.accepted)
        if recompute:
            self._recompute(recompute)
        return self._take_events()

    def fail(self, plan: Plan, message: str) -> list[TokenEvent]:
        """End every sequence of an open plan with an error; nothing that they computed stays in the prefix cache."""
        self.fail_chunks(plan, message)
        return self._take_events()

    def fail_chunks(self, chunks: Seq[Chunk], message: str) -> None:
        """End some sequences of an open plan with an error; the rest of the plan is still to be committed."""
        for chunk in chunks:
            aborted = self._open.is_aborting(chunk.sequence.id)
            self._results.finish(chunk.sequence, "abort" if aborted else "error", error=None if aborted else message)

    def reset(self, message: str) -> list[TokenEvent]:
        """End all sequences with an error and free all blocks: the recovery from a fault in the scheduler itself."""
        self._open.clear()
        self.blocks.clear()
        for sequence in [*self._running.values(), *self._waiting.values()]:
            self._results.finish(sequence, "error", error=message)
        return self._take_events()

    def check(self) -> None:
        """Verify the invariants of the block manager and of the queues, while no plan is open.

        Raises:
            RuntimeError: one does not hold.
        """
        self.blocks.check()
        self.queues.check(self.blocks.holders, self._chunked)

    def _recompute(self, chunks: Seq[Chunk]) -> None:
        """Preempt the chunks' sequences; up to where these chunks end, each will run in a step of its own."""
        for chunk in chunks:
            sequence = chunk.sequence
            sequence.isolated_until = max(sequence.isolated_until, chunk.start + chunk.length)
            if self._open.is_aborting(sequence.id):
                self._results.finish(sequence, "abort")
            elif sequence.id in self._running:
                self._planner.preempt(sequence)

    def _take_events(self) -> list[TokenEvent]:
        self._open.close_first()
        return self._results.take_events()
