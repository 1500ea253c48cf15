"""Forms for training: what they compute is what the served forms compute, and gradients reach every parameter."""

from typing import Any

import pytest
import torch

from model.decoder import Decoder
from model.encoder_decoder import decoder_of
from model.moe.mu_moe import entmax15
from tests.training.demos.small import small, small_base, tokens_and_targets
from training.demos.fresh import Entmax, begin_from, fresh_model
from training.demos.loop import loss_of
from training.demos.recipes import RECIPES
from training.demos.terms import Routing
from weights.config import decoder_config

each = pytest.mark.parametrize("name", RECIPES)


def served(raw: dict[str, Any], model: Decoder) -> Decoder:
    plain = decoder_of(decoder_config(raw))
    plain.load_state_dict(model.state_dict())
    return plain


@each
def test_the_form_for_training_gives_what_is_served(name: str) -> None:
    raw = small(name)
    model = fresh_model(raw, seed=1)
    trained = model.config.experts.trained
    routings = Routing(), Routing()
    losses = [
        loss_of(one, *tokens_and_targets(model), trained, routing)
        for one, routing in zip((model, served(raw, model)), routings, strict=True)
    ]
    assert torch.allclose(losses[0], losses[1], rtol=1e-5)
    assert routings[0].mean == routings[1].mean > 0


@each
def test_gradients_reach_every_parameter(name: str) -> None:
    model = fresh_model(small(name), seed=1)
    loss_of(model, *tokens_and_targets(model), model.config.experts.trained, None).backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), parameter_name
        assert parameter.grad.any() or "bias" in parameter_name, parameter_name


def test_a_decoder_takes_over_all_but_its_mixtures() -> None:
    base, model = fresh_model(small_base(), seed=2), fresh_model(small("mu-stories"), seed=1)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    begin_from(model, base)
    theirs = dict(base.named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name] if ".ffn." in name else theirs[name]), name
    assert not torch.equal(model.embed.weight, before["embed.weight"])


def test_entmax_has_the_gradient_of_its_formula() -> None:
    """By differences, in float64, away from the edge of the support."""
    logits_TE = torch.randn(6, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64).requires_grad_()
    assert torch.equal(Entmax.apply(logits_TE), entmax15(logits_TE))
    assert torch.autograd.gradcheck(Entmax.apply, (logits_TE,), eps=1e-7, atol=1e-5)
