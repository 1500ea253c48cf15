"""The decode planner: the next token of every sequence that decodes, with drafts where they pay.

Out of blocks, it preempts the youngest sequences, by a function that it is given. Prompts are planned after it
(`engine/prefill.py`).
"""

from collections.abc import Callable

from engine.blocks import BlockManager
from engine.cost import StepBudget
from engine.plan import Chunk
from engine.queues import Queues
from engine.sequence import Sequence
from engine.speculation import Speculator


class DecodePlanner:
    """Plans the decodes of a step. `preempt` takes a running sequence's blocks and queues it again."""

    def __init__(self, blocks: BlockManager, queues: Queues, preempt: Callable[[Sequence], None]) -> None:
        self._blocks, self._queues, self._preempt = blocks, queues, preempt

    def plan(self, step_budget: StepBudget, speculator: Speculator | None) -> list[Chunk]:
        """One chunk, with drafts if any, for every sequence that decodes, in order of arrival."""
        plan: list[Chunk] = []
        running = self._queues.running
        if (partial := self._queues.partial_prefill) is not None:
            self._reserve_for_partial_prefill(partial)
        decoding = [sequence for sequence in running.values() if sequence is not partial]
        others = self._queues.running_rows  # that still need a token of this step
        for sequence in decoding:
            others -= sequence.row_count
            still_running = sequence.id in running  # unless it was just preempted
            goes_on = still_running and sequence.ready and sequence.id not in self._queues.held
            if goes_on and (chunk := self._chunk(sequence, step_budget)):
                if sequence.matcher is not None:
                    step_budget.load.other_seconds += sequence.matcher.row_seconds
                if speculator is not None:
                    chunk = self._add_drafts(chunk, step_budget, speculator, others)
                plan.append(chunk)
        return plan

    def _chunk(self, sequence: Sequence, step_budget: StepBudget) -> Chunk | None:
        """The next token of a running sequence; preempts the youngest sequences until there is a block for it."""
        while not self._blocks.reserve(sequence, sequence.computed + 1):
            self._preempt(youngest := self._queues.youngest)
            if youngest is sequence:
                return None
        for row in sequence.rows:
            step_budget.spend(row.counts_at(sequence.computed), 1, prompt=False)
        return Chunk(sequence, sequence.computed, 1)

    def _reserve_for_partial_prefill(self, partial: Sequence) -> None:
        """Allocate the next block of a partly prefilled prompt, preempting younger sequences for it but not older."""
        while (last := self._queues.youngest) is not partial and not self._blocks.reserve(
            partial, partial.computed + 1
        ):
            self._preempt(last)

    def _add_drafts(self, chunk: Chunk, step_budget: StepBudget, speculator: Speculator, others: int) -> Chunk:
        """The chunk with drafts: as many as leave each of the `others`, rows of the step, one token and one block. None
        where each would be computed in two rows."""
        sequence = chunk.sequence
        if sequence.weak is not None or not chunk.samples:
            return chunk
        room = self._blocks.token_capacity(sequence) - 1 - others * self._blocks.block_size
        drafted = speculator.add_drafts(chunk, min(step_budget.tokens - others, room), step_budget)
        if count := len(drafted.drafts) + drafted.model_drafts:
            self._blocks.reserve(sequence, sequence.computed + 1 + count)
            after = chunk.start + chunk.length
            step_budget.spend_runs(sequence.count_runs(after, after + count), prompt=False)
        return drafted
