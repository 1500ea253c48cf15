"""The sampler: from logits to tokens. A row's result depends only on its own logits, settings and seed.

The random number of a token is keyed by (seed, position), so that preemption and the rest of the batch change nothing.
It depends on sequences and logits, not on scheduling; a backend draws the tokens.
"""

from itertools import islice

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray
from torch import Tensor

from engine.plan import NOT_FINITE, Sampled
from engine.sampling.constraints import Fault, constrained
from engine.sampling.logprobs import logprobs
from engine.sampling.penalties import adjusted, forbidden
from engine.sampling.uncertainty import uncertainty
from engine.sequence import Sequence
from engine.types import NO_TOKEN_LEFT, Measure
from model.backends.base import SamplingOps
from model.noise import uniform
from model.sampling import PARAMETERS

NO_TOKEN_ALLOWED = Fault("allowed_token_ids, bad_words and what the answer must match leave no token", NO_TOKEN_LEFT)
Drafts = list[tuple[int, ...]]


def sample(
    ops: SamplingOps, logits_RV: Tensor, sequences: list[Sequence], drafts: Drafts | None = None
) -> tuple[Sampled, ...]:
    """The next token of each sequence and the log-probabilities it asked for; the logits are not changed.

    A sequence with drafts has one row for its next token and one after each draft. A draft is accepted if all before it
    are and it equals the token sampled at its position; the tokens after accepted drafts are `after_drafts`.
    """
    if drafts is None or not any(drafts):
        return _rows(ops, logits_RV, sequences, None)
    row_sequences: list[Sequence] = []
    before_B: Drafts = []
    for sequence, draft in zip(sequences, drafts, strict=True):
        for ahead in range(len(draft) + 1):
            row_sequences.append(sequence)
            before_B.append(draft[:ahead])
    results = iter(_rows(ops, logits_RV, row_sequences, before_B))
    return tuple(_verified(list(islice(results, len(draft) + 1)), draft) for draft in drafts)


def _verified(results: list[Sampled], draft: tuple[int, ...]) -> Sampled:
    """The first result with those after accepted drafts; `results` has one for the next token and one per draft."""
    accepted = 0
    while accepted < len(draft) and results[accepted].error is None and results[accepted].token == draft[accepted]:
        accepted += 1
    if results[accepted].error == "":  # the mask after the last accepted draft is late
        accepted -= 1
    return replace(results[0], after_drafts=tuple(results[1 : accepted + 1]))


def _rows(
    ops: SamplingOps, logits_BV: Tensor, sequences: list[Sequence], before_B: Drafts | None
) -> tuple[Sampled, ...]:
    """One result per row. `before_B`: the drafts that a row comes after."""
    if all([sequence.plain_greedy for sequence in sequences]):
        return tuple([_plain(token) for token in ops.greedy(logits_BV)])
    raw_BV = logits_BV.float().contiguous()
    best_B = np.array(ops.greedy(raw_BV), np.int64)
    finite_B = best_B >= 0
    ahead_B = None if before_B is None else [len(before) for before in before_B]
    if all(sequence.plain for sequence in sequences):
        token_B = _drawn(ops, raw_BV, best_B, finite_B, sequences, ahead_B)
        return tuple(_plain(token) for token in token_B.tolist())
    adjusted_BV = adjusted(raw_BV, sequences)
    constrained_BV, faults = constrained(ops, adjusted_BV, raw_BV, sequences, before_B)
    token_B = best_B if constrained_BV is raw_BV else _best(constrained_BV)
    token_B = _drawn(ops, constrained_BV, token_B, finite_B, sequences, ahead_B)
    for row in forbidden(token_B, adjusted_BV, sequences):
        if finite_B[row]:
            faults.setdefault(row, NO_TOKEN_ALLOWED)
    logprob_B = logprobs(raw_BV, token_B, [s.request.sampling.logprobs for s in sequences], finite_B)
    results = [Sampled(token, logprob) for token, logprob in zip(token_B.tolist(), logprob_B, strict=True)]
    for by, rows in measured_rows(sequences).items():
        for row, value in zip(rows, uncertainty(raw_BV[rows], by).tolist(), strict=True):
            results[row] = replace(results[row], measured=value)
    for row in {*faults, *np.flatnonzero(~finite_B).tolist()}:
        results[row] = failed(faults.get(row))
    return tuple(results)


def _plain(token: int) -> Sampled:
    """A token without log-probabilities or measures; below 0 the row's logits are not finite."""
    return Sampled(0, error=NOT_FINITE) if token < 0 else Sampled(token)


def measured_rows(sequences: list[Sequence]) -> dict[Measure, list[int]]:
    """The rows that want each measure; without those that no row wants."""
    found: dict[Measure, list[int]] = {}
    for row, sequence in enumerate(sequences):
        if (by := sequence.request.sampling.measured) is not None:
            found.setdefault(by, []).append(row)
    return found


def failed(fault: Fault | None) -> Sampled:
    """A result without a token, because of `fault`; None: because the model's logits are not finite."""
    if fault is None:
        return Sampled(0, error=NOT_FINITE)
    return Sampled(0, error=fault.message, code=fault.code)


def _best(logits_BV: Tensor) -> NDArray[np.int64]:
    """The best token of each row, the lowest id of equal ones; values may be infinite."""
    token_B: NDArray[np.int64] = logits_BV.numpy().argmax(-1)  # at memory speed, torch is ten times slower here
    return token_B


def _drawn(
    ops: SamplingOps,
    logits_BV: Tensor,
    best_B: NDArray[np.int64],
    finite_B: NDArray[np.bool_],
    sequences: list[Sequence],
    ahead_B: list[int] | None,
) -> NDArray[np.int64]:
    """The best token of each row, or a drawn one if the temperature is above 0. `finite_B`: of the model's logits."""
    drawn_B = finite_B & [sequence.request.sampling.temperature > 0 for sequence in sequences]
    if not drawn_B.any():
        return best_B
    # If adjustments made the best value infinite, there is nothing to draw from.
    value_B: NDArray[np.float32] = logits_BV.numpy()[np.arange(len(best_B)), best_B]
    rows_R = np.flatnonzero(drawn_B & np.isfinite(value_B))
    vocabulary = logits_BV.shape[1]
    params = [row_parameters(sequences[row], ahead_B[row] if ahead_B else 0, vocabulary) for row in rows_R]
    token_B = best_B.copy()
    token_B[rows_R] = ops.draw(logits_BV, rows_R, np.array(params, PARAMETERS))
    return token_B


def row_parameters(sequence: Sequence, ahead: int, vocabulary: int) -> tuple[float, int, float, float, float]:
    """A row's `PARAMETERS`, `ahead` tokens after the end of its sequence."""
    s = sequence.request.sampling
    top_k = min(s.top_k or vocabulary, vocabulary)
    u = uniform(s.seed, len(sequence.tokens) + ahead)
    return s.temperature, top_k, s.top_p, s.min_p, u
