"""Finds at which counts repair helps, and writes its tables.

Tables are made on one half of the deciding text and judged on the other, through the engine: several ways to fit, each
in several strengths, and where one of them helps, the best one tuned. Of each count that row is kept which lowers the
KL divergence most; where none does, it stays neutral. Making them is plain torch, on weights that are loaded beside the
engine's. Not here: the sums (`repair_fit.py`) and the gradients (`repair_tune.py`).
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import cast

import torch

from calibration.allocation import MIN_GAIN
from calibration.found import Found
from calibration.repair_fit import Fit, LayerMoments, Tables, fit_tables, measure_moments
from calibration.repair_tune import MAX_SECONDS, tune
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
TUNING_SHARE = 0.2  # of the time of a calibration, all counts together


def search(run: Run) -> Found:
    """The counts of the grid below the trained one where repair lowers the KL divergence, and their tables."""
    counts = tuple(count for count in run.counts if count < run.experts.trained)
    if run.experts.repair_refusal or not counts or len(run.decide.windows) < 2:
        return Found()
    best = _best(run, counts)
    for count in counts:
        run.repair.set_row(count, best.tables)
    if not best.helped:
        return Found()
    path = run.work / REPAIR_FILE
    write_tables(path, best.tables.scale, best.tables.shift)
    options = {f"k{count}-repaired": repaired(run, count) for count in best.helped}
    return Found(options=options, repaired=tuple(best.helped), repair_file=path)


def repaired(run: Run, count: int) -> ExpertBudget:
    """The budget of one count in every layer with repair."""
    return ExpertBudget(run.uniform(count).per_layer, rule=RoutingRule(repair=True))


def halves(text: Windows) -> tuple[Windows, Windows]:
    """A text's first and second half."""
    middle = len(text.windows) // 2
    first = replace(text, name=f"{text.name}, first half", windows=text.windows[:middle])
    return first, replace(text, name=f"{text.name}, second half", windows=text.windows[middle:])


class Best:
    """The rows so far that lower the KL divergence most on a text; neutral where none does."""

    def __init__(self, run: Run, text: Windows, counts: Sequence[int]) -> None:
        self.tables = Tables.neutral(run.experts.layers, run.experts.trained + 1, run.config.width)
        self._run, self._text = run, text
        plain = run.score([run.uniform(count) for count in counts], text)
        self._plain = {count: score.kl * (1 - MIN_GAIN) for count, score in zip(counts, plain, strict=True)}
        self._lowest = dict(self._plain)

    @property
    def helped(self) -> list[int]:
        """The counts whose rows are not neutral."""
        return [count for count, lowest in self._lowest.items() if lowest < self._plain[count]]

    def offer(self, tables: Tables, counts: Sequence[int]) -> None:
        """Score these rows, and keep those that are better."""
        for count in counts:
            self._run.repair.set_row(count, tables)
        budgets = [repaired(self._run, count) for count in counts]
        scores = self._run.score(budgets, self._text, salt=_hash(tables))
        for count, score in zip(counts, scores, strict=True):
            if score.kl < self._lowest[count]:
                self._lowest[count] = score.kl
                self.tables.set_row(count, tables)


def _best(run: Run, counts: Sequence[int]) -> Best:
    """Make tables by every way there is; returns the best rows."""
    first, second = halves(run.decide)
    window_BS = torch.tensor(first.windows)[:, :-1]
    window_BS = window_BS[: max(1, TOKENS // window_BS.shape[1])]
    model, _ = load_model(run.model, cast(DType, run.info.dtype))
    best = Best(run, second, counts)
    for tables in _fitted(measure_moments(model, window_BS, counts), run.experts.trained + 1):
        best.offer(tables, counts)
    helped = best.helped
    for count in helped:
        seconds = min(MAX_SECONDS, TUNING_SHARE * run.minutes * 60 / len(helped))
        best.offer(tune(model, window_BS, count, best.tables, seconds), [count])
    return best


def _fitted(moments: LayerMoments, rows: int) -> Iterator[Tables]:
    """Tables by every way to fit, in every strength."""
    for fit in FITS:
        tables = fit_tables(moments, fit, rows)
        for strength in STRENGTHS:
            weaker = Tables.neutral(*tables.scale.shape)
            for count in range(rows):
                weaker.set_row(count, tables, strength)
            yield weaker


def _hash(tables: Tables) -> str:
    """Tells tables apart: what was scored with them is kept for a run that goes on later."""
    digest = hashlib.sha256()
    for tensor in (tables.scale, tables.shift):
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()
