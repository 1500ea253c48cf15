"""The prefill planner: which prompts a step computes, and how much of each.

`engine/scheduler.py` plans decodes first. Prompts come in order of arrival; short ones may overtake a long one. Costs
are known here only as a step budget, and the clock only stamps admitted sequences.
"""

from collections.abc import Callable

from engine.blocks import BlockManager
from engine.cost import StepBudget
from engine.plan import Chunk, PlanStats
from engine.queues import Queues
from engine.sequence import Sequence


class PrefillPlanner:
    """Starts waiting sequences while the step, the batch and the cache have room.

    Prompts are prefilled whole, in order, as long as they fit. The first that does not fit is cut, and is the one
    partly prefilled prompt until its end is reached. It gets a shortest chunk first, and at least half of what is left
    of the step; the other half is for prompts that fit into it whole, so that short ones do not wait for a long one.
    These leave free the blocks that the long one still needs.

    With `chunked=False` prompts are prefilled whole, and one that is larger than the step is the only one in it.
    """

    def __init__(
        self, blocks: BlockManager, queues: Queues, max_running: int, chunked: bool, clock: Callable[[], float]
    ) -> None:
        self._blocks, self._queues = blocks, queues
        self._max_running, self._chunked, self._clock = max_running, chunked, clock

    def plan(self, step_budget: StepBudget, plan_stats: PlanStats) -> list[Chunk]:
        """The step's prompt chunks, with blocks allocated; prefix-cache look-ups are added to `plan_stats`."""
        chunks: list[Chunk] = []
        first = self._queues.partial_prefill or self._admit(chunks, step_budget, plan_stats)
        if first is None:
            return chunks
        wanted, start = min(first.pending, self._blocks.token_capacity(first)), first.computed
        if least := min(wanted, step_budget.min_chunk(first.row_count)):
            step_budget.spend_runs(first.runs_of_rows(start, start + least), prompt=True)
            self._overtake(chunks, step_budget, plan_stats, first)
            more = min(wanted - least, step_budget.max_prompt_tokens(first.largest_counts, first.row_count))
            step_budget.spend_runs(first.runs_of_rows(start + least, start + least + more), prompt=True)
            chunks.append(self._chunk(first, least + more))
        return chunks

    def _admit(self, chunks: list[Chunk], step_budget: StepBudget, plan_stats: PlanStats) -> Sequence | None:
        """Start sequences that fit whole, and the first that must be cut, which is returned without a chunk."""
        for sequence in self._queues.next_ready(self._max_running):
            if step_budget.tokens < 1 or not self._has_rows(sequence):
                return None
            largest, rows = sequence.largest_counts, sequence.row_count
            fits = self._first_length(sequence) <= step_budget.max_prompt_tokens(largest, rows)
            whole = fits or not (self._chunked or step_budget.has_prompts)
            if not whole and not (self._chunked and step_budget.max_chunk(largest, rows)):
                return None
            if self._blocks.prefix_in_flight(sequence, self._queues.running.values()):
                continue  # another sequence computes the same prefix: a step or two later it will be in the cache
            # One spare block per running row, so that the next decodes do not preempt the new one at once.
            if not self._blocks.admit(sequence, spare=self._queues.running_rows):
                return None
            self._start(sequence, plan_stats)
            if not whole:
                return sequence
            self._prefill_whole(sequence, chunks, step_budget)
        return None

    def _overtake(self, chunks: list[Chunk], step_budget: StepBudget, plan_stats: PlanStats, first: Sequence) -> None:
        """Start sequences that fit whole into half of what is left of the step, although `first` is older."""
        half = step_budget.half()
        needed = first.row_count * (self._blocks.blocks_for(len(first.tokens)) - len(first.blocks))
        for sequence in self._queues.next_ready(self._max_running):
            if not self._has_rows(sequence) or half.tokens < 1:
                return
            if self._first_length(sequence) > half.max_prompt_tokens(sequence.largest_counts, sequence.row_count):
                continue
            if self._blocks.prefix_in_flight(sequence, self._queues.running.values()):
                continue
            if not self._blocks.admit(sequence, spare=self._queues.running_rows + needed):
                return
            self._start(sequence, plan_stats)
            half.tokens -= sequence.row_count * self._prefill_whole(sequence, chunks, step_budget)

    @property
    def full(self) -> bool:
        """Whether no more sequences may run."""
        return self._queues.running_rows >= self._max_running

    def _has_rows(self, sequence: Sequence) -> bool:
        """Whether the batch has room for all rows of a sequence."""
        return self._queues.running_rows + sequence.row_count <= self._max_running

    def _first_length(self, sequence: Sequence) -> int:
        """The length of a waiting sequence's first chunk, if it starts now and is not cut."""
        return self._blocks.uncached_tokens(sequence) if self._chunked else sequence.prompt_length

    def _start(self, sequence: Sequence, plan_stats: PlanStats) -> None:
        """Move an admitted sequence from the queue to the running ones."""
        self._queues.start(sequence)
        if sequence.admitted_at is not None:
            return  # it was preempted before: the blocks that it finds now are its own
        sequence.admitted_at = self._clock()
        sequence.cached_tokens = sequence.computed
        if self._blocks.uses_prefix_cache(sequence):
            plan_stats.prefix_queries += sequence.prompt_length
            plan_stats.prefix_hits += sequence.computed

    def _prefill_whole(self, sequence: Sequence, chunks: list[Chunk], step_budget: StepBudget) -> int:
        """Plan a newly started sequence in one chunk; returns the chunk's length."""
        length = sequence.pending if self._chunked else sequence.prompt_length
        chunk = self._chunk(sequence, length)
        step_budget.spend_runs(sequence.runs_of_rows(chunk.start, chunk.start + length), prompt=True)
        chunks.append(chunk)
        return length

    def _chunk(self, sequence: Sequence, length: int) -> Chunk:
        if not self._blocks.reserve(sequence, sequence.computed + length):
            raise RuntimeError("an admitted sequence does not fit")
        return Chunk(sequence, sequence.computed, length)
