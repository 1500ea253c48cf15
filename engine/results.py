"""Applies what a step has computed to its sequences: positions, tokens, work, blocks of the prefix cache, and events.

`engine/scheduler.py` decides which chunks are applied, and in which order. No planning here.
"""

from collections.abc import Callable

from engine.blocks import BlockManager
from engine.outputs import append_tokens, count_work, end_event, token_event
from engine.plan import NOT_FINITE, Chunk, Observed, PlanStats, PromptLogprobs, Sampled
from engine.queues import Queues
from engine.sequence import Sequence
from engine.speculation import Speculator
from engine.types import Finish, TokenEvent


class Results:
    """Writes results to sequences, and keeps the events that report them until they are taken.

    `longest`: tokens of the longest sequence. `chunked`: a prompt may be computed in parts.
    """

    def __init__(
        self,
        blocks: BlockManager,
        queues: Queues,
        longest: int,
        chunked: bool,
        clock: Callable[[], float],
        speculator: Speculator | None,
    ) -> None:
        self._blocks, self._queues, self._speculator = blocks, queues, speculator
        self._longest, self._chunked, self._clock = longest, chunked, clock
        self.events: list[TokenEvent] = []  # not taken yet

    def take_events(self) -> list[TokenEvent]:
        """All events since the last call."""
        events, self.events = self.events, []
        return events

    def apply(
        self,
        chunk: Chunk,
        result: Sampled | None,
        prompt_logprobs: PromptLogprobs,
        *,
        seen: Observed,
        aborted: bool,
        plan_stats: PlanStats,
    ) -> None:
        """Apply one chunk's results. Blocks of a sequence that failed are not published to the prefix cache."""
        sequence, reaches_end = chunk.sequence, chunk.reaches_end
        count_work(chunk, self._speculator.experts if self._speculator else 0, seen)
        if sequence.routes is not None and seen.routes is not None:
            sequence.routes.put(chunk.start, seen.routes)
        sequence.computed = chunk.start + chunk.length
        if self._chunked and (self._queues.partial_prefill is sequence or not reaches_end):
            self._queues.record_prefill(sequence)
        if aborted:
            self.finish(sequence, "abort")
        elif prompt_logprobs is None:
            self.finish(sequence, "error", error=NOT_FINITE)
        elif result is not None and result.error is not None:
            self.finish(sequence, "error", error=result.error, code=result.code)
        else:
            sequence.prompt_logprobs += prompt_logprobs
            if result is not None:
                self._append_tokens(chunk, (result, *result.after_drafts), plan_stats)
            else:
                self._blocks.publish(sequence)
                if reaches_end:
                    self.finish(sequence, "length")  # only log-probabilities of the prompt were wanted

    def finish(
        self, sequence: Sequence, finish: Finish, last: Sampled | None = None, error: str | None = None, code: str = ""
    ) -> None:
        """End a sequence, with its last token if there is one. What failed leaves the prefix cache."""
        self._blocks.release(sequence, forget=finish == "error")
        self._queues.remove(sequence)
        self.events.append(end_event(sequence, finish, last, error, code, self._clock))

    def _append_tokens(self, chunk: Chunk, results: tuple[Sampled, ...], plan_stats: PlanStats) -> None:
        """Append the sampled tokens: the next one, and one after each accepted draft."""
        sequence = chunk.sequence
        kept, finish = append_tokens(sequence, results, self._longest)
        sequence.computed += len(kept) - 1
        if self._speculator is not None:
            _record_drafts(self._speculator, chunk, len(kept) - 1, plan_stats)
        self._blocks.publish(sequence)
        last = None if finish is None else kept.pop()
        for result in kept:
            self.events.append(token_event(sequence, result, self._clock))
        if last is not None and finish is not None:
            self.finish(sequence, finish, last, last.error, last.code)


def _record_drafts(speculator: Speculator, chunk: Chunk, accepted: int, plan_stats: PlanStats) -> None:
    if drafted := len(chunk.drafts) + chunk.model_drafts:
        plan_stats.drafted += drafted
        plan_stats.accepted += accepted
        speculator.record_acceptance(chunk.sequence, drafted, accepted)
