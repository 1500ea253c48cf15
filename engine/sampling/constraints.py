"""What grammars leave of logits: whatever they forbid becomes impossible. Row by row; it compiles nothing.

The masks have been computed beside the engine; here the backend applies them.
"""

import time
from itertools import groupby
from typing import NamedTuple

import numpy as np
from torch import Tensor

from engine.grammars.matcher import Words
from engine.sequence import Sequence
from model.backends.base import SamplingOps

TOO_COMPLEX = "grammar_too_complex"
MASK_WAIT_SECONDS = 0.002  # seconds for masks of guesses, which were asked for before the model ran


class Fault(NamedTuple):
    """Why nothing is sampled from a row. Without a message, what may come there was not known in time."""

    message: str = ""
    code: str = ""


Faults = dict[int, Fault]


def constrained(
    ops: SamplingOps,
    logits_BV: Tensor,
    raw_BV: Tensor,
    sequences: list[Sequence],
    before_B: list[tuple[int, ...]] | None,
) -> tuple[Tensor, Faults]:
    """Adjusted logits with what grammars forbid at minus infinity, and which rows are not to be sampled from.

    Rows of one sequence are neighbours, each after one more guess. Where settings and grammar together leave nothing
    (a minimum length, and a grammar that has come to its end), the grammar wins: the row is as the model made it.
    """
    rows = [row for row, sequence in enumerate(sequences) if sequence.matcher is not None]
    if not rows:
        return logits_BV, {}
    began = time.perf_counter()
    matcher = None
    masks: list[Words] = []
    mask_of_B = np.full(len(sequences), -1)
    faults: Faults = {}
    for _, group in groupby(rows, key=lambda row: id(sequences[row])):
        own = list(group)
        matcher = sequences[own[0]].matcher
        assert matcher is not None
        guesses = len(before_B[own[-1]]) if before_B else 0
        if guesses:
            matcher.settle(MASK_WAIT_SECONDS)
        words_RW = matcher.words(guesses)
        if matcher.error:
            faults |= dict.fromkeys(own, Fault(f"the grammar became too complex: {matcher.error}", TOO_COMPLEX))
            continue
        mask_of_B[own[: len(words_RW)]] = len(masks) + np.arange(len(words_RW))
        masks += list(words_RW)
        faults |= dict.fromkeys(own[len(words_RW) :], Fault())
    masked_BV = ops.constrain(logits_BV, raw_BV, np.stack(masks), mask_of_B) if masks else logits_BV
    if matcher is not None:
        matcher.spend(time.perf_counter() - began, len(masks))
    return masked_BV, faults
