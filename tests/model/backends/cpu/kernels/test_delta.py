"""Gated delta nets: their values, and bits that depend neither on the chunk nor on the other sequences."""

import pytest
import torch

from model.backends.cpu.kernels.pack import Kind
from model.shapes.attention import GatedDeltaNet
from tests.model.backends.cpu.kernels.cases import KINDS, Make, assert_close, ops
from tests.model.backends.cpu.kernels.delta_cases import DeltaCase, delta_case

SHAPES = {
    "shared": GatedDeltaNet(2, 4, 16, 32, 4),
    "one": GatedDeltaNet(1, 1, 48, 16, 1),
    "wide": GatedDeltaNet(1, 17, 16, 80, 2),
    "long": GatedDeltaNet(2, 2, 32, 64, 7),
}
each_shape = pytest.mark.parametrize("name", SHAPES)


@each_shape
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_bits(kind: Kind, name: str) -> None:
    """At once, in random chunks with random company, token by token, and on other numbers of threads."""
    make = Make(len(name))
    case = delta_case(make, [1, 30, 5, 14], SHAPES[name], kind)
    whole = case.run(case.layout.whole())
    # What was rounded to the other side is seen by all that comes after it.
    assert_close(whole, case.expected(), kind != "float", most=5e-2, exact=2e-5, off=0.9)
    for schedule in (case.layout.chunks(make, 9), case.layout.singles()):
        assert torch.equal(case.run(schedule), whole)
    for threads in (1, 3):
        ops.set_threads(threads)
        assert torch.equal(case.run(case.layout.whole()), whole)


def float_case() -> DeltaCase:
    return delta_case(Make(1), [9, 12, 7], SHAPES["shared"], "float")


def test_a_slot_is_used_again() -> None:
    """Whatever a sequence has left in it, also one that was stopped, or that is not finite."""
    case = float_case()
    whole, states = case.run(case.layout.whole()), case.states()
    case.run([[(0, 0, 5), (1, 0, 3), (2, 0, 1)]], states)
    assert torch.equal(case.run(case.layout.chunks(Make(2), 4), states), whole)


def test_a_sequence_that_is_not_finite_harms_no_other() -> None:
    case = float_case()
    schedule, others = case.layout.chunks(Make(2), 4), torch.arange(28)
    clean = case.run(schedule)
    case.x_TD[9 + 5] = torch.nan
    found, others = case.run(schedule), (others < 9) | (others >= 21)
    assert found[9 + 5 : 21].isnan().all() and torch.equal(found[others], clean[others])


def test_states_of_others_stay() -> None:
    case, states = float_case(), torch.full_like(float_case().states(), 7.0)
    case.run([[(1, 0, 12)]], states)
    touched = (states != 7.0).any(-1)
    assert touched.tolist() == [slot == case.slots[1] for slot in range(4)]


def test_no_rows() -> None:
    case, states = float_case(), float_case().states()
    case.run([[]], states)
    assert states.isnan().all()


@each_shape
def test_a_sequence_goes_on_from_a_snapshot(name: str) -> None:
    """Behind any row of a step, also one before this step has as many inputs as a convolution sees, with the bits of
    one that was never interrupted; the sequence that it was taken of has them as well, and nothing else is written."""
    case = delta_case(Make(3), [30, 5, 2], SHAPES[name], "float")
    whole, states, first = case.run(case.layout.whole()), case.states(4), 4
    at = [3, 17, 18, 30]
    steps = [[(0, 0, 2), (1, 0, 4)], [(0, 2, 30), (2, 0, 2), (1, 4, 5)]]
    taken = {1: [[0, after - 2, first + i] for i, after in enumerate(at)]}
    assert torch.equal(case.run(steps, states, taken), whole)
    assert states[[slot for slot in range(4) if slot not in case.slots]].isnan().all()
    for i, after in enumerate(at[:-1]):
        case.slots[0] = first + i
        assert torch.equal(case.run([[(0, after, 30)]], states)[after:30], whole[after:30])
    assert torch.equal(states[first], states[first + 3])
