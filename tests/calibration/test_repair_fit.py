"""Fitted tables restore what is known to have been lost, on tiny decoders."""

from typing import Any

import pytest
import torch
from torch import Tensor

from calibration.repair_fit import Fit, Moments, Tables, fit_tables, hooked, measure_moments
from calibration.windows import window_batch
from model.backends.torch.attend import WholeAttend
from model.budget import ExpertBudget, RoutingRule
from model.decoder import Decoder
from tests.model.tiny import VOCABULARY, decoder, infinity, llama_like, topk

FITS: tuple[Fit, ...] = ("moments", "least squares")
WINDOWS = torch.arange(12 * 16).mul(7).remainder(VOCABULARY).view(12, 16)


def equal_experts() -> Decoder:
    """All experts are the same, and each one's weight is a third: one expert gives half of what two do."""
    model = decoder(llama_like(topk(experts=3), topk(experts=3)))
    with torch.no_grad():
        for layer in model.layers:
            ffn: Any = layer.ffn
            ffn.router.zero_()
            ffn.gate_up[1:], ffn.down[1:] = ffn.gate_up[0], ffn.down[0]
    return model


def hidden(model: Decoder, count: int, tables: Tables | None = None) -> Tensor:
    def repair(layer: int, _: torch.nn.Module, __: tuple[Any, ...], y_TD: Tensor) -> Tensor | None:
        return None if tables is None else y_TD * tables.scale[layer, count] + tables.shift[layer, count]

    budgets = [ExpertBudget((count,) * len(model.config.mixtures))] * len(WINDOWS)
    with torch.inference_mode(), hooked(model, repair):
        return model.hidden(window_batch(WINDOWS, budgets), WholeAttend(WINDOWS.shape[1]))


def tables_of(model: Decoder, fit: Fit, *counts: int) -> Tables:
    return fit_tables(measure_moments(model, WINDOWS, counts), fit, model.config.mixtures[0].trained + 1)


@pytest.mark.parametrize("fit", FITS)
def test_what_is_pure_scale_is_restored(fit: Fit) -> None:
    model = equal_experts()
    whole, small = hidden(model, 2), hidden(model, 1)
    tables = tables_of(model, fit, 1)
    assert (small - whole).abs().max() > 0.1
    assert tables.scale[:, 1].sub(2).abs().max() < 0.01
    assert (hidden(model, 1, tables) - whole).abs().max() < 0.01


def test_rows_of_other_counts_are_neutral() -> None:
    model = decoder(llama_like(topk(trained=3), topk(trained=3)))
    tables = tables_of(model, "moments", 2)
    assert tables.scale.shape == tables.shift.shape == (2, 4, model.config.width)
    for row in (0, 1, 3):
        assert bool((tables.scale[:, row] == 1).all() and (tables.shift[:, row] == 0).all())
    assert bool((tables.scale[:, 2] != 1).any())
    assert torch.equal(hidden(model, 3, tables), hidden(model, 3))


def test_moments_give_the_mean_and_spread_of_the_trained_count() -> None:
    """In the first layer, whose input is the same at every count."""
    model = decoder(llama_like(infinity(units=96)))
    tables = tables_of(model, "moments", 1)
    outputs: dict[int, list[Tensor]] = {1: [], 2: []}
    for count in outputs:

        def repair(layer: int, _: torch.nn.Module, __: tuple[Any, ...], y_TD: Tensor, count: int = count) -> None:
            outputs[count].append(y_TD * tables.scale[layer, count] + tables.shift[layer, count])

        with torch.inference_mode(), hooked(model, repair):
            model.hidden(window_batch(WINDOWS, [ExpertBudget((count,))] * len(WINDOWS)), WholeAttend(WINDOWS.shape[1]))
    small, whole = outputs[1][0], outputs[2][0]
    torch.testing.assert_close(small.mean(0), whole.mean(0), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(small.std(0), whole.std(0), atol=1e-4, rtol=1e-3)


def test_sums_of_parts_are_sums_of_the_whole() -> None:
    generator = torch.Generator().manual_seed(3)
    small, trained = torch.randn(2, 40, 5, generator=generator) * 3 + 50
    whole, parts = Moments(5), Moments(5)
    whole.add(small, trained)
    for part in range(0, 40, 8):
        parts.add(small[part : part + 8], trained[part : part + 8])
    for fit in FITS:
        torch.testing.assert_close(whole.solve(fit), parts.solve(fit))
    scale, shift = whole.solve("moments")
    torch.testing.assert_close((small * scale + shift).mean(0), trained.mean(0))
    torch.testing.assert_close((small * scale + shift).std(0), trained.std(0), atol=1e-3, rtol=1e-3)


def test_least_squares_ignores_what_says_nothing() -> None:
    generator = torch.Generator().manual_seed(4)
    small, trained = torch.randn(2, 20_000, 3, generator=generator)
    moments = Moments(3)
    moments.add(small, trained + 2)
    scale, shift = moments.solve("least squares")
    assert scale.abs().max() < 0.05 and (shift - 2).abs().max() < 0.05


def test_a_dimension_that_never_changes_is_only_shifted() -> None:
    moments = Moments(1)
    moments.add(torch.full((9, 1), 0.5), torch.full((9, 1), 0.75))
    for fit in FITS:
        scale, shift = moments.solve(fit)
        assert float(0.5 * scale + shift) == pytest.approx(0.75)
        assert scale.abs() <= 1


def test_a_row_may_be_taken_over_in_part() -> None:
    tables, other = Tables.neutral(1, 3, 1), Tables(torch.full((1, 3, 1), 3.0), torch.full((1, 3, 1), -4.0))
    tables.set_row(1, other, 0.5)
    tables.set_row(2, other)
    assert tables.scale.flatten().tolist() == [1, 2, 3] and tables.shift.flatten().tolist() == [0, -2, -4]
    tables.set_row(2, other, 0.0)
    assert tables.scale.flatten().tolist() == [1, 2, 1] and tables.shift.flatten().tolist() == [0, -2, 0]


def test_each_window_has_its_budget() -> None:
    rule = RoutingRule(normaliser="raw")
    batch = window_batch(torch.zeros(2, 3, dtype=torch.int64), [ExpertBudget((1, 2)), ExpertBudget((3, 3), rule=rule)])
    assert batch.budget.counts_LT.tolist() == [[1, 1, 1, 3, 3, 3], [2, 2, 2, 3, 3, 3]]
    assert batch.budget.pairs_L == (12, 15) and batch.budget.k_max == 3
    assert batch.budget.rule_T is not None
    assert [batch.budget.rules[number] for number in batch.budget.rule_T.tolist()] == [RoutingRule()] * 3 + [rule] * 3
    assert batch.positions_T.tolist() == [0, 1, 2, 0, 1, 2]
    assert window_batch(torch.zeros(1, 3, dtype=torch.int64), [ExpertBudget((1, 2))]).budget.rules == ()
