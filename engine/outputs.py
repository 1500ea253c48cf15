"""What a step's results add to one sequence: its new tokens, its finish reason, and the events that report them.

It handles one sequence at a time. Not here: blocks.
"""

from collections.abc import Callable
from collections.abc import Sequence as Seq

from engine.plan import Chunk, Observed, Sampled
from engine.sequence import Sequence
from engine.types import Finish, Logprob, TokenEvent


def append_tokens(sequence: Sequence, results: Seq[Sampled], longest: int) -> tuple[list[Sampled], Finish | None]:
    """Append sampled tokens, up to the one that ends the sequence (a stop token, or `longest` tokens in total).

    Returns the results whose tokens were kept, and the finish reason if the sequence ends.
    """
    for count, result in enumerate(results, 1):
        if result.error is not None:
            return list(results[:count]), "error"
        sequence.tokens.append(result.token)
        if finish := _finish(sequence, result.token, longest):
            return list(results[:count]), finish
    if sequence.matcher is not None:
        sequence.matcher.advance([result.token for result in results])
    return list(results), None


def _finish(sequence: Sequence, token: int, longest: int) -> Finish | None:
    sampling = sequence.request.sampling
    if token in sampling.stop_token_ids:
        return "stop"
    length = len(sequence.tokens)
    if length - sequence.prompt_length >= sampling.max_tokens or length >= longest:
        return "length"
    return None


def count_work(chunk: Chunk, draft_experts: int, seen: Observed) -> None:
    """Add a chunk and its drafts to its sequence's work: as they ran if that was seen, or the sums of the counts.
    Drafts made by the model itself, with `draft_experts` experts, are computed twice: when they are made and when they
    are verified."""
    sequence = chunk.sequence
    after, drafts = chunk.start + chunk.length, len(chunk.drafts) + chunk.model_drafts
    if seen.pairs is not None:
        sequence.record_measured_work(chunk.length + drafts, seen.pairs, seen.absent)
        return
    sequence.record_work(chunk.start, after)
    if drafts:
        sequence.record_work(after, after + drafts)
    if chunk.model_drafts:
        made = sequence.request.budget.at_most(draft_experts)
        sequence.routed_pairs += made.pairs(chunk.start, chunk.start + chunk.model_drafts, sequence.prompt_length)


def token_event(sequence: Sequence, result: Sampled, clock: Callable[[], float]) -> TokenEvent:
    """The event of a token that does not end its sequence. The first one carries the request's times so far."""
    stats = None
    if sequence.first_token_at is None:
        sequence.first_token_at = clock()
        stats = sequence.stats(sequence.first_token_at)
    return TokenEvent(
        sequence.id,
        result.token,
        result.logprob,
        stats=stats,
        prompt_logprobs=_unsent_prompt_logprobs(sequence),
        measured=result.measured,
    )


def end_event(
    sequence: Sequence, finish: Finish, last: Sampled | None, error: str | None, code: str, clock: Callable[[], float]
) -> TokenEvent:
    """The event that ends a sequence, with its last token if there is one."""
    token = None if last is None else last.token
    logprob = None if last is None else last.logprob
    measured = None if last is None else last.measured
    if token is not None and error is None:
        sequence.first_token_at = sequence.first_token_at or clock()
    stats, prompt_logprobs = sequence.stats(clock()), _unsent_prompt_logprobs(sequence)
    routes = sequence.final_routes() if finish in ("stop", "length") else None
    return TokenEvent(sequence.id, token, logprob, finish, error, stats, prompt_logprobs, code, routes, measured)


def _unsent_prompt_logprobs(sequence: Sequence) -> tuple[Logprob, ...] | None:
    """The prompt's log-probabilities for the first event of a sequence that asked for them; else None."""
    if sequence.request.sampling.prompt_logprobs is None or sequence.prompt_logprobs_sent:
        return None
    sequence.prompt_logprobs_sent = True
    return tuple(sequence.prompt_logprobs)
