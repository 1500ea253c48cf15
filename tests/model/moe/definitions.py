"""Soft and deep mixtures of one whole text in float64, token by token as their papers define them.

Nothing of the code under test is used but its parameters.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.step import LayerStep


class Definition(nn.Module):
    """Takes the place of a module in a decoder of one sequence; `served` is what it has the parameters of."""

    def __init__(self, served: Any) -> None:
        super().__init__()
        self.shape = served.shape
        self.p = {name: parameter.double() for name, parameter in served.named_parameters()}

    def forward(self, x_TD: Tensor, step: LayerStep) -> Tensor:
        return self.of(x_TD.double(), step.budget.counts_T.tolist()).to(x_TD.dtype)

    def of(self, x_TD: Tensor, counts: list[int]) -> Tensor:
        raise NotImplementedError


def assert_near(found: Tensor, expected: Tensor) -> None:
    """Float32 and its definition in float64."""
    torch.testing.assert_close(found.double(), expected.double(), atol=5e-5, rtol=1e-4)


def best(weights: Tensor, count: int) -> list[int]:
    return sorted(range(len(weights)), key=lambda e: (-float(weights[e]), e))[:count]


def restricted(weights: Tensor, kept: list[int], restriction: str) -> Tensor:
    """Zero but of those that are kept; of these as they are, or over their sum."""
    mask = torch.zeros_like(weights)
    mask[kept] = 1
    return weights * mask if restriction == "drop" else weights * mask / (weights * mask).sum()


def cosine(x: Tensor, y: Tensor) -> Tensor:
    """With 1e-6 added to the squared lengths."""
    return x @ y / ((x @ x + 1e-6) * (y @ y + 1e-6)).sqrt()


def mlp(x: Tensor, up: Tensor, down: Tensor, activation: str, gated: bool) -> Tensor:
    activations: dict[str, Any] = {"silu": F.silu, "gelu": F.gelu, "relu": F.relu}
    act = activations[activation]
    if not gated:
        return down @ act(up @ x)
    gate, value = (up @ x).chunk(2)
    return down @ (act(gate) * value)


class SoftDefinition(Definition):
    def of(self, x_TD: Tensor, counts: list[int]) -> Tensor:
        s, p = self.shape, self.p
        logits_TS = torch.stack([torch.stack([p["scale"][0] * cosine(x, slot) for slot in p["slots"]]) for x in x_TD])
        power_TS = logits_TS.exp()
        dispatch, combine = power_TS / power_TS.sum(0), power_TS / power_TS.sum(1)[:, None]
        own = [list(range(e * s.slots, (e + 1) * s.slots)) for e in range(s.experts)]
        mass_E = torch.stack([combine[:, slots].sum() for slots in own])
        made = []
        for slot in range(s.experts * s.slots):
            mixed = torch.stack([dispatch[t, slot] * x for t, x in enumerate(x_TD)]).sum(0)
            expert = slot // s.slots
            made.append(mlp(mixed, p["up"][expert], p["down"][expert], s.activation, s.gated))
        rows = []
        for t, count in enumerate(counts):
            kept = [slot for e in best(mass_E, count) for slot in own[e]]
            weight_S = restricted(combine[t], kept, s.restriction)
            rows.append(torch.stack([weight_S[slot] * made[slot] for slot in kept]).sum(0))
        return torch.stack(rows)


class SegmentsDefinition(Definition):
    def of(self, x_TD: Tensor, counts: list[int]) -> Tensor:
        s, p, rows = self.shape, self.p, []
        for t, count in enumerate(counts):
            start = t // s.segment * s.segment
            read = x_TD[start - s.segment : start].mean(0) if start else x_TD[0]
            logits = torch.stack([p["scale"][0] * cosine(read, w) for w in p["router"]])
            kept = best(logits, count)
            how = "renormalise" if s.topk.router.normalise else "drop"
            weights = restricted(logits.softmax(0), kept, how)
            up, down = p["gate_up"], p["down"]
            parts = [weights[e] * mlp(x_TD[t], up[e], down[e], s.topk.activation, s.topk.gated) for e in kept]
            rows.append(torch.stack(parts).sum(0))
        return torch.stack(rows)


class DeepDefinition(Definition):
    def of(self, x_TD: Tensor, counts: list[int]) -> Tensor:
        s, p, rows = self.shape, self.p, []

        def bias(name: str) -> Any:
            return p[name] if s.bias else 0

        for x, count in zip(x_TD, counts, strict=True):
            hidden = (p["gate_hidden.weight"] @ x + bias("gate_hidden.bias")).relu()
            weights = (p["gate.weight"] @ hidden + bias("gate.bias")).softmax(0)
            kept = best(weights, count)
            weights = restricted(weights, kept, s.restriction)
            made = [weights[e] * (p["experts"][e] @ x + (p["expert_bias"][e] if s.bias else 0)).relu() for e in kept]
            rows.append(p["out.weight"] @ torch.stack(made).sum(0) + bias("out.bias"))
        return torch.stack(rows)
