"""Lets the scheduler plan step n+1 while step n still runs: gives sequences the state that they will have when step n
is committed.

The token that the device is still sampling is `LATE`. Not here: the planning itself (`engine/scheduler.py`).
"""

from collections.abc import Iterator, Set
from contextlib import contextmanager

from engine.plan import Chunk, Plan
from engine.queues import Queues
from engine.sequence import LATE


@contextmanager
def computed(plan: Plan, held: Set[str], queues: Queues, chunked: bool) -> Iterator[None]:
    """Inside the context the chunks of an open plan count as computed, and each sequence that the plan samples for has
    the token `LATE`. The sequences `held` are not planned. On exit everything is restored."""
    partial = queues.partial_prefill
    before = [(chunk.sequence, chunk.sequence.computed, len(chunk.sequence.tokens)) for chunk in plan]
    queues.held |= held
    try:
        for chunk in plan:
            _advance(chunk, queues, chunked)
        yield
    finally:
        queues.held.clear()
        queues.partial_prefill = partial
        for sequence, position, length in before:
            sequence.computed = position
            del sequence.tokens[length:]


def holds(chunk: Chunk, repeatable: bool, longest: int) -> bool:
    """Whether nothing of a chunk's sequence can be planned before the chunk is committed: it ends, or its mask is late.
    `longest`: tokens of the longest sequence."""
    sequence = chunk.sequence
    ends = sequence.output_count + 1 >= sequence.request.sampling.max_tokens
    ends = ends or len(sequence.tokens) + 1 >= longest
    return chunk.reaches_end and (ends or (sequence.matcher is not None and not repeatable))


def _advance(chunk: Chunk, queues: Queues, chunked: bool) -> None:
    sequence, reaches_end, is_held = chunk.sequence, chunk.reaches_end, chunk.sequence.id in queues.held
    sequence.computed = chunk.start + chunk.length
    if reaches_end and not is_held:
        sequence.tokens.append(LATE)
    if chunked and (queues.partial_prefill is sequence or not reaches_end):
        queues.record_prefill(sequence)
    if is_held and queues.partial_prefill is sequence:
        queues.partial_prefill = None
