"""Finds at which counts repair helps, and writes its tables.

Tables are fitted on one half of the deciding text and judged on the other, through the engine: several ways to fit,
each in several strengths. Of each count that is kept which lowers the KL divergence most; where none does, its row
stays neutral. Fitting is plain torch on weights loaded beside the engine's. Not here: the sums (`repair_fit.py`).
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import cast

import torch

from calibration.allocation import LEAST_GAIN
from calibration.found import Found
from calibration.repair_fit import Fit, Tables, fit_tables, measure_moments
from calibration.run import Run
from calibration.scoring import Windows
from model.budget import ExpertBudget, RoutingRule
from model.options import DType
from weights.calibration import REPAIR_FILE
from weights.load import load_model
from weights.repair import write_tables

FITS: tuple[Fit, ...] = ("moments", "least squares")
STRENGTHS = (0.5, 0.75, 1.0)
TOKENS = 16384  # of the deciding text, fitted to at most


def search(run: Run) -> Found:
    """The counts of the grid below the trained one where repair lowers the KL divergence, and their tables."""
    counts = tuple(count for count in run.counts if count < run.experts.trained)
    if run.experts.repair_refusal or not counts or len(run.decide.windows) < 2:
        return Found()
    first, second = halves(run.decide)
    best, helped = best_rows(run, fitted(run, first, counts), second, counts)
    for count in counts:
        run.repair.set_row(count, best)
    if not helped:
        return Found()
    path = run.work / f".{REPAIR_FILE}.part"  # an earlier calibration's file stays until this one is complete
    rows = run.experts.trained + 1
    write_tables(path, run.repair.scale[:, :rows], run.repair.shift[:, :rows])
    options = {f"k{count}-repaired": repaired(run, count) for count in helped}
    return Found(options=options, repaired=helped, repair_file=path)


def halves(text: Windows) -> tuple[Windows, Windows]:
    """A text's first and second half."""
    middle = len(text.windows) // 2
    first = replace(text, name=f"{text.name}, first half", windows=text.windows[:middle])
    return first, replace(text, name=f"{text.name}, second half", windows=text.windows[middle:])


def repaired(run: Run, count: int) -> ExpertBudget:
    """The budget of one count in every layer with repair."""
    return ExpertBudget(run.uniform(count).per_layer, rule=RoutingRule(repair=True))


def fitted(run: Run, text: Windows, counts: Sequence[int]) -> Iterator[tuple[str, Tables]]:
    """Tables by every way to fit, named. The weights are freed before the first of them is given."""
    window_BS = torch.tensor(text.windows)[:, :-1]
    few_BS = window_BS[: max(1, TOKENS // window_BS.shape[1])]
    model, _ = load_model(run.folder, cast(DType, run.info.dtype))
    moments = measure_moments(model, few_BS, counts)
    del model
    for fit in FITS:
        tables = fit_tables(moments, fit, run.experts.trained + 1)
        for strength in STRENGTHS:
            weaker = Tables.neutral(*tables.scale.shape)
            for count in counts:
                weaker.set_row(count, tables, strength)
            yield f"{fit}, {strength}", weaker


def best_rows(
    run: Run, variants: Iterator[tuple[str, Tables]], text: Windows, counts: Sequence[int]
) -> tuple[Tables, tuple[int, ...]]:
    """The best row of each count among the variants, neutral where none helps, and the counts that are helped."""
    best = Tables.neutral(run.experts.layers, run.experts.trained + 1, run.config.width)
    plain = run.score([run.uniform(count) for count in counts], text)
    lowest = {count: score.kl * (1 - LEAST_GAIN) for count, score in zip(counts, plain, strict=True)}
    helped = set()
    for name, tables in variants:
        for count in counts:
            run.repair.set_row(count, tables)
        scores = run.score([repaired(run, count) for count in counts], text, salt=name)
        for count, score in zip(counts, scores, strict=True):
            if score.kl < lowest[count]:
                lowest[count] = score.kl
                best.set_row(count, tables)
                helped.add(count)
    return best, tuple(sorted(helped))
