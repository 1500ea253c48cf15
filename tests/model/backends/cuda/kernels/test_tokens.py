"""Choosing tokens with kernels against plain torch: every cut, ties, masks, rows that are not finite, many chunks."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from model.backends.cuda.kernels import token_draws, tokens
from model.backends.cuda.sampling import CudaSampling
from model.backends.torch.device_sampling import TorchDeviceSampling
from model.sampling import Chosen, Draws, Edits, Masks, SamplingInputs

WIDTH = 75
CUTS = [  # temperature, top-k, top-p, min-p
    (1.0, WIDTH, 1.0, 0.0),
    (0.0, WIDTH, 1.0, 0.0),
    (0.7, 5, 1.0, 0.0),
    (1.3, WIDTH, 0.83, 0.0),
    (1.0, WIDTH, 1.0, 0.125),
    (2.5, 30, 0.7, 0.03125),
    (1e-30, WIDTH, 0.9, 0.0),
    (1e38, 40, 1.0, 0.0),
    (1.0, 1, 1.0, 0.0),
    (1.0, WIDTH, 1e-9, 1.0),
]
ROWS = len(CUTS)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch, poison: None) -> None:
    monkeypatch.setattr(tokens, "CHUNK", 32)
    monkeypatch.setattr(token_draws, "SCAN", 64)
    monkeypatch.setattr(token_draws, "LEVELS", 4)


def logits(seed: int, step: float = 0.0, rows: int = ROWS) -> Tensor:
    """Random logits; `step` rounds them, so that many are equal."""
    made = 3 * torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(seed))
    return (made / step).round() * step if step else made


def draws(u: float | None = None, seed: int = 0, cuts: bool = True) -> Draws:
    columns = torch.tensor(CUTS if cuts else [(*row[:1], WIDTH, 1.0, 0.0) for row in CUTS], dtype=torch.float64)
    u_R = torch.rand(ROWS, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return Draws(*columns.T.contiguous(), u_R if u is None else torch.full_like(u_R, u), cuts=cuts)


def random_masks(seed: int) -> Masks:
    """Two masks, the second of which allows two tokens only."""
    generator = torch.Generator().manual_seed(seed)
    words_MW = torch.randint(-(2**31), 2**31, (2, 3), generator=generator).int()
    words_MW[1] = torch.tensor([1 << 31, 0, 1 << 4]).int()
    return Masks(words_MW, torch.tensor([0, -1, 1] * ROWS)[:ROWS])


def assert_same(logits_RV: Tensor, inputs: SamplingInputs) -> Chosen:
    found, wanted = CudaSampling().choose(logits_RV, inputs), TorchDeviceSampling().choose(logits_RV, inputs)
    assert torch.equal(found.token_R, wanted.token_R)
    assert torch.equal(found.finite_R, wanted.finite_R)
    assert (found.excluded_R is None) == (wanted.excluded_R is None)
    if found.excluded_R is not None and wanted.excluded_R is not None:
        assert torch.equal(found.excluded_R, wanted.excluded_R)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("step", [0.0, 1.0])
def test_greedy(dtype: torch.dtype, step: float) -> None:
    assert_same(logits(1, step).to(dtype), SamplingInputs())


def test_rows_without_a_best_value() -> None:
    logits_RV = logits(2, rows=4)
    logits_RV[0, 70], logits_RV[1, 3], logits_RV[2] = torch.nan, torch.inf, -torch.inf
    found = assert_same(logits_RV, SamplingInputs())
    assert found.finite_R.tolist() == [False, False, False, True] and found.token_R[:3].tolist() == [0, 0, 0]


@pytest.mark.parametrize("cuts", [False, True])
def test_draws(cuts: bool) -> None:
    """Every other row has many equal values, among them zeros of both signs, of which none is above 0."""
    logits_RV = logits(3)
    logits_RV[::2] = -logits(4, 2.0).abs()[::2]
    assert_same(logits_RV, SamplingInputs(draws=draws(cuts=cuts)))


@pytest.mark.parametrize("u", [0.0, 1 - 2.0**-53])
def test_what_has_no_weight_is_never_drawn(u: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """With other sizes, and rows in groups."""
    monkeypatch.setattr(token_draws, "LEVELS", 16)
    monkeypatch.setattr(token_draws, "SCAN", 16)
    monkeypatch.setattr(token_draws, "GROUP", 2 * WIDTH)
    inputs = SamplingInputs(draws=draws(u).rows(slice(2, 5)))
    logits_RV = logits(5, rows=3)
    logits_RV[:, :20], logits_RV[:, 60:] = -900, -900
    found = assert_same(logits_RV, inputs)
    assert ((found.token_R >= 20) & (found.token_R < 60)).all()


def test_edits_and_masks() -> None:
    """Also where a grammar finds nothing left, and where edits make a value infinite."""
    logits_RV = logits(7)
    generator = torch.Generator().manual_seed(1)
    place_N = torch.randperm(ROWS * WIDTH, generator=generator)[:200]
    shift_N = torch.randn(200, generator=generator, dtype=torch.float64)
    shift_N[:60], shift_N[60] = -torch.inf, torch.inf
    edits = Edits(place_N // WIDTH, place_N % WIDTH, torch.full_like(shift_N, 1.5), shift_N)
    edits.row_N[-2:], edits.id_N[-2:], edits.shift_N[-2:] = 2, torch.tensor([31, 68]), -torch.inf
    inputs = SamplingInputs(edits, draws=draws(cuts=False))
    assert_same(logits_RV, inputs)
    assert_same(logits_RV, replace(inputs, allowed=random_masks(3)))
    both = replace(inputs, allowed=random_masks(3), grammar=random_masks(4))
    found = assert_same(logits_RV.half(), both)
    assert found.token_R[2] in (31, 68) and found.excluded_R is not None and found.excluded_R[2]


def test_a_row_depends_on_no_other() -> None:
    logits_RV, own_draws = logits(8, rows=3), draws().rows(slice(3, 6))
    together_R = CudaSampling().choose(logits_RV, SamplingInputs(draws=own_draws)).token_R
    alone = CudaSampling().choose(logits_RV[2:], SamplingInputs(draws=own_draws.rows(slice(2, 3))))
    assert alone.token_R[0] == together_R[2]
