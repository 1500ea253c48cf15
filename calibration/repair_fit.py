"""Fits the tables of `RoutingRule.repair`: what brings a mixture's output at a small count back to the trained one.

Per layer and dimension, over tokens of calibration text: ŷ = scale · y + shift. "moments" gives ŷ the mean and the
spread of the output at the trained count (LDA, arXiv 2609.09241); "least squares" gives the ŷ nearest to it, whose
spread is smaller the less the two outputs agree. Both are fitted to what the layer makes of the same input at either
count. Not here: how the tables are stored (`weights/repair.py`) and applied.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from calibration.windows import window_batch
from model.backends.torch.attend import WholeAttend
from model.batch import LayerBudget
from model.budget import ExpertBudget
from model.decoder import Decoder

Fit = Literal["moments", "least squares"]
OutputHook = Callable[[int, nn.Module, tuple[Any, ...], Tensor], Tensor | None]  # layer, module, its input, its output
EPS = 1e-6  # added to a spread that divides
TOKENS_PER_PASS = 4096  # bounds the memory of a pass


@dataclass(frozen=True, slots=True)
class Tables:
    """Scale and shift of every MoE layer and count, [L, counts, D]; row = count. Row 0 is not used."""

    scale: Tensor
    shift: Tensor

    @classmethod
    def neutral(cls, layers: int, counts: int, width: int) -> "Tables":
        """Tables that change nothing."""
        shape = (layers, counts, width)
        return cls(torch.ones(shape), torch.zeros(shape))

    def set_row(self, count: int, other: "Tables", strength: float = 1.0) -> None:
        """Take over a count's row, so that outputs change by this part of what the other tables change."""
        self.scale[:, count] = 1 + strength * (other.scale[:, count] - 1)
        self.shift[:, count] = strength * other.shift[:, count]


class Moments:
    """Running sums over tokens, per dimension and in float64, of outputs at a small count and at the trained one."""

    def __init__(self, width: int) -> None:
        self.tokens = 0
        self._sums = torch.zeros(5, width, dtype=torch.float64)  # small, trained, small², trained², small · trained

    def add(self, small_TD: Tensor, trained_TD: Tensor) -> None:
        """Count these tokens in."""
        small, trained = small_TD.double(), trained_TD.double()
        sums = [part.sum(0) for part in (small, trained, small * small, trained * trained, small * trained)]
        self._sums += torch.stack(sums)
        self.tokens += len(small)

    def solve(self, fit: Fit) -> tuple[Tensor, Tensor]:
        """Scale and shift [D], float32."""
        small, trained, small_2, trained_2, both = self._sums / self.tokens
        small_std = (small_2 - small * small).clamp(min=0).sqrt()
        if fit == "moments":
            trained_std = (trained_2 - trained * trained).clamp(min=0).sqrt()
            scale = trained_std / (small_std + EPS)
        else:
            scale = (both - small * trained) / (small_std + EPS).square()
        shift = trained - scale * small
        return scale.float(), shift.float()


LayerMoments = Sequence[dict[int, Moments]]  # of each MoE layer, by count


@torch.inference_mode()
def measure_moments(model: Decoder, window_BS: Tensor, counts: Sequence[int]) -> LayerMoments:
    """Run the windows at the trained count; every mixture computes its input at each of `counts` as well."""
    config, length = model.config, window_BS.shape[1]
    moments = [{count: Moments(config.width) for count in counts} for _ in config.mixtures]
    budget = ExpertBudget((config.mixtures[0].trained,) * len(config.mixtures))
    with hooked(model, partial(_add_counts, moments)):
        for part_BS in window_BS.split(max(1, TOKENS_PER_PASS // length)):
            model.hidden(window_batch(part_BS, [budget] * len(part_BS)), WholeAttend(length))
    return moments


def _add_counts(
    moments: LayerMoments, layer: int, mixture: nn.Module, inputs: tuple[Any, ...], trained_TD: Tensor
) -> None:
    x_TD, step = inputs
    for count, sums in moments[layer].items():
        budget = LayerBudget(torch.full_like(step.budget.counts_T, count), count)
        sums.add(mixture.forward(x_TD, replace(step, budget=budget)), trained_TD)


def fit_tables(moments: LayerMoments, fit: Fit, counts: int) -> Tables:
    """Tables of so many counts from 0 on; rows that were not measured are neutral."""
    width = next(iter(moments[0].values())).solve(fit)[0].numel()
    tables = Tables.neutral(len(moments), counts, width)
    for layer, of_layer in enumerate(moments):
        for count, sums in of_layer.items():
            tables.scale[layer, count], tables.shift[layer, count] = sums.solve(fit)
    return tables


@contextmanager
def hooked(model: Decoder, hook: OutputHook) -> Iterator[None]:
    """Calls `hook` with the output of every mixture; what it returns takes the output's place."""
    mixtures = [
        layer.get_submodule("ffn")
        for layer, shape in zip(model.layers, model.config.feed_forward, strict=True)
        if shape.num_experts
    ]
    handles = [each.register_forward_hook(partial(hook, layer)) for layer, each in enumerate(mixtures)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
