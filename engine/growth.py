"""What one step's results add to a sequence: tokens up to its end, and the reason of that end.

It knows one sequence, no blocks and no other sequences.
"""

from collections.abc import Sequence as Seq

from engine.plan import Sampled
from engine.sequence import Sequence
from engine.types import Finish, Logprob


def extend(sequence: Sequence, results: Seq[Sampled], longest: int) -> tuple[list[Sampled], Finish | None]:
    """Append what was sampled, up to the token that ends the sequence (its own end, or `longest` tokens in all).

    Returns the results that count, and how the sequence ends, if it does.
    """
    for count, result in enumerate(results, 1):
        if result.error is not None:
            return list(results[:count]), "error"
        sequence.tokens.append(result.token)
        if sequence.matcher is not None:
            sequence.matcher.advance((result.token,))
        if finish := _finish(sequence, result.token, longest):
            return list(results[:count]), finish
    return list(results), None


def _finish(sequence: Sequence, token: int, longest: int) -> Finish | None:
    sampling = sequence.request.sampling
    if token in sampling.stop_token_ids:
        return "stop"
    if sequence.output_count >= sampling.max_tokens or len(sequence.tokens) >= longest:
        return "length"
    return None


def told(sequence: Sequence) -> tuple[Logprob, ...] | None:
    """The prompt's log-probabilities, for the first event of a sequence that asked for them."""
    if sequence.request.sampling.prompt_logprobs is None or sequence.told:
        return None
    sequence.told = True
    return tuple(sequence.scores)
