"""Fits the tables of `RoutingRule.repair`: what brings a mixture's output at a small count back to the trained one.

Per layer and dimension, over tokens of calibration text: ŷ = scale · y + shift. "moments" gives ŷ the mean and the
spread of the output at the trained count (LDA, arXiv 2609.09241); "least squares" gives the ŷ nearest to it, whose
spread is smaller the less the two outputs agree. Not here: how the tables are stored (`weights/repair.py`) and applied.
"""

from collections.abc import Callable, Iterator
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
Inputs = Literal["trained", "own", "repaired"]
OutputHook = Callable[[int, nn.Module, tuple[Any, ...], Tensor], Tensor | None]  # layer, module, its input, its output
EPS = 1e-6  # added to a spread that divides
TOKENS_PER_PASS = 4096  # bounds the memory of a pass


@dataclass(frozen=True, slots=True)
class Tables:
    """Scale and shift of every MoE layer and count, [L, trained + 1, D]; row = count. Row 0 is not used."""

    scale: Tensor
    shift: Tensor

    @classmethod
    def neutral(cls, layers: int, trained: int, width: int) -> "Tables":
        """Tables that change nothing."""
        shape = (layers, trained + 1, width)
        return cls(torch.ones(shape), torch.zeros(shape))

    def toward_neutral(self, strength: float) -> "Tables":
        """Tables that change outputs by this part of what these change."""
        return Tables(1 + strength * (self.scale - 1), strength * self.shift)


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


@torch.inference_mode()
def fit_tables(model: Decoder, window_BS: Tensor, counts: tuple[int, ...], fit: Fit, inputs: Inputs) -> Tables:
    """Tables whose rows for `counts`, all below the trained one, are fitted to the text; others are neutral.

    `inputs`: what a layer reads at the small count. "trained": the same as in the pass at the trained count. "own":
    what the small counts of the layers before it have made of it. "repaired": the same, with these layers repaired;
    then the text is one pass and the tables are solved on the way.
    """
    config = model.config
    tables = Tables.neutral(len(config.mixtures), config.mixtures[0].trained, config.width)
    for count in counts:
        if inputs == "repaired":
            _run(model, window_BS, count, partial(_repair_small, tables, count, fit), len(window_BS))
            continue
        moments = [Moments(config.width) for _ in config.mixtures]
        if inputs == "own":
            _run(model, window_BS, count, partial(_add_halves, moments))
        else:
            _run(model, window_BS, None, partial(_add_same_input, moments, count))
        for layer, each in enumerate(moments):
            tables.scale[layer, count], tables.shift[layer, count] = each.solve(fit)
    return tables


def _add_same_input(
    moments: list[Moments], count: int, layer: int, mixture: nn.Module, inputs: tuple[Any, ...], output_TD: Tensor
) -> None:
    """Compute the layer once more at the small count."""
    x_TD, step = inputs
    budget = LayerBudget(torch.full_like(step.budget.counts_T, count), count)
    moments[layer].add(mixture.forward(x_TD, replace(step, budget=budget)), output_TD)


def _add_halves(moments: list[Moments], layer: int, _: nn.Module, inputs: tuple[Any, ...], output_TD: Tensor) -> None:
    trained_TD, small_TD = output_TD.chunk(2)
    moments[layer].add(small_TD, trained_TD)


def _repair_small(
    tables: Tables, count: int, fit: Fit, layer: int, _: nn.Module, inputs: tuple[Any, ...], output_TD: Tensor
) -> Tensor:
    """Solve this layer's row and repair its output, so that the next layers read what they will read while serving."""
    trained_TD, small_TD = output_TD.chunk(2)
    moments = Moments(output_TD.shape[-1])
    moments.add(small_TD, trained_TD)
    scale_D, shift_D = moments.solve(fit)
    tables.scale[layer, count], tables.shift[layer, count] = scale_D, shift_D
    return torch.cat([trained_TD, (small_TD * scale_D + shift_D).to(output_TD.dtype)])


def _run(model: Decoder, window_BS: Tensor, count: int | None, hook: OutputHook, rows: int = 0) -> None:
    """Passes over the windows at the trained count, `rows` at once; with a `count`, beside the same at that one."""
    layers, length = len(model.config.mixtures), window_BS.shape[1]
    rows = rows or max(1, TOKENS_PER_PASS // length)
    trained = ExpertBudget((model.config.mixtures[0].trained,) * layers)
    with hooked(model, hook):
        for part_BS in window_BS.split(rows):
            budgets = [trained] * len(part_BS)
            if count is not None:
                budgets += [ExpertBudget((count,) * layers)] * len(part_BS)
                part_BS = part_BS.repeat(2, 1)
            model.hidden(window_batch(part_BS, budgets), WholeAttend(length))
