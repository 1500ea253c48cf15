"""Every family with every routing rule: what it cannot do is refused by name, what it can do holds in a mixed batch."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from model.backends.torch.attend import WholeAttend
from model.budget import FAMILY_RULE, RoutingRule
from model.decoder import Decoder, Layer
from model.errors import InvalidRequest
from model.moe.repair import RepairTables
from model.shapes.mixtures import TopK
from model.step import Observer
from tests.families import reference
from tests.families.test_parity import each, loaded
from tests.model.tiny import whole_batch

RULES = {
    "normaliser": RoutingRule("raw"),
    "threshold": RoutingRule(threshold=1.0),
    "top_p": RoutingRule(top_p=1e-6),
    "reuse": RoutingRule(reuse=1),
    "skip": RoutingRule(skip=1),
    "repair": RoutingRule(repair=True),
}
NO_OTHER_RULE = {"phimoe", "llama4", "llama4_text"}  # a sparse mixer; routers that weigh what experts read


class Seen(Observer):
    """Keeps what it was told, as sums over the layers."""

    def __init__(self) -> None:
        self.pairs, self.loads, self.told_used, self.told_routes = 0, 0, 0, 0

    def routed(self, layer: int, pairs: int, load_E: Tensor, scores_TE: Tensor | None) -> None:
        self.pairs, self.loads = self.pairs + pairs, self.loads + int(load_E.sum())

    def used(self, layer: int, used_T: Tensor) -> None:
        self.told_used += int(used_T.sum())

    def routes(self, layer: int, expert_TK: Tensor) -> None:
        self.told_routes += int((expert_TK >= 0).sum())


@each
def test_a_family_takes_or_refuses_each_rule_by_name(family: str, number: int, tmp_path: Path) -> None:
    model = with_tables(loaded(family, number, tmp_path))
    experts = model.config.experts
    for field, rule in RULES.items():
        if not experts.layers or (family in NO_OTHER_RULE and field != "repair"):
            with pytest.raises(InvalidRequest, match=rf"experts\.{field} ") as error:
                experts.check_rule(rule, "experts")
            assert error.value.param == f"experts.{field}"
            continue
        experts.check_rule(rule, "experts")
        if rule.skip:
            check_skipped(model, rule)
        else:
            check_in_a_mixed_batch(model, rule)
    if experts.layers:
        fixed = replace(model.config, extrapolates=False).experts
        assert bool(fixed.rule_refusal) == (family in NO_OTHER_RULE)


def with_tables(model: Decoder) -> Decoder:
    """Statistics that double every count below the trained one."""
    trained = model.config.experts.trained
    for layer, shape in zip(model.layers, model.config.feed_forward, strict=True):
        if shape.num_experts:
            assert isinstance(layer, Layer)
            scale_KD = torch.full((shape.maximum + 1, model.config.width), 2.0)
            scale_KD[trained:] = 1.0
            layer.repair = RepairTables(scale_KD, torch.zeros_like(scale_KD))
    model.config = replace(model.config, repaired=(1,))
    return model


def check_in_a_mixed_batch(model: Decoder, rule: RoutingRule) -> None:
    """The first token has the family's rule. At the trained count only rules of how many experts run change anything;
    the best expert alone is the count of one."""
    trained = model.config.experts.trained
    seen = Seen()
    plain, ruled = logits(model, trained), logits(model, trained, rule, seen)
    torch.testing.assert_close(plain[0], ruled[0], atol=1e-4, rtol=0)
    assert ruled.isfinite().all()
    assert seen.pairs == seen.loads == seen.told_routes
    assert seen.told_used == (seen.pairs if rule.adaptive else 0)
    if not rule.adaptive:
        assert torch.equal(plain, ruled)
    elif not rule.reuse:
        tokens, layers = len(reference.PROMPT), len(model.config.mixtures)
        least = layers * (tokens - 1 + trained)
        assert seen.pairs == least or (rule.threshold and biased(model) and seen.pairs < layers * tokens * trained)


def check_skipped(model: Decoder, rule: RoutingRule) -> None:
    """A token runs as many experts, but others."""
    seen = Seen()
    plain, skipped = logits(model, 1), logits(model, 1, rule, seen)
    torch.testing.assert_close(plain[0], skipped[0], atol=1e-4, rtol=0)
    assert skipped.isfinite().all() and not torch.allclose(plain[-1], skipped[-1])
    assert seen.pairs == seen.loads == seen.told_routes == len(reference.PROMPT) * len(model.config.mixtures)


def biased(model: Decoder) -> bool:
    """Whether the expert that is chosen first need not have the highest score."""
    return any(isinstance(shape, TopK) and shape.router.selection_bias for shape in model.config.mixtures)


def logits(model: Decoder, count: int, rule: RoutingRule = FAMILY_RULE, seen: Observer | None = None) -> Tensor:
    """Of one prompt, whose first token has the family's rule."""
    batch = whole_batch(reference.PROMPT, [count] * len(model.config.mixtures))
    rule_T = torch.ones(len(reference.PROMPT), dtype=torch.int64)
    rule_T[0] = 0
    budget = replace(batch.budget, rules=(FAMILY_RULE, rule), rule_T=rule_T)
    result: Tensor = model(replace(batch, budget=budget, routes=True), WholeAttend(len(reference.PROMPT)), seen)
    return result
