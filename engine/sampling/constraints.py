"""What grammars leave of logits: whatever they forbid becomes impossible. Row by row; it compiles nothing.

The masks have been computed beside the engine; here they are applied, by a native kernel or, without, by numpy.
"""

import time
from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.grammars.matcher import Words, unpacked
from engine.sequence import Sequence
from model.backends.cpu.kernels.library import load

TOO_COMPLEX = "grammar_too_complex"
MASK_WAIT_SECONDS = 0.002  # seconds for masks of guesses, which were asked for before the model ran


class Fault(NamedTuple):
    """Why nothing is sampled from a row. Without a message, what may come there was not known in time."""

    message: str = ""
    code: str = ""


Faults = dict[int, Fault]


def constrained(
    logits_BV: Tensor, raw_BV: Tensor, sequences: list[Sequence], before_B: list[tuple[int, ...]] | None
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
    masked_BV = _applied(logits_BV, raw_BV, masks, mask_of_B)
    if matcher is not None:
        matcher.spend(time.perf_counter() - began, len(masks))
    return masked_BV, faults


def _applied(logits_BV: Tensor, raw_BV: Tensor, masks: list[Words], mask_of_B: NDArray[np.int64]) -> Tensor:
    if not masks:
        return logits_BV
    allowed_MW = np.stack(masks)
    if load().native:
        masked_BV: Tensor = torch.ops.moedial.constrain(
            logits_BV.contiguous(), raw_BV, torch.from_numpy(allowed_MW), torch.from_numpy(mask_of_B)
        )
        return masked_BV
    masked_BV = logits_BV.clone()
    values_BV: NDArray[np.float32] = masked_BV.numpy()
    allowed_MV = unpacked(allowed_MW, values_BV.shape[1])
    for row in np.flatnonzero(mask_of_B >= 0):
        allowed_V = allowed_MV[mask_of_B[row]]
        if not np.isfinite(values_BV[row, allowed_V]).any():
            values_BV[row] = raw_BV[row].numpy()
        values_BV[row, ~allowed_V] = -np.inf
    return masked_BV
