"""Finds at which counts repair helps, and writes its tables.

Tables are fitted on one half of the deciding text and judged on the other: several ways to fit, each also half as
strong, and what lowers the KL divergence from the trained count most is kept. Only counts where it is lowered have a
row that is not neutral. Plain torch, on weights that are loaded beside the engine's. Not here: see `repair_fit.py`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from calibration.allocation import LEAST_GAIN
from calibration.found import Found
from calibration.repair_fit import Fit, Tables, fit_tables, hooked
from calibration.run import Run
from calibration.windows import window_batch
from model.backends.torch.attend import WholeAttend
from model.budget import ExpertBudget, RoutingRule
from model.decoder import Decoder
from weights.calibration import REPAIR_FILE
from weights.load import load_model
from weights.repair import write_tables

FITS: tuple[Fit, ...] = ("moments", "least squares")
STRENGTHS = (0.5, 1.0)
TOKENS = 16384  # of the deciding text at most
LOGIT_ROWS = 512  # tokens whose distributions are compared at once


def search(run: Run) -> Found:
    """The counts of the grid below the trained one where repair lowers the KL divergence, and their tables."""
    counts = tuple(count for count in run.counts if count < run.experts.trained)
    if run.experts.repair_refusal or not counts or len(run.decide.windows) < 2:
        return Found()
    path = run.work / REPAIR_FILE
    helped: list[int] = run.once("repaired", lambda: _write(run, counts)) if path.exists() else _write(run, counts)
    return Found(
        options={f"k{count}-repaired": repaired(run, count) for count in helped},
        repaired=tuple(helped),
        repair_file=path if helped else None,
    )


def repaired(run: Run, count: int) -> ExpertBudget:
    """The budget of one count in every layer with repair."""
    return ExpertBudget(run.uniform(count).per_layer, rule=RoutingRule(repair=True))


def _write(run: Run, counts: tuple[int, ...]) -> list[int]:
    """Fit, judge and write; returns the counts that are helped."""
    model, _ = load_model(run.folder, run.info.dtype)
    windows = torch.tensor(run.decide.windows)[: max(2, TOKENS // len(run.decide.windows[0])), :-1]
    fit_BS, judge_BS = windows.tensor_split(2)
    tables, helped = best_tables(model, fit_BS, judge_BS, counts)
    if helped:
        write_tables(run.work / REPAIR_FILE, tables.scale, tables.shift)
    return helped


def best_tables(model: Decoder, fit_BS: Tensor, judge_BS: Tensor, counts: tuple[int, ...]) -> tuple[Tables, list[int]]:
    """The tables that are best for each count, neutral where none helps, and the counts that they help."""
    judge = Judge(model, judge_BS)
    config = model.config
    best = Tables.neutral(len(config.mixtures), config.mixtures[0].trained, config.width)
    helped: list[int] = []
    for count in counts:
        plain = judge.kl(count, best)
        lowest = plain * (1 - LEAST_GAIN)
        for tables in _variants(model, fit_BS, count):
            if (kl := judge.kl(count, tables)) < lowest:
                lowest = kl
                best.scale[:, count], best.shift[:, count] = tables.scale[:, count], tables.shift[:, count]
        if lowest < plain * (1 - LEAST_GAIN):
            helped.append(count)
    return best, helped


def _variants(model: Decoder, fit_BS: Tensor, count: int) -> Iterator[Tables]:
    for fit in FITS:
        tables = fit_tables(model, fit_BS, (count,), fit, "trained")
        for strength in STRENGTHS:
            yield tables.toward_neutral(strength)


@dataclass(slots=True)
class Judge:
    """Measures the KL divergence of repaired counts from the trained one on windows [B, S]."""

    model: Decoder
    window_BS: Tensor
    trained_TD: Tensor | None = None  # final hidden states at the trained count

    def kl(self, count: int, tables: Tables) -> float:
        """Nats per token, of one count in every layer with these tables."""
        if self.trained_TD is None:
            self.trained_TD = self._hidden(self.model.config.mixtures[0].trained, tables)
        return divergence(self.model, self.trained_TD, self._hidden(count, tables))

    @torch.inference_mode()
    def _hidden(self, count: int, tables: Tables) -> Tensor:
        def apply(layer: int, _: nn.Module, __: tuple[Any, ...], output_TD: Tensor) -> Tensor:
            repaired_TD = output_TD.float() * tables.scale[layer, count] + tables.shift[layer, count]
            return repaired_TD.to(output_TD.dtype)

        budget = ExpertBudget((count,) * len(self.model.config.mixtures))
        length = self.window_BS.shape[1]
        with hooked(self.model, apply):
            parts = [
                self.model.hidden(window_batch(part_BS, [budget] * len(part_BS)), WholeAttend(length))
                for part_BS in self.window_BS.split(max(1, 4096 // length))
            ]
        return torch.cat(parts)


@torch.inference_mode()
def divergence(model: Decoder, trained_TD: Tensor, other_TD: Tensor) -> float:
    """Mean KL divergence, in nats, between the next-token distributions of two sets of final hidden states."""
    total = 0.0
    for trained_tD, other_tD in zip(trained_TD.split(LOGIT_ROWS), other_TD.split(LOGIT_ROWS), strict=True):
        log_p_tV = model.logits(trained_tD).float().log_softmax(-1)
        log_q_tV = model.logits(other_tD).float().log_softmax(-1)
        total += float((log_p_tV.exp() * (log_p_tV - log_q_tV)).sum(dtype=torch.float64))
    return total / len(trained_TD)
