"""Continuous batching: which tokens of which sequences the next step computes, and what its results mean.

First come, first served. Running sequences are kept in order of arrival, so decodes come before the one prompt that may
be partly read, and the youngest is the one to give way when memory runs out. No tensors, no processes.
"""

import math
import time
from collections import OrderedDict
from collections.abc import Callable
from collections.abc import Sequence as Seq

from engine.blocks import BlockManager
from engine.cost import FREE, Allowance, StepCost
from engine.fits import refuse_misfit
from engine.grammar import Matcher
from engine.growth import extend, told
from engine.plan import NOT_FINITE, Chunk, Counts, Plan, Sampled, sample_count
from engine.sequence import Sequence
from engine.speculation import Speculator
from engine.types import Finish, Logprob, Request, TokenEvent
from model.errors import InvalidRequest

Scores = tuple[Logprob, ...] | None


class Scheduler:
    """Plans steps over at most `max_running` sequences and `max_step_tokens` tokens a step.

    With a `cost` and `step_seconds`, a step that decodes somebody reads only so much of prompts that its estimated time
    stays within `step_seconds`, but `min_chunk` tokens at least: a prompt is cut by its cost, so that one with many
    experts gets the shorter chunk. `cost` may be set between steps.

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
        self.counts = Counts()  # of the last plan
        self._chunked, self._clock = chunked, clock
        self._step_seconds, self._min_chunk = step_seconds if step_seconds and chunked else math.inf, min_chunk
        self._waiting: OrderedDict[str, Sequence] = OrderedDict()
        self._running: OrderedDict[str, Sequence] = OrderedDict()
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
        refuse_misfit(request, self.max_model_len, self.blocks.total * self.blocks.block_size)
        self._waiting[request.id] = Sequence(request, self._clock(), matcher)

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
        self.counts = Counts()
        plan: list[Chunk] = []
        allowance = Allowance(self.cost or FREE, self.max_step_tokens, self._step_seconds, self._min_chunk)
        for place, sequence in enumerate(going := list(self._running.values()), 1):
            if sequence.id in self._running and (chunk := self._continue(sequence, allowance)):
                plan.append(self._guess(chunk, allowance, len(going) - place))
        self._admit(plan, allowance)
        self.counts.estimated_s = allowance.load.seconds if plan else 0.0
        self._planned = {chunk.sequence.id for chunk in plan}
        return tuple(plan)

    def commit(
        self, plan: Plan, sampled: Seq[Sampled], scores: Seq[Scores] = (), spoiled: Seq[Chunk] = ()
    ) -> list[TokenEvent]:
        """Take in a step's results, one `Sampled` per sampling chunk and `scores` of those that score, in plan order;
        returns all events since the last. Sequences of `spoiled` chunks are computed again from their first token on.

        Raises:
            ValueError: the number of results is wrong; nothing has changed.
        """
        if len(sampled) != sample_count(plan):
            raise ValueError(f"the plan samples {sample_count(plan)} tokens, got {len(sampled)}")
        if len(scores) != (scoring := sum(bool(chunk.scored) for chunk in plan)):
            raise ValueError(f"the plan scores {scoring} chunks, got {len(scores)}")
        results, scored = iter(sampled), iter(scores)
        for chunk in plan:
            found = next(scored) if chunk.scored else ()
            self._advance(chunk, next(results) if chunk.samples else None, found)
        if self.speculator is not None:
            self.speculator.took(self.counts.estimated_s, len(sampled) + self.counts.accepted)
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
        if not self.blocks.holders <= self._running.keys():
            raise RuntimeError("scheduler: blocks are held by a sequence that does not run")
        arrivals = [sequence.arrived_at for sequence in [*self._running.values(), *self._waiting.values()]]
        if arrivals != sorted(arrivals):
            raise RuntimeError("scheduler: the order of arrival is broken")
        if any(sequence.pending > 1 for sequence in list(self._running.values())[:-1]) and self._chunked:
            raise RuntimeError("scheduler: a prompt partly read is not the youngest")

    def _continue(self, sequence: Sequence, allowance: Allowance) -> Chunk | None:
        """The next chunk of a running sequence; a decode takes its block from the youngest sequence if need be."""
        counts = sequence.request.budget.per_layer
        wanted = self._next_length(sequence)
        length = min(wanted, allowance.tokens)
        if wanted > 1:
            # A prompt partly read is the youngest of all. It takes what is free, and waits rather than lose its work.
            length = min(length, allowance.room(counts), self.blocks.room(sequence))
        if length < 1:
            return None
        while not self.blocks.reserve(sequence, sequence.computed + length):
            youngest = next(reversed(self._running.values()))
            self._preempt(youngest)
            if youngest is sequence:
                return None
        allowance.take(counts, length, prompt=wanted > 1)
        return Chunk(sequence, sequence.computed, length)

    def _guess(self, chunk: Chunk, allowance: Allowance, others: int) -> Chunk:
        """The chunk of a sequence that decodes, with guesses: as many as leave the `others` of the step their token and
        a block each."""
        sequence = chunk.sequence
        if self.speculator is None or not chunk.samples or sequence.pending > 1:
            return chunk
        room = self.blocks.room(sequence) - 1 - others * self.blocks.block_size
        guessed = self.speculator.guess(chunk, min(allowance.tokens - others, room), allowance)
        if count := len(guessed.drafts) + guessed.ahead:
            self.blocks.reserve(sequence, sequence.computed + 1 + count)
            allowance.take(sequence.request.budget.per_layer, count, prompt=False)
        return guessed

    def _admit(self, plan: list[Chunk], allowance: Allowance) -> None:
        """Start waiting sequences while the step and the cache have room."""
        while self._waiting and len(self._running) < self.max_running and not self._cut(plan):
            sequence = next(iter(self._waiting.values()))
            counts = sequence.request.budget.per_layer
            room = allowance.room(counts)
            if room < 1 or (not self._chunked and sequence.prompt_length > room and allowance.reads):
                break
            if self.blocks.soon(sequence, self._running.values()):
                break  # somebody is reading the same prompt: a step or two later it need not be read again
            # One spare block per running sequence, so that the next decodes do not evict the newcomer at once.
            if not self.blocks.admit(sequence, spare=len(self._running)):
                break
            plan.append(self._start(sequence, room))
            allowance.take(counts, plan[-1].length, prompt=True)

    def _cut(self, plan: list[Chunk]) -> bool:
        """Whether the plan ends with a prompt partly read: nobody may come after it."""
        return self._chunked and bool(plan) and not plan[-1].ends

    def _start(self, sequence: Sequence, room: int) -> Chunk:
        """Move an admitted sequence from the queue to the running ones and plan its first chunk."""
        del self._waiting[sequence.id]
        self._running[sequence.id] = sequence
        if sequence.admitted_at is None:
            sequence.admitted_at = self._clock()
            sequence.cached_tokens = sequence.computed
        if self.blocks.prefix_cache:
            self.counts.prefix_queries += len(sequence.tokens)
            self.counts.prefix_hits += sequence.computed
        length = self._next_length(sequence)
        if self._chunked:
            length = min(length, room)
        if not self.blocks.reserve(sequence, sequence.computed + length):
            raise RuntimeError("an admitted sequence does not fit")
        return Chunk(sequence, sequence.computed, length)

    def _next_length(self, sequence: Sequence) -> int:
        if self._chunked:
            return sequence.pending
        return sequence.prompt_length if sequence.computed == 0 else 1

    def _preempt(self, sequence: Sequence) -> None:
        self.blocks.release(sequence)
        sequence.preemptions += 1
        self.counts.preemptions += 1
        del self._running[sequence.id]
        self._waiting[sequence.id] = sequence
        self._waiting.move_to_end(sequence.id, last=False)

    def _set_back(self, chunks: Seq[Chunk]) -> None:
        """Preempt these and all that came after the first of them, so that the order stays."""
        for chunk in chunks:
            chunk.sequence.apart_until = max(chunk.sequence.apart_until, chunk.start + chunk.length)
            if chunk.sequence.id in self._doomed:
                self._finish(chunk.sequence, "abort")
        names = {chunk.sequence.id for chunk in chunks}
        first = next((place for place, name in enumerate(self._running) if name in names), len(self._running))
        for sequence in reversed(list(self._running.values())[first:]):
            self._preempt(sequence)

    def _advance(self, chunk: Chunk, result: Sampled | None, scores: Scores) -> None:
        """Take in one chunk's results. Nothing computed by a sequence that failed is offered to others."""
        sequence, ends = chunk.sequence, chunk.ends
        sequence.computed = chunk.start + chunk.length
        if sequence.id in self._doomed:
            self._finish(sequence, "abort")
        elif scores is None:
            self._finish(sequence, "error", error=NOT_FINITE)
        elif result is not None and result.error is not None:
            self._finish(sequence, "error", error=result.error)
        else:
            sequence.scores += scores
            if result is not None:
                self._append(chunk, (result, *result.more))
            else:
                self.blocks.commit(sequence)
                if ends:
                    self._finish(sequence, "length")  # only the prompt was to be scored

    def _append(self, chunk: Chunk, results: tuple[Sampled, ...]) -> None:
        """Add what was sampled: the next token, and those after it that guesses were right about."""
        sequence = chunk.sequence
        kept, finish = extend(sequence, results, self.max_model_len)
        sequence.computed += len(kept) - 1
        self._learn(chunk, len(kept) - 1)
        self.blocks.commit(sequence)
        if finish is not None:
            last = kept.pop()
        for result in kept:
            stats = None
            if sequence.first_token_at is None:
                sequence.first_token_at = self._clock()
                stats = sequence.stats(sequence.first_token_at)
            prompt = told(sequence)
            self._events.append(
                TokenEvent(sequence.id, result.token, result.logprob, stats=stats, prompt_logprobs=prompt)
            )
        if finish is not None:
            self._finish(sequence, finish, token=last.token, logprob=last.logprob, error=last.error)

    def _learn(self, chunk: Chunk, accepted: int) -> None:
        drafted = len(chunk.drafts) + chunk.ahead
        if self.speculator is not None and drafted:
            self.counts.drafted, self.counts.accepted = self.counts.drafted + drafted, self.counts.accepted + accepted
            self.speculator.learn(chunk.sequence, drafted, accepted)

    def _finish(
        self,
        sequence: Sequence,
        finish: Finish,
        *,
        token: int | None = None,
        logprob: Logprob | None = None,
        error: str | None = None,
    ) -> None:
        self.blocks.release(sequence, forget=finish == "error")
        self._running.pop(sequence.id, None)
        self._waiting.pop(sequence.id, None)
        if token is not None and error is None:
            sequence.first_token_at = sequence.first_token_at or self._clock()
        stats = sequence.stats(self._clock())
        self._events.append(TokenEvent(sequence.id, token, logprob, finish, error, stats, told(sequence)))

    def _close(self) -> list[TokenEvent]:
        self._planned.clear()
        self._doomed.clear()
        events, self._events = self._events, []
        return events
