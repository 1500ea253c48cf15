"""Applies grammar masks to logits: tokens that a grammar forbids get minus infinity, row by row.

A mask process computes the masks and the backend applies them; this file connects the two and compiles no grammar.
"""

import time
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from engine.grammars.matcher import Matcher, Words
from engine.sequence import Sequence
from model.backends.base import SamplingOps

TOO_COMPLEX = "grammar_too_complex"
MASK_WAIT_SECONDS = 0.002  # how long to wait for the masks after drafts, which were asked for before the model ran


class Fault(NamedTuple):
    """Why no token is sampled from a row. Without a message: its mask is late."""

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
    """The adjusted logits with minus infinity for forbidden tokens, and the rows that cannot be sampled from.

    Rows of one sequence are neighbours, each after one more draft. If settings and grammar together allow no token
    (such as a minimum length and a grammar that is complete), the grammar wins: it is applied to the model's logits.
    """
    began = time.perf_counter()
    found = row_masks(sequences, before_B)
    masked_BV = logits_BV
    if found.masks:
        masked_BV = ops.constrain(logits_BV, raw_BV, np.stack(found.masks), found.mask_of_B)
    found.record_seconds(time.perf_counter() - began)
    return masked_BV, found.faults


@dataclass(frozen=True, slots=True)
class RowMasks:
    """The masks of a step, which of them each row has (-1 for none), and the rows that lack theirs."""

    masks: list[Words]
    mask_of_B: NDArray[np.int64]
    faults: Faults
    matcher: Matcher | None  # of some row

    def record_seconds(self, seconds: float) -> None:
        """Record the time that a step spent on these masks."""
        if self.matcher is not None:
            self.matcher.spend(seconds, len(self.masks))


def row_masks(sequences: list[Sequence], before_B: list[tuple[int, ...]] | None) -> RowMasks:
    """The packed masks of the rows whose sequences have a grammar. Waits for the first row of each."""
    matcher = None
    masks: list[Words] = []
    mask_of_B = np.full(len(sequences), -1)
    faults: Faults = {}
    rows = [row for row, sequence in enumerate(sequences) if sequence.matcher is not None]
    for _, group in groupby(rows, key=lambda row: id(sequences[row])):
        own = list(group)
        matcher = sequences[own[0]].matcher
        assert matcher is not None
        drafts = len(before_B[own[-1]]) if before_B else 0
        if drafts:
            matcher.settle(MASK_WAIT_SECONDS)
        words_RW = matcher.words(drafts)
        if matcher.error:
            faults |= dict.fromkeys(own, Fault(f"the grammar became too complex: {matcher.error}", TOO_COMPLEX))
            continue
        count = len(words_RW)
        mask_of_B[own[:count]] = len(masks) + np.arange(count)
        masks += list(words_RW)
        faults |= dict.fromkeys(own[count:], Fault())
    return RowMasks(masks, mask_of_B, faults, matcher)
