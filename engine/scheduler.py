"""Continuous batching: which tokens of which sequences the next step computes, and what its results mean.

Sequences that decode come first, then prompts, in order of arrival (`engine/prefill.py`); the youngest sequence is the
one to give way when memory runs out. No tensors, no processes.
"""

import math
import time
from collections.abc import Callable
from collections.abc import Sequence as Seq

from engine.blocks import BlockManager
from engine.cost import NO_COST, StepBudget, StepCost, prefill_share
from engine.fits_context import require_fits_context
from engine.grammars.matcher import Matcher
from engine.outputs import append_tokens, count_draft_work, end_event, token_event
from engine.plan import NOT_FINITE, Chunk, Plan, PlanStats, Sampled, require_results
from engine.prefill import PrefillPlanner
from engine.queues import Queues
from engine.sequence import Sequence
from engine.speculation import Speculator
from engine.types import Finish, Logprob, Request, TokenEvent
from model.errors import InvalidRequest

Scores = tuple[Logprob, ...] | None


class Scheduler:
    """Plans steps over at most `max_running` sequences and `max_step_tokens` tokens a step.

    With a `cost` and `step_seconds`, a step that decodes reads only so much of prompts that its estimated time stays
    within `step_seconds`, but `min_chunk` tokens at least, and a share of the step that grows with the age of the
    oldest that waits: a prompt is cut by its cost, so that one with many experts gets the shorter chunk. `cost` may be
    set between steps.

    With `chunked=False` (mixtures that mix tokens) a prompt is read whole and a preempted sequence is recomputed just
    as it was first computed: the prompt in one chunk, then token by token. Such a prompt may exceed `max_step_tokens`,
    as the only prompt of its step, and it is never cut by cost.

    A `speculator` guesses at what sequences that decode will say next. Its guesses take tokens of a step and blocks
    that are free, and nothing from anybody.
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
    ) -> None:
        if not 1 <= max_running <= max_step_tokens:
            raise ValueError(
                f"max_step_tokens ({max_step_tokens}) must be at least max_running ({max_running}), 1 or more"
            )
        if blocks.prefix_cache and not chunked:
            raise ValueError("a model that must read prompts whole cannot use a prefix cache")
        if speculator is not None and not chunked:
            raise ValueError("a model that mixes tokens cannot check guesses")
        if min_chunk < 1:
            raise ValueError(f"min_chunk must be at least 1, or prompts would never be read; got {min_chunk}")
        self.blocks = blocks
        self.max_running, self.max_step_tokens, self.max_model_len = max_running, max_step_tokens, max_model_len
        self.cost, self.speculator = cost, speculator
        self.plan_stats = PlanStats()  # of the last plan
        self._chunked, self._clock = chunked, clock
        self._step_seconds, self._min_chunk = step_seconds if step_seconds and chunked else math.inf, min_chunk
        self.queues = Queues()
        self._waiting, self._running = self.queues.waiting, self.queues.running
        self._prompts = PrefillPlanner(blocks, self.queues, max_running, chunked, clock)
        self._planned: set[str] = set()  # in the plan that is not committed yet
        self._doomed: set[str] = set()  # of these, aborted: they end with the commit
        self._events: list[TokenEvent] = []  # ends that no commit has reported yet

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
        """How long the sequence that has waited longest has waited for its next token, in the queue or partly read; in
        seconds, 0 where none waits."""
        since = self.queues.waiting_since
        return 0.0 if since is None else self._clock() - since

    @property
    def has_work(self) -> bool:
        """Whether a step would do or report anything."""
        return bool(self._running or self._waiting or self._events)

    def add(self, request: Request, matcher: Matcher | None = None) -> None:
        """Queue a request; `matcher` follows its grammar.

        Raises:
            InvalidRequest: it is empty, its id is taken, or it could never fit in the context or the cache.
        """
        if request.id in self._running or request.id in self._waiting:
            raise InvalidRequest(f"a request with id {request.id!r:.64} is already running", "id", "duplicate_id")
        require_fits_context(request, self.max_model_len, self.blocks.total * self.blocks.block_size)
        self.queues.add(Sequence(request, self._clock(), matcher))

    def abort(self, request_id: str) -> None:
        """End a request; its last event comes with the next commit. An unknown id is ignored: it may just have ended.

        Blocks are free on return, unless a step is running on them: then they are with its commit.
        """
        if request_id in self._planned:
            self._doomed.add(request_id)
        elif sequence := self._running.get(request_id) or self._waiting.get(request_id):
            self._finish(sequence, "abort")

    def schedule(self) -> Plan:
        """Choose the next step's chunks and hold blocks for them. Every plan must be committed or failed.

        Raises:
            RuntimeError: the last plan is still open.
        """
        if self._planned:
            raise RuntimeError("the last plan is neither committed nor failed")
        self.plan_stats = PlanStats()
        step_budget = StepBudget(self.cost or NO_COST, self.max_step_tokens, self._step_seconds, self._min_chunk)
        plan = self._decodes(step_budget)
        if self.queues.partial_prefill or (self._waiting and not self._prompts.full):
            if step_budget.time_bounded:
                step_budget.reserve_for_prompts(prefill_share(self.oldest_waiting_s))
            plan += self._prompts.plan(step_budget, self.plan_stats)
        self.plan_stats.estimated_s = step_budget.load.seconds if plan else 0.0
        self._planned = {chunk.sequence.id for chunk in plan}
        return tuple(plan)

    def _decodes(self, step_budget: StepBudget) -> list[Chunk]:
        """The next tokens of all sequences that decode, in order of arrival."""
        plan: list[Chunk] = []
        if (partly := self.queues.partial_prefill) is not None:
            self._make_room(partly)
        going = list(self._running.values())
        for place, sequence in enumerate(going, 1):
            decodes = sequence is not partly and sequence.id in self._running and sequence.ready
            if decodes and (chunk := self._decode(sequence, step_budget)):
                step_budget.load.other_seconds += sequence.matcher.row_seconds if sequence.matcher else 0.0
                plan.append(self._guess(chunk, step_budget, len(going) - place))
        return plan

    def commit(
        self, plan: Plan, sampled: Seq[Sampled], scores: Seq[Scores] = (), spoiled: Seq[Chunk] = ()
    ) -> list[TokenEvent]:
        """Take in a step's results, one `Sampled` per sampling chunk and `scores` of those that score, in plan order;
        returns all events since the last. Sequences of `spoiled` chunks are computed again from their first token on.

        Raises:
            ValueError: the number of results is wrong; nothing has changed.
        """
        require_results(plan, len(sampled), len(scores))
        results, scored = iter(sampled), iter(scores)
        for chunk in plan:
            found = next(scored) if chunk.scored_positions else ()
            self._advance(chunk, next(results) if chunk.samples else None, found)
        if self.speculator is not None:
            self.speculator.record_step(self.plan_stats.estimated_s, len(sampled) + self.plan_stats.accepted)
        if spoiled:
            self._set_back(spoiled)
        return self._close()

    def fail(self, plan: Plan, message: str) -> list[TokenEvent]:
        """End every sequence of an open plan with an error; whatever they computed is forgotten."""
        self.drop(plan, message)
        return self._close()

    def drop(self, chunks: Seq[Chunk], message: str) -> None:
        """End these sequences of an open plan with an error; the rest of it is to be committed."""
        for chunk in chunks:
            doomed = chunk.sequence.id in self._doomed
            self._finish(chunk.sequence, "abort" if doomed else "error", error=None if doomed else message)

    def reset(self, message: str) -> list[TokenEvent]:
        """End everything with an error and start afresh: the way out of a fault in the scheduler itself."""
        self.blocks.clear()
        for sequence in [*self._running.values(), *self._waiting.values()]:
            self._finish(sequence, "error", error=message)
        return self._close()

    def check(self) -> None:
        """Verify the block manager's invariants and our own, between steps.

        Raises:
            RuntimeError: one does not hold.
        """
        self.blocks.check()
        self.queues.check(self.blocks.holders, self._chunked)

    def _decode(self, sequence: Sequence, step_budget: StepBudget) -> Chunk | None:
        """The next token of a running sequence, which takes its block from the youngest sequence if need be."""
        while not self.blocks.reserve(sequence, sequence.computed + 1):
            self._preempt(youngest := self.queues.youngest)
            if youngest is sequence:
                return None
        chunk = Chunk(sequence, sequence.computed, 1)
        step_budget.spend_runs(chunk.count_runs, prompt=False)
        return chunk

    def _make_room(self, partly: Sequence) -> None:
        """Hold a block for a prompt partly read, for which what overtook it gives way; it waits for older sequences."""
        while (last := self.queues.youngest) is not partly and not self.blocks.reserve(partly, partly.computed + 1):
            self._preempt(last)

    def _guess(self, chunk: Chunk, step_budget: StepBudget, others: int) -> Chunk:
        """The chunk of a sequence that decodes, with guesses: as many as leave the `others` of the step their token and
        a block each."""
        sequence = chunk.sequence
        if self.speculator is None or not chunk.samples:
            return chunk
        room = self.blocks.token_capacity(sequence) - 1 - others * self.blocks.block_size
        guessed = self.speculator.add_drafts(chunk, min(step_budget.tokens - others, room), step_budget)
        if count := len(guessed.drafts) + guessed.model_drafts:
            self.blocks.reserve(sequence, sequence.computed + 1 + count)
            after = chunk.start + chunk.length
            step_budget.spend_runs(sequence.count_runs(after, after + count), prompt=False)
        return guessed

    def _preempt(self, sequence: Sequence) -> None:
        self.blocks.release(sequence)
        sequence.preemptions += 1
        self.plan_stats.preemptions += 1
        self.queues.requeue(sequence, self._clock())

    def _set_back(self, chunks: Seq[Chunk]) -> None:
        """Preempt these, to be computed apart from others."""
        for chunk in chunks:
            sequence = chunk.sequence
            sequence.isolated_until = max(sequence.isolated_until, chunk.start + chunk.length)
            if sequence.id in self._doomed:
                self._finish(sequence, "abort")
            elif sequence.id in self._running:
                self._preempt(sequence)

    def _advance(self, chunk: Chunk, result: Sampled | None, scores: Scores) -> None:
        """Take in one chunk's results. Nothing computed by a sequence that failed is offered to others."""
        sequence, ends = chunk.sequence, chunk.reaches_end
        sequence.computed = chunk.start + chunk.length
        sequence.record_work(chunk.start, sequence.computed)
        if chunk.drafts or chunk.model_drafts:
            count_draft_work(chunk, self.speculator.experts if self.speculator else 0)
        if self._chunked and (self.queues.partial_prefill is sequence or not ends):
            self.queues.record_prefill(sequence)
        if sequence.id in self._doomed:
            self._finish(sequence, "abort")
        elif scores is None:
            self._finish(sequence, "error", error=NOT_FINITE)
        elif result is not None and result.error is not None:
            self._finish(sequence, "error", error=result.error, code=result.code)
        else:
            sequence.prompt_logprobs += scores
            if result is not None:
                self._append(chunk, (result, *result.after_drafts))
            else:
                self.blocks.publish(sequence)
                if ends:
                    self._finish(sequence, "length")  # only the prompt was to be scored

    def _append(self, chunk: Chunk, results: tuple[Sampled, ...]) -> None:
        """Add what was sampled: the next token, and those after it that guesses were right about."""
        sequence = chunk.sequence
        kept, finish = append_tokens(sequence, results, self.max_model_len)
        sequence.computed += len(kept) - 1
        self._learn(chunk, len(kept) - 1)
        self.blocks.publish(sequence)
        last = None if finish is None else kept.pop()
        for result in kept:
            self._events.append(token_event(sequence, result, self._clock))
        if last is not None and finish is not None:
            self._finish(sequence, finish, last, last.error, last.code)

    def _learn(self, chunk: Chunk, accepted: int) -> None:
        if self.speculator is not None and (drafted := len(chunk.drafts) + chunk.model_drafts):
            self.plan_stats.drafted += drafted
            self.plan_stats.accepted += accepted
            self.speculator.record_acceptance(chunk.sequence, drafted, accepted)

    def _finish(
        self, sequence: Sequence, finish: Finish, last: Sampled | None = None, error: str | None = None, code: str = ""
    ) -> None:
        self.blocks.release(sequence, forget=finish == "error")
        self.queues.remove(sequence)
        self._events.append(end_event(sequence, finish, last, error, code, self._clock))

    def _close(self) -> list[TokenEvent]:
        self._planned.clear()
        self._doomed.clear()
        events, self._events = self._events, []
        return events
