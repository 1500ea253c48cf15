"""How unsure the model is of a token: the formulas in float64, and that only the model's own distribution counts."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from engine.sampling import uncertainty as module
from engine.sampling.uncertainty import uncertainty
from engine.types import Measure
from tests.engine.sampling.draws import LOGITS, one, sequence
from tests.engine.sampling.ops import sample
from tests.engine.sampling.test_sampler import logits_of


def by_definition(logits: torch.Tensor, by: Measure) -> list[float]:
    """-Σ p log p, or the difference of the two largest p, in float64."""
    logits_RV = logits.double().numpy()
    p_RV = np.exp(logits_RV - np.logaddexp.reduce(logits_RV, axis=1, keepdims=True))
    if by == "margin":
        best_RV = np.sort(p_RV)[:, ::-1]
        return list(best_RV[:, 0] - best_RV[:, 1])
    return list(-(p_RV * np.log(np.maximum(p_RV, 1e-300))).sum(-1))


@pytest.mark.parametrize("by", ["entropy", "margin"])
@pytest.mark.parametrize("width", [2, 300, 32_001])
def test_the_formulas(by: Measure, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "GROUP", 2 * width)
    rows = torch.cat([logits_of(5, width, seed=1), torch.zeros(1, width), torch.eye(1, width) * 90])
    assert uncertainty(rows, by).tolist() == pytest.approx(by_definition(rows, by), abs=2e-6)


def test_the_ends_of_the_scales() -> None:
    even, certain = torch.zeros(1, 64), torch.eye(1, 64) * 90
    assert float(uncertainty(even, "entropy")) == pytest.approx(np.log(64))
    assert float(uncertainty(even, "margin")) == 0
    assert float(uncertainty(certain, "entropy")) == pytest.approx(0)
    assert float(uncertainty(certain, "margin")) == pytest.approx(1)


@pytest.mark.parametrize("by", ["entropy", "margin"])
def test_settings_of_the_request_change_nothing(by: Measure) -> None:
    """The temperature, penalties and excluded tokens change what is chosen, not what the model holds likely."""
    plain = one(LOGITS, temperature=0, measured=by)
    changed = one(LOGITS, temperature=3.0, top_k=2, logit_bias=((5, -50.0),), bad_words=((5,),), measured=by)
    assert plain.measured == changed.measured == pytest.approx(by_definition(torch.tensor([LOGITS]), by)[0])
    assert plain.token == one(LOGITS, temperature=0).token


def test_each_row_gets_what_it_asks_for() -> None:
    rows = torch.tensor([LOGITS] * 4)
    rows[3, 0] = torch.nan
    sequences = [sequence(measured=by) for by in ("margin", None, "entropy", "entropy")]
    found = sample(rows, sequences)
    assert [each.measured for each in found] == [
        pytest.approx(by_definition(rows[:1], "margin")[0]),
        None,
        pytest.approx(by_definition(rows[:1], "entropy")[0]),
        None,
    ]


def test_accepted_drafts_have_their_own() -> None:
    rows = logits_of(3, 12, seed=3)
    greedy = sequence(temperature=0, measured="entropy")
    drafts = tuple(rows.argmax(-1).tolist())[:2]
    (found,) = sample(rows, [greedy], [drafts])
    values = [each.measured for each in (found, *found.after_drafts)]
    assert values == pytest.approx(by_definition(rows, "entropy"), abs=1e-6)


def test_greedy_rows_that_are_measured_are_not_plain() -> None:
    sampling = sequence(temperature=0).request.sampling
    assert sampling.plain_greedy and not replace(sampling, measured="margin").plain_greedy
