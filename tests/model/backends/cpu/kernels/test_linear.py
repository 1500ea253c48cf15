"""Linear layers, y = W norm(x) + bias, with each kind of weights."""

import pytest
import torch

from model.backends.cpu.kernels.pack import Kind, interleave, pack, quantise, unpack
from model.backends.cpu.kernels.reference import part_gates
from tests.model.backends.cpu.kernels.cases import KINDS, NORMS, Make, check, linear_case, ops

each_kind = pytest.mark.parametrize("kind", KINDS)
# Outputs and inputs: padded to 16 and 4; panels of 64 with and without a tail of 16, 32 or 48; many groups.
SHAPES = [(1, 1), (5, 7), (16, 4), (33, 18), (64, 64), (80, 30), (100, 129), (113, 52), (192, 24), (40, 1100)]


@each_kind
@pytest.mark.parametrize("n, k", SHAPES)
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 7])
def test_few_rows(kind: Kind, n: int, k: int, rows: int) -> None:
    check(linear_case(Make(n * k + rows), rows, n, k, kind))


@each_kind
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("bias", [False, True])
def test_norms_and_biases(kind: Kind, norm: str, bias: bool) -> None:
    for rows, n, k in [(1, 20, 37), (9, 70, 48), (50, 129, 66)]:
        check(linear_case(Make(rows), rows, n, k, kind, norm, bias))


@each_kind
@pytest.mark.parametrize("rows", [63, 64, 65, 95, 96, 97, 200, 800])
def test_many_rows(kind: Kind, rows: int) -> None:
    check(linear_case(Make(rows), rows, 70, 41, kind, "rms"))


@each_kind
@pytest.mark.parametrize("rows", [6, 7, 13, 100])
def test_rows_about_where_inputs_are_widened_once(kind: Kind, rows: int) -> None:
    """Some rows take another path from the seventh on, by chunks of inputs and by several panels of outputs."""
    check(linear_case(Make(rows), rows, 330, 1050, kind, "rms"))


@each_kind
def test_no_rows(kind: Kind) -> None:
    case = linear_case(Make(0), 3, 20, 8, kind)
    assert case.run(torch.arange(0)).shape == (0, 20)


@each_kind
def test_threads_change_nothing(kind: Kind) -> None:
    for rows, n in [(1, 1000), (3, 48), (250, 80)]:
        case, results = linear_case(Make(5), rows, n, 33, kind, "rms", True), []
        for threads in (1, 2, 3):
            ops.set_threads(threads)
            results.append(case.run(torch.arange(rows)))
        assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@each_kind
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_row_that_is_not_finite_harms_no_other(kind: Kind, bad: float) -> None:
    case = linear_case(Make(2), 20, 40, 50, kind, "layer")
    clean = case.run(torch.arange(20))
    case.x_TD[7, 49] = bad
    found, others = case.run(torch.arange(20)), torch.arange(20) != 7
    assert found[7].isnan().all()
    assert torch.equal(found[others], clean[others])


@each_kind
def test_zeros_stay_zero(kind: Kind) -> None:
    case = linear_case(Make(2), 4, 40, 50, kind)
    case.x_TD.zero_()
    assert not case.run(torch.arange(4)).any()


@each_kind
@pytest.mark.parametrize("experts, n, k", [(1, 1, 1), (3, 20, 10), (2, 64, 8), (2, 176, 30)])
def test_unpacking_gives_the_values_back(kind: Kind, experts: int, n: int, k: int) -> None:
    weight = Make(n).weight(experts, n, k)
    found = unpack(pack(weight, kind), experts)
    step = weight.abs().amax(-1, keepdim=True) / 127
    match kind:
        case "float":
            assert torch.equal(found, weight)
        case "bfloat16":
            assert torch.equal(found, weight.bfloat16().float())
        case "grouped":
            assert (found - weight).norm() <= 0.1 * weight.norm()
        case _:
            assert ((found - weight).abs() <= 0.5001 * step).all()


def test_the_largest_magnitude_of_an_output_is_127() -> None:
    weight = Make(1).weight(2, 16, 12)
    weight[1, 3] = 0
    values, side = quantise(weight)
    assert (values.abs().amax(-1).flatten() == 127).sum() == 31 and not values[1, 3].any()
    assert torch.equal(side[1].view(2, 16), values.sum(-1, dtype=torch.int32) * 128)


@pytest.mark.parametrize("units", [1, 16, 20, 32, 40, 64, 100])
def test_gates_and_ups_are_parted_again(units: int) -> None:
    gate_up = Make(units).normal(2 * units, 3)
    gates, ups = part_gates(interleave(gate_up).T)
    padded = -(-units // 16) * 16
    assert gates.shape == ups.shape == (3, padded)
    assert torch.equal(torch.cat([gates[:, :units], ups[:, :units]], dim=1).T, gate_up)
    assert not gates[:, units:].any() and not ups[:, units:].any()
