"""Measures a demo model's held-out quality by the served forms of its mixtures. `benchmarks/demo_speed.py` times it.

Each figure is of one thing that a request can ask for: a count, or an offset or a bias at the trained count.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from model.backends.torch.attend import WholeAttend
from model.budget import RoutingRule
from model.decoder import Decoder
from model.encoder_decoder import decoder_of
from training.demos.recipes import Recipe
from training.demos.terms import Routing
from training.step import make_batch
from weights.config import decoder_config
from weights.load import load_model

PART = 16  # rows that are computed at a time


@dataclass(frozen=True)
class Asked:
    """What a request asks for, and how the weights of the experts that it keeps are restricted."""

    count: int
    field: str = ""
    value: float = 0.0
    restriction: str = ""  # "": as config.json says

    @property
    def rule(self) -> RoutingRule:
        """For a budget."""
        offset, bias = (self.value if self.field == name else 0.0 for name in ("gate_offset", "free_bias"))
        return RoutingRule(gate_offset=offset, free_bias=bias)

    def described(self) -> dict[str, Any]:
        """For card.json."""
        asked: dict[str, Any] = {"num_experts": self.count}
        if self.field:
            asked[self.field] = self.value
        return asked | ({"restriction": self.restriction} if self.restriction else {})


def asked_of(recipe: Recipe, trained: int) -> dict[str, list[Asked]]:
    """What is measured, by its list in card.json."""
    counts = [Asked(count) for count in recipe.counts]
    rules = [Asked(trained, recipe.field, value) for value in recipe.values]
    others = [Asked(count, restriction=other) for other in recipe.restrictions[1:] for count in recipe.counts]
    return {"quality": counts, "rules": rules, "restrictions": others}


def quality(folder: Path, asked: Sequence[Asked], text: tuple[Tensor, Tensor], bytes_per_token: float) -> list[Any]:
    """Of each: loss in nats per token, perplexity, bits per byte, the share of tokens that are the best guess, and the
    mean number of experts that ran."""
    model, raw = load_model(folder, "float32")
    found = []
    for one in asked:
        seen = model
        if one.restriction:
            seen = decoder_of(decoder_config(raw | {"restriction": one.restriction}))
            seen.load_state_dict(model.state_dict())
        loss, accuracy, mean = scored(seen, *text, one)
        figures = {"loss": loss, "perplexity": math.exp(loss), "bits_per_byte": loss / math.log(2) / bytes_per_token}
        figures |= {"accuracy": accuracy, "mean_experts": mean}
        found.append(one.described() | {name: round(value, 4) for name, value in figures.items()})
    return found


@torch.inference_mode()
def scored(model: Decoder, ids_BS: Tensor, target_BS: Tensor, asked: Asked) -> tuple[float, float, float]:
    """Loss, accuracy and mean experts over all rows."""
    losses, right, means, targets = 0.0, 0, [], 0
    for ids_bS, target_bS in zip(ids_BS.split(PART), target_BS.split(PART), strict=True):
        batch, routing = make_batch(ids_bS, [asked.count] * len(model.config.mixtures), 0), Routing()
        if asked.field:
            rule_T = torch.zeros(ids_bS.numel(), dtype=torch.int64)
            batch = replace(batch, budget=replace(batch.budget, rules=(asked.rule,), rule_T=rule_T))
        logits_TV = model(batch, WholeAttend(ids_bS.shape[1]), routing).float()
        target_T = target_bS.flatten()
        losses += float(F.cross_entropy(logits_TV, target_T, reduction="sum"))
        right += int((logits_TV.argmax(-1) == target_T).sum())
        targets += int((target_T >= 0).sum())
        means.append(routing.mean)
    return losses / targets, right / targets, sum(means) / len(means)
