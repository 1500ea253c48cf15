"""What grammars leave of logits: whatever they forbid becomes impossible. Row by row; it compiles nothing.

A grammar is asked once per sequence and step, for the next token and for what may follow each guess.
"""

from itertools import groupby

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from engine.sequence import Sequence

Faults = dict[int, str]


def constrained(
    logits_BV: Tensor, raw_BV: Tensor, sequences: list[Sequence], before_B: list[tuple[int, ...]] | None
) -> tuple[Tensor, Faults]:
    """Adjusted logits with what grammars forbid at minus infinity, and why a row is left with nothing.

    Rows of one sequence are neighbours, each after one more guess. Where settings and grammar together leave nothing
    (a minimum length, and a grammar that has come to its end), the grammar wins: the row is as the model made it.
    """
    rows = [row for row, sequence in enumerate(sequences) if sequence.matcher is not None]
    if not rows:
        return logits_BV, {}
    copy_BV = logits_BV.clone() if logits_BV is raw_BV else logits_BV
    values_BV: NDArray[np.float32] = copy_BV.numpy()
    faults: Faults = {}
    for _, group in groupby(rows, key=lambda row: id(sequences[row])):
        own = list(group)
        _constrain(values_BV, raw_BV, sequences[own[0]], own, before_B[own[-1]] if before_B else (), faults)
    return copy_BV, faults


def _constrain(
    values_BV: NDArray[np.float32],
    raw_BV: Tensor,
    sequence: Sequence,
    rows: list[int],
    guesses: tuple[int, ...],
    faults: Faults,
) -> None:
    matcher = sequence.matcher
    assert matcher is not None
    masks = matcher.masks(guesses)
    for row, allowed_V in zip(rows, masks, strict=True):
        if matcher.error:
            faults[row] = f"the grammar became too complex: {matcher.error}"
            continue
        if not np.isfinite(values_BV[row, allowed_V]).any():
            values_BV[row] = raw_BV[row].numpy()
        values_BV[row, ~allowed_V] = -np.inf
