"""Tokens drawn by the kernels: those that numpy draws, and a row's whatever is beside it."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from model.backends.cpu.sampling import NativeSampling
from model.backends.torch.draw import draw
from model.sampling import PARAMETERS

OPS = NativeSampling()
LAST = 1 - 2.0**-53  # the highest random number
ROWS = 40
CUTS = [
    (0, 1.0, 0.0),
    (1, 1.0, 0.0),
    (50, 1.0, 0.0),
    (0, 0.95, 0.0),
    (0, 1e-9, 0.0),
    (700, 0.9, 0.0),
    (0, 1.0, 0.02),
    (0, 0.9999, 1e-7),
    (300, 0.97, 0.001),
]


def settings_of(
    rows: int, temperature: float, cut: tuple[int, float, float], width: int, last: float = LAST
) -> NDArray[np.void]:
    """Random numbers over [0, `last`], the same cuts for every row."""
    top_k, top_p, min_p = cut
    u_R = np.linspace(0, last, rows)
    return np.array([(temperature, min(top_k or width, width), top_p, min_p, u) for u in u_R], PARAMETERS)


def rows_of(kind: str, width: int) -> Tensor:
    made = torch.randn(ROWS, width, generator=torch.Generator().manual_seed(width))
    if kind == "peaked":
        return made - 1.7 * (torch.arange(width) + 1.0).log()
    return made / 8 if kind == "flat" else (made * 4).round() / 2


@pytest.mark.parametrize("kind", ["peaked", "flat", "equal"])
@pytest.mark.parametrize("width", [1, 130, 1000, 5003])
def test_tokens_are_those_that_numpy_draws(kind: str, width: int) -> None:
    """Sums in another order differ in their last bits, which decides one token in millions, and which one is last."""
    logits = rows_of(kind, width)
    logits[::3, width // 2 :] -= 900  # no weight at all
    logits[1::3, 1 : width // 3] = -torch.inf
    for cut in CUTS:
        for temperature in (1e-300, 0.7, 3.0):
            params, rows = settings_of(ROWS, temperature, cut, width, 0.99), np.arange(ROWS)
            ours, theirs = OPS.draw(logits, rows, params), draw(logits, rows, params)
            assert ours.tolist() == theirs.tolist(), (cut, temperature)


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_what_has_no_weight_is_never_drawn(data: st.DataObject) -> None:
    """At both ends of the random numbers, with tokens that are impossible or hopeless between the others."""
    value = st.sampled_from([-torch.inf, -900.0, 0.0, 1.0, 1.5])
    logits = torch.tensor([[*data.draw(st.lists(value, max_size=9)), 2.0, *data.draw(st.lists(value, max_size=200))]])
    cut = data.draw(st.integers(0, 300)), data.draw(st.floats(1e-9, 1)), data.draw(st.floats(0, 1))
    for params in (settings_of(2, data.draw(st.floats(0.01, 9)), cut, logits.shape[1])[i : i + 1] for i in (0, 1)):
        assert logits[0, OPS.draw(logits, np.array([0]), params)[0]] >= 0


@pytest.mark.parametrize("width", [33, 200])
def test_what_is_not_a_number_is_never_drawn(width: int) -> None:
    """It hides no higher logit that came before it in its lane of the vectors, whatever their length."""
    logits = rows_of("flat", width)
    logits[:, 0], logits[:, 16], logits[::2, width - 1] = 9.0, torch.nan, torch.nan
    numbers, rows = logits.nan_to_num(nan=-torch.inf), np.arange(ROWS)
    for cut in CUTS:
        params = settings_of(ROWS, 2.0, cut, width)
        assert OPS.draw(logits, rows, params).tolist() == OPS.draw(numbers, rows, params).tolist(), cut


@pytest.mark.parametrize("value", [-torch.inf, torch.inf, torch.nan])
def test_rows_without_a_finite_best_logit_end_no_process(value: float) -> None:
    """No caller draws from them; some token comes back."""
    logits = torch.full((ROWS, 21), -1.0)
    logits[:, :20] = value
    logits[1::2] = value
    for cut in CUTS:
        token_R = OPS.draw(logits, np.arange(ROWS), settings_of(ROWS, 0.7, cut, 21))
        assert ((token_R >= 0) & (token_R < 21)).all()


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    logits = rows_of("equal", 5003)
    params = np.concatenate([settings_of(ROWS, 0.9, cut, 5003)[i::9] for i, cut in enumerate(CUTS)])
    rows = np.random.default_rng(1).permutation(ROWS)
    together = OPS.draw(logits, rows, params)
    alone = [one(logits[row, None], params[i : i + 1]) for i, row in enumerate(rows)]
    assert together.tolist() == alone
    assert len(set(alone)) > 10


def one(logits: Tensor, params: NDArray[np.void]) -> Any:
    return OPS.draw(logits.clone(), np.array([0]), params)[0]


def test_no_rows() -> None:
    none = np.array([], np.int64)
    assert OPS.draw(torch.zeros(1, 4), none, np.array([], PARAMETERS)).tolist() == []
