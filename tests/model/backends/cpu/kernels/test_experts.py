"""Ragged experts and the dense layer, which is one expert that every row uses."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from model.backends.cpu.kernels.pack import Kind
from model.backends.cpu.kernels.params import ACTIVATIONS, UNGATED
from model.shapes.mixtures import Activation
from tests.model.backends.cpu.kernels.cases import (
    KINDS,
    NORMS,
    ExpertsCase,
    Make,
    check,
    chosen,
    experts_case,
    ffn_case,
    ops,
)

each_kind = pytest.mark.parametrize("kind", KINDS)
each_activation = pytest.mark.parametrize(
    "activation, gated",
    [(name, gated) for name in ACTIVATIONS for gated in (True, False) if gated or name in UNGATED],
)
WIDTHS = [(8, 16), (24, 12), (40, 33), (70, 64), (130, 100), (64, 1)]  # model width and expert width


@each_kind
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("width, units", WIDTHS)
def test_widths(kind: Kind, gated: bool, width: int, units: int) -> None:
    make = Make(width + units)
    check(experts_case(make, chosen(make, 11, 5), width, units, kind, gated=gated))


@each_kind
@each_activation
def test_activations(kind: Kind, activation: Activation, gated: bool) -> None:
    make = Make(3)
    case = experts_case(make, chosen(make, 20, 4), 30, 40, kind, gated=gated, activation=activation)
    case.x_TD[0] *= 30  # where each is flat or straight
    check(case)


@each_kind
@pytest.mark.parametrize("rows", [1, 95, 97, 300])
def test_numbers_of_rows(kind: Kind, rows: int) -> None:
    make = Make(rows)
    check(experts_case(make, chosen(make, rows, 3, 0.6), 20, 36, kind))


@each_kind
def test_experts_of_several_panels_and_chunks(kind: Kind) -> None:
    """Some have few pairs, some many: in the batch and where `check` runs single rows."""
    make = Make(7)
    check(experts_case(make, chosen(make, 30, 4, 0.4), 550, 300, kind))


@each_kind
def test_all_rows_on_one_expert_and_more_of_them_than_one_piece_of_work_takes(kind: Kind) -> None:
    chosen_TE = torch.zeros(801, 6, dtype=torch.bool)
    chosen_TE[:, 3] = True
    check(experts_case(Make(4), chosen_TE, 20, 16, kind))


@each_kind
def test_first_and_last_expert_empty_and_a_row_without_any(kind: Kind) -> None:
    make = Make(5)
    chosen_TE = chosen(make, 12, 8)
    chosen_TE[:, [0, 4, 7]], chosen_TE[5] = False, False
    case = experts_case(make, chosen_TE, 20, 16, kind)
    check(case)
    assert not case.run(torch.arange(12))[5].any()


@each_kind
@pytest.mark.parametrize("gated", [True, False])
def test_biases_of_experts(kind: Kind, gated: bool) -> None:
    """Those of the second product are weighted as the pairs are."""
    for width, units in ((8, 16), (24, 20), (70, 100)):
        make = Make(width)
        activation: Activation = "swiglu_clamped" if gated else "relu"
        case = experts_case(
            make, chosen(make, 11, 5), width, units, kind, gated=gated, activation=activation, bias=True
        )
        check(case)
        without = replace(case, layer=replace(case.layer, up_bias=None, down_bias=None))
        assert not torch.allclose(without.run(torch.arange(11)), case.run(torch.arange(11)), atol=0.1)


@each_kind
@pytest.mark.parametrize("rows", [0, 5])
def test_no_pairs(kind: Kind, rows: int) -> None:
    case = experts_case(Make(1), torch.zeros(rows, 4, dtype=torch.bool), 20, 16, kind)
    found = case.run(torch.arange(rows))
    assert found.shape == (rows, 20) and not found.any()


def at_threads(case: ExpertsCase, threads: int) -> Tensor:
    ops.set_threads(threads)
    return case.run(torch.arange(case.rows))


@each_kind
def test_threads_change_nothing(kind: Kind) -> None:
    for rows in (2, 120):
        make = Make(rows)
        case = experts_case(make, chosen(make, rows, 9), 70, 48, kind)
        one, two, three = (at_threads(case, threads) for threads in (1, 2, 3))
        assert torch.equal(one, two) and torch.equal(one, three)


@each_kind
def test_a_row_that_is_not_finite_harms_no_other(kind: Kind) -> None:
    make = Make(8)
    case = experts_case(make, chosen(make, 20, 3, 0.9), 40, 48, kind)
    clean, others = case.run(torch.arange(20)), torch.arange(20) != 7
    case.x_TD[7, 3] = torch.nan
    found = case.run(torch.arange(20))
    assert found[7].isnan().all()
    assert torch.equal(found[others], clean[others])


@each_kind
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("width, units", [(8, 16), (24, 20), (70, 100)])
def test_dense_layers(kind: Kind, gated: bool, bias: bool, width: int, units: int) -> None:
    for rows in (1, 5, 100):
        check(ffn_case(Make(rows), rows, width, units, kind, gated=gated, bias=bias))


@each_kind
@pytest.mark.parametrize("norm", NORMS)
def test_dense_layers_norm_first(kind: Kind, norm: str) -> None:
    check(ffn_case(Make(1), 9, 33, 48, kind, norm, activation="gelu_tanh", bias=True))


@each_kind
def test_dense_layers_more_rows_than_one_piece_of_work_takes(kind: Kind) -> None:
    check(ffn_case(Make(1), 801, 20, 16, kind))


@each_kind
def test_what_a_dense_layer_adds_is_scaled(kind: Kind) -> None:
    check(replace(ffn_case(Make(2), 9, 24, 20, kind, bias=True), residual_scale=0.22))


def test_a_dense_layer_without_rows() -> None:
    assert ffn_case(Make(1), 3, 20, 16, "float").run(torch.arange(0)).shape == (0, 20)
