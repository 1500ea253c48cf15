"""What is added to a loss, and how it is steered."""

import pytest
import torch

from model.moe.deep import DeepMixture
from tests.training.demos.small import small, tokens_and_targets
from training.demos import terms
from training.demos.fresh import fresh_model
from training.demos.loop import loss_of
from training.demos.recipes import BALANCE
from training.demos.terms import SIZE, Constraint, Routing, SteeredSparsity, StMoE, SwitchBalance, TwoPhases


def test_remoe_is_steered_to_the_wanted_count_and_goes_on_from_its_state() -> None:
    model = fresh_model(small("remoe-stories"), seed=1)
    term, routing = SteeredSparsity(model), Routing()
    with torch.no_grad():
        loss_of(model, *tokens_and_targets(model), 8, routing)
        assert routing.mean > terms.WANTED and float(term(routing)) > 0
    assert term.coefficient == pytest.approx(terms.FIRST * terms.STEER)
    other = SteeredSparsity(model)
    other.restore(term.state())
    assert other.coefficient == term.coefficient


def test_an_even_load_has_the_least_balance_loss() -> None:
    model, routing = fresh_model(small("switch-stories"), seed=1), Routing()
    routing.routed(0, 8, torch.tensor([4, 4]), torch.full((8, 2), 0.5))
    assert float(SwitchBalance(model)(routing)) == pytest.approx(BALANCE)
    routing.routed(1, 8, torch.tensor([8, 0]), torch.tensor([[1.0, 0.0]]).expand(8, -1))
    assert float(SwitchBalance(model)(routing)) == pytest.approx(1.5 * BALANCE)


def test_st_moe_adds_the_size_of_its_logits() -> None:
    model = fresh_model(small("st-moe-stories"), seed=1)
    term, routing = StMoE(model), Routing()
    term.begin(0.0)
    with torch.no_grad():
        loss_of(model, *tokens_and_targets(model), 2, routing)
    assert len(term.sizes) == 2
    added = float(term(routing)) - float(SwitchBalance(model)(routing))
    assert added == pytest.approx(SIZE * float(torch.stack(term.sizes).mean()), rel=1e-4)


def test_a_deep_mixture_is_constrained_in_the_first_phase_alone() -> None:
    model = fresh_model(small("deep-stories"), seed=1)
    term = TwoPhases(model)
    levels = [layer.ffn for layer in model.layers if isinstance(layer.ffn, DeepMixture)]
    term.begin(0.4)
    assert len(levels) == 2 and all(level.constraint is not None for level in levels)
    term.begin(0.5)
    assert all(level.constraint is None for level in levels)


def test_an_expert_far_above_the_mean_has_no_weight_until_the_others_follow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terms, "MARGIN", 2.0)
    constraint, logits_TE = Constraint(2), torch.tensor([[9.0, 0.0]]).expand(6, -1)
    weights = [constraint(logits_TE).softmax(-1)[0, 0].item() > 0.5 for _ in range(4)]
    assert weights == [True, False, True, False]
    kept_TE = Constraint(2)(logits_TE)
    assert torch.equal(kept_TE, logits_TE), "the sums are of one training"
