"""Applies grammar masks to logits: tokens that a grammar forbids get minus infinity, row by row.

A mask process computes the masks and the backend applies them; this file connects the two and compiles no grammar.
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
    masked_BV = ops.constrain(logits_BV, raw_BV, np.stack(masks), mask_of_B) if masks else logits_BV
    if matcher is not None:
        matcher.spend(time.perf_counter() - began, len(masks))
    return masked_BV, faults
