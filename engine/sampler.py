"""From logits to tokens, row by row independent: a row's result depends on its own logits, settings and seed alone.

The random number of a token is keyed by (seed, position), so preemption and batch-mates change nothing.
It knows sequences and logits, not scheduling; how numbers become tokens is `engine/draw.py`'s.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.draw import ASKED, draw
from engine.logprobs import logprobs
from engine.penalties import adjusted
from engine.plan import Sampled
from engine.sequence import Sequence
from model.kernels.library import load
from model.noise import uniform

NOT_FINITE = "the model produced logits that are not finite for this request"


def sample(logits_BV: Tensor, sequences: list[Sequence]) -> tuple[Sampled, ...]:
    """The next token of each sequence and the log-probabilities it asked for; the logits are left as they are."""
    if load().native and logits_BV.dtype == torch.float32 and all(sequence.plain for sequence in sequences):
        best: list[int] = torch.ops.moedial.best(logits_BV).tolist()
        return tuple(Sampled(0, error=NOT_FINITE) if token < 0 else Sampled(token) for token in best)
    raw_BV = logits_BV.float().contiguous()
    finite_B: NDArray[np.bool_] = torch.isfinite(raw_BV.sum(-1)).numpy()
    token_B = _choose(adjusted(raw_BV, sequences), finite_B, sequences)
    found = logprobs(raw_BV, token_B, [s.request.sampling.logprobs for s in sequences], finite_B)
    return tuple(
        Sampled(token, logprob) if ok else Sampled(0, error=NOT_FINITE)
        for token, logprob, ok in zip(token_B.tolist(), found, finite_B.tolist(), strict=True)
    )


def _choose(logits_BV: Tensor, finite_B: NDArray[np.bool_], sequences: list[Sequence]) -> NDArray[np.int64]:
    """The best token of each row (of equals the lowest), or a drawn one where a temperature asks for it."""
    values_BV: NDArray[np.float32] = logits_BV.numpy()
    token_B: NDArray[np.int64] = values_BV.argmax(-1)  # numpy's runs at the speed of memory, torch's ten times slower
    hot_B = np.array([sequence.request.sampling.temperature > 0 for sequence in sequences])
    if hot_B.any():
        # A best value that adjustments made infinite leaves nothing to draw from.
        best_B = values_BV[np.arange(len(token_B)), token_B]
        rows_R = np.flatnonzero(hot_B & finite_B & np.isfinite(best_B))
        token_B[rows_R] = draw(logits_BV, rows_R, _asked([sequences[row] for row in rows_R], values_BV.shape[1]))
    return token_B


def _asked(sequences: list[Sequence], vocabulary: int) -> NDArray[np.void]:
    """What each row wants of its draw, and its random number."""
    settings = [sequence.request.sampling for sequence in sequences]
    return np.array(
        [
            (s.temperature, min(s.top_k or vocabulary, vocabulary), s.top_p, s.min_p, uniform(s.seed, len(q.tokens)))
            for s, q in zip(settings, sequences, strict=True)
        ],
        ASKED,
    )
