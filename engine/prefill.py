"""Which prompts a step reads, and how much of each: in order of arrival, and short ones beside one that is long.

Decodes are planned before it, by `engine/scheduler.py`. It sees costs as a step budget, no seconds and no clock but to
stamp what is admitted.
"""

from collections.abc import Callable

from engine.blocks import BlockManager
from engine.cost import StepBudget
from engine.plan import Chunk, PlanStats
from engine.queues import Queues
from engine.sequence import Sequence


class PrefillPlanner:
    """Starts waiting sequences while the step, the batch and the cache have room.

    Prompts are read whole, in order, as long as they fit. The first that does not is cut, and is the one partly read
    until it has been read to its end. It gets the least chunk at once and half of what is left at least; the other half
    is for prompts that fit into it whole, so that a short one need not wait for a long one. They leave the blocks that
    the long one still needs.

    With `chunked=False` prompts are read whole, and one that is larger than the step is its only one.
    """

    def __init__(
        self, blocks: BlockManager, queues: Queues, max_running: int, chunked: bool, clock: Callable[[], float]
    ) -> None:
        self._blocks, self._queues = blocks, queues
        self._max_running, self._chunked, self._clock = max_running, chunked, clock

    def plan(self, step_budget: StepBudget, counts: PlanStats) -> list[Chunk]:
        """The step's chunks of prompts, with blocks held for them; `counts` takes in what was looked up."""
        chunks: list[Chunk] = []
        first = self._queues.partial_prefill or self._admit(chunks, step_budget, counts)
        if first is None:
            return chunks
        wanted, start = min(first.pending, self._blocks.token_capacity(first)), first.computed
        if least := min(wanted, step_budget.min_chunk):
            step_budget.spend_runs(first.count_runs(start, start + least), prompt=True)
            self._overtake(chunks, step_budget, counts, first)
            more = min(wanted - least, step_budget.max_prompt_tokens(first.largest_counts))
            step_budget.spend_runs(first.count_runs(start + least, start + least + more), prompt=True)
            chunks.append(self._chunk(first, least + more))
        return chunks

    def _admit(self, chunks: list[Chunk], step_budget: StepBudget, counts: PlanStats) -> Sequence | None:
        """Start sequences that can be read whole, and the first that must be cut, which is returned without a chunk."""
        for sequence in self._queues.next_ready(self._max_running):
            if step_budget.tokens < 1 or self.full:
                return None
            largest = sequence.largest_counts
            whole = self._length(sequence) <= step_budget.max_prompt_tokens(largest) or not (
                self._chunked or step_budget.has_prompts
            )
            if not whole and not (self._chunked and step_budget.max_chunk(largest)):
                return None
            if self._blocks.prefix_in_flight(sequence, self._queues.running.values()):
                continue  # its prompt is being read for another: a step or two later it need not be read again
            # One spare block per running sequence, so that the next decodes do not evict the newcomer at once.
            if not self._blocks.admit(sequence, spare=len(self._queues.running)):
                return None
            self._start(sequence, counts)
            if not whole:
                return sequence
            self._read(sequence, chunks, step_budget)
        return None

    def _overtake(self, chunks: list[Chunk], step_budget: StepBudget, counts: PlanStats, first: Sequence) -> None:
        """Start sequences that fit whole into half of what the step has left."""
        half = step_budget.half()
        needed = self._blocks.blocks_for(len(first.tokens)) - len(first.blocks)
        for sequence in self._queues.next_ready(self._max_running):
            if self.full or half.tokens < 1:
                return
            if self._length(sequence) > half.max_prompt_tokens(sequence.largest_counts):
                continue
            if self._blocks.prefix_in_flight(sequence, self._queues.running.values()):
                continue
            if not self._blocks.admit(sequence, spare=len(self._queues.running) + needed):
                return
            self._start(sequence, counts)
            half.tokens -= self._read(sequence, chunks, step_budget)

    @property
    def full(self) -> bool:
        """Whether no more sequences may run."""
        return len(self._queues.running) >= self._max_running

    def _length(self, sequence: Sequence) -> int:
        """The tokens of its first chunk, if a waiting sequence starts now and is not cut."""
        return self._blocks.uncached_tokens(sequence) if self._chunked else sequence.prompt_length

    def _start(self, sequence: Sequence, counts: PlanStats) -> None:
        """Move an admitted sequence from the queue to the running ones."""
        self._queues.start(sequence)
        if sequence.admitted_at is not None:
            return  # set back before: what it finds now are its own blocks
        sequence.admitted_at = self._clock()
        sequence.cached_tokens = sequence.computed
        if self._blocks.uses_prefix_cache(sequence):
            counts.prefix_queries += sequence.prompt_length
            counts.prefix_hits += sequence.computed

    def _read(self, sequence: Sequence, chunks: list[Chunk], step_budget: StepBudget) -> int:
        """Plan to read a sequence that has just started whole; the length of its chunk."""
        length = sequence.pending if self._chunked else sequence.prompt_length
        chunk = self._chunk(sequence, length)
        step_budget.spend_runs(chunk.count_runs, prompt=True)
        chunks.append(chunk)
        return length

    def _chunk(self, sequence: Sequence, length: int) -> Chunk:
        if not self._blocks.reserve(sequence, sequence.computed + length):
            raise RuntimeError("an admitted sequence does not fit")
        return Chunk(sequence, sequence.computed, length)
