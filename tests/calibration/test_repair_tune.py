"""Tuned tables are nearer to the trained count than those they start from."""

import torch

from calibration.repair_fit import Tables
from calibration.repair_tune import tune
from tests.calibration.test_repair_fit import WINDOWS, equal_experts, hidden


def test_what_is_pure_scale_is_approached() -> None:
    model = equal_experts()
    start = Tables.neutral(2, 3, model.config.width)
    start.scale[:, 1] = 1.8
    tuned = tune(model, WINDOWS, 1, start)
    whole = hidden(model, 2)
    before = (hidden(model, 1, start) - whole).abs().mean()
    after = (hidden(model, 1, tuned) - whole).abs().mean()
    assert after < 0.5 * before
    assert bool((tuned.scale[:, 2] == 1).all() and (tuned.shift[:, 2] == 0).all())
    assert bool((start.scale[:, 1] == 1.8).all())
    assert not any(parameter.grad is not None for parameter in model.parameters())


def test_no_time_no_change() -> None:
    model = equal_experts()
    start = Tables.neutral(2, 3, model.config.width)
    assert torch.equal(tune(model, WINDOWS, 1, start, seconds=1e-9).scale, start.scale)
