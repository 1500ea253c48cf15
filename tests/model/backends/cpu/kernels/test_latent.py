"""Multi-head latent attention as a block: its values, and bits that depend neither on chunks nor on threads."""

from typing import Any

import pytest
import torch

from model.backends.cpu.kernels.pack import Kind
from tests.model.backends.cpu.kernels.cases import KINDS, Make, assert_close, ops
from tests.model.backends.cpu.kernels.latent_cases import latent_case

each_kind = pytest.mark.parametrize("kind", KINDS)
SIZES: list[dict[str, Any]] = [
    {},
    {"query_rank": 0, "heads": 5, "plain": 6, "bias": True},
    {"heads": 40, "rank": 64, "turned": 32, "values": 32, "block_size": 32, "bias": True},
]


@each_kind
@pytest.mark.parametrize("sizes", SIZES, ids=lambda sizes: "-".join(sizes) or "plain")
def test_values_and_bits(kind: Kind, sizes: dict[str, Any]) -> None:
    make = Make(len(sizes))
    case = latent_case(make, [1, 60, 17, 150], kind, **sizes)
    whole = case.run(case.layout.whole())
    # A key that was rounded to the other side is seen by all that come after it.
    assert_close(whole, case.expected(), kind != "float", most=1e-2, off=0.75)
    for threads, schedule in ((1, case.layout.chunks(make, 30)), (3, case.layout.singles())):
        ops.set_threads(threads)
        assert torch.equal(case.run(schedule), whole)


@pytest.mark.parametrize("kind", ["float", "bfloat16"])
def test_more_rows_than_one_piece(kind: Kind) -> None:
    """Several sequences, one of which is cut where a piece ends."""
    case = latent_case(Make(3), [100, 300, 7], kind)
    whole = case.run(case.layout.whole())
    assert_close(whole, case.expected(), kind != "float", most=1e-2, off=0.75)
    assert torch.equal(case.run(case.layout.chunks(Make(4), 280)), whole)


def test_a_sequence_that_is_not_finite_harms_no_other() -> None:
    case, theirs = latent_case(Make(1), [30, 40, 50], "bfloat16"), torch.arange(120)
    schedule = case.layout.chunks(Make(2), 9)
    clean = case.run(schedule)
    case.x_TD[30 + 25, 3] = torch.inf
    found, others = case.run(schedule), (theirs < 30) | (theirs >= 70)
    assert found[30 + 25].isnan().all()
    assert torch.equal(found[others], clean[others])
