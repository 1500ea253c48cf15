"""From logits to tokens, row by row independent: a row's result depends on its own logits, settings and seed alone.

The random number of a token is keyed by (seed, position), so preemption and batch-mates change nothing.
It knows sequences and logits, not scheduling; how numbers become tokens is `engine/sampling/draw.py`'s.
"""

import numpy as np
import torch
from msgspec.structs import replace
from numpy.typing import NDArray
from torch import Tensor

from engine.plan import NOT_FINITE, Sampled
from engine.sampling.constraints import Fault, constrained
from engine.sampling.draw import ASKED, draw
from engine.sampling.logprobs import logprobs
from engine.sampling.penalties import adjusted, forbidden
from engine.sequence import Sequence
from engine.types import NO_TOKEN_LEFT
from model.backends.base import SamplingOps
from model.noise import uniform

NOTHING_LEFT = Fault("allowed_token_ids, bad_words and what the answer must match leave no token", NO_TOKEN_LEFT)
Drafts = list[tuple[int, ...]]


def sample(
    ops: SamplingOps, logits_RV: Tensor, sequences: list[Sequence], drafts: Drafts | None = None
) -> tuple[Sampled, ...]:
    """The next token of each sequence and the log-probabilities it asked for; the logits are left as they are.

    A sequence with guesses has a row for its next token and one more after each guess. Guesses stand as long as each is
    the token that was sampled before it; then they are `more`.
    """
    if drafts is None or not any(drafts):
        return _rows(ops, logits_RV, sequences, None)
    places = [(s, guess[:ahead]) for s, guess in zip(sequences, drafts, strict=True) for ahead in range(len(guess) + 1)]
    results = iter(_rows(ops, logits_RV, [sequence for sequence, _ in places], [before for _, before in places]))
    return tuple(_accepted([next(results) for _ in range(len(guess) + 1)], guess) for guess in drafts)


def _accepted(results: list[Sampled], guesses: tuple[int, ...]) -> Sampled:
    right = 0
    while right < len(guesses) and results[right].error is None and results[right].token == guesses[right]:
        right += 1
    if results[right].error == "":  # what may follow the last right guess was not known in time
        right -= 1
    return replace(results[0], after_drafts=tuple(results[1 : right + 1]))


def _rows(
    ops: SamplingOps, logits_BV: Tensor, sequences: list[Sequence], before_B: Drafts | None
) -> tuple[Sampled, ...]:
    """One result per row. `before_B`: the guesses that a row comes after."""
    if all(sequence.plain_greedy for sequence in sequences):
        best = ops.greedy(logits_BV)
        return tuple(Sampled(0, error=NOT_FINITE) if token < 0 else Sampled(token) for token in best)
    raw_BV = logits_BV.float().contiguous()
    finite_B: NDArray[np.bool_] = torch.isfinite(raw_BV.sum(-1)).numpy()
    ahead_B = None if before_B is None else [len(before) for before in before_B]
    adjusted_BV = adjusted(raw_BV, sequences)
    constrained_BV, faults = constrained(ops, adjusted_BV, raw_BV, sequences, before_B)
    token_B = _choose(constrained_BV, finite_B, sequences, ahead_B)
    for row in forbidden(token_B, adjusted_BV, sequences):
        faults.setdefault(row, NOTHING_LEFT)
    found = logprobs(raw_BV, token_B, [s.request.sampling.logprobs for s in sequences], finite_B)
    return tuple(
        Sampled(token, logprob) if ok and row not in faults else _failed(faults.get(row))
        for row, (token, logprob, ok) in enumerate(zip(token_B.tolist(), found, finite_B.tolist(), strict=True))
    )


def _failed(fault: Fault | None) -> Sampled:
    return Sampled(0, error=NOT_FINITE) if fault is None else Sampled(0, error=fault.message, code=fault.code)


def _choose(
    logits_BV: Tensor, finite_B: NDArray[np.bool_], sequences: list[Sequence], ahead_B: list[int] | None
) -> NDArray[np.int64]:
    """The best token of each row (of equals the lowest), or a drawn one where a temperature asks for it."""
    values_BV: NDArray[np.float32] = logits_BV.numpy()
    token_B: NDArray[np.int64] = values_BV.argmax(-1)  # numpy's runs at the speed of memory, torch's ten times slower
    hot_B = np.array([sequence.request.sampling.temperature > 0 for sequence in sequences])
    if hot_B.any():
        # A best value that adjustments made infinite leaves nothing to draw from.
        best_B = values_BV[np.arange(len(token_B)), token_B]
        rows_R = np.flatnonzero(hot_B & finite_B & np.isfinite(best_B))
        places = [(sequences[row], ahead_B[row] if ahead_B else 0) for row in rows_R]
        token_B[rows_R] = draw(logits_BV, rows_R, _asked(places, values_BV.shape[1]))
    return token_B


def _asked(places: list[tuple[Sequence, int]], vocabulary: int) -> NDArray[np.void]:
    """What each row wants of its draw, and its random number; a row may be some tokens ahead of its sequence."""
    return np.array(
        [
            (
                s.temperature,
                min(s.top_k or vocabulary, vocabulary),
                s.top_p,
                s.min_p,
                uniform(s.seed, len(sequence.tokens) + ahead),
            )
            for sequence, ahead in places
            for s in (sequence.request.sampling,)
        ],
        ASKED,
    )
