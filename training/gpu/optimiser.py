"""Muon for hidden matrices, AdamW for embeddings and everything that routes, on a `training.gpu.network.Network`.

It depends on the names of parameters, not on what they compute.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from training.gpu.network import Network, Shape
from training.gpu.plan import Plan
from training.optimiser import orthogonalise

ROUTES = ("router", "scores", "points")
View = tuple[int, int]  # how many matrices lie along a parameter's rows and columns


def _routes(name: str) -> bool:
    return any(word in name for word in ROUTES)


def cut(stacked_GXY: Tensor, view: View) -> Tensor:
    """The matrices [G, rows, columns, x, y] of which each of G parameters [X, Y] is made."""
    rows, columns = view
    return stacked_GXY.unflatten(2, (columns, -1)).unflatten(1, (rows, -1)).transpose(2, 3)


def join(matrices: Tensor) -> Tensor:
    """The inverse of `cut`: [G, X, Y]."""
    return matrices.transpose(2, 3).flatten(3, 4).flatten(1, 2)


class Muon:
    """Muon over groups of equally shaped matrices, orthogonalised together; `views` give each parameter's matrices."""

    def __init__(self, parameters: Sequence[nn.Parameter], views: Sequence[View], decay: float) -> None:
        self.decay = decay
        groups: dict[tuple[int, ...], list[nn.Parameter]] = {}
        for parameter, view in zip(parameters, views, strict=True):
            groups.setdefault((*parameter.shape, *view), []).append(parameter)
        self.groups = list(groups.values())
        self.views = [(rows, columns) for *_, rows, columns in groups]
        self.momentum = [torch.stack(list(map(torch.zeros_like, group))) for group in self.groups]

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Move every parameter against its gradient's orthogonalised momentum."""
        kept = 1 - lr * self.decay
        for group, view, momentum in zip(self.groups, self.views, self.momentum, strict=True):
            change, scale = self._change(group, view, momentum)
            for parameter, each in zip(group, change, strict=True):
                parameter.mul_(kept).add_(each, alpha=-lr * scale)

    def _change(self, group: list[nn.Parameter], view: View, momentum: Tensor) -> tuple[Tensor, float]:
        """Direction [G, X, Y] of a step, and the factor for matrices that are taller than wide."""
        grad = torch.stack([p.grad for p in group if p.grad is not None])
        momentum.lerp_(grad, 0.05)
        update = grad.lerp_(momentum, 0.95)
        turned = orthogonalise(cut(update, view).contiguous())
        rows, columns = turned.shape[-2:]
        return join(turned), max(1.0, rows / columns) ** 0.5


class Optimiser:
    """Muon on hidden matrices, AdamW on the embedding and, at a rate of its own, on everything that routes."""

    def __init__(self, net: Network, plan: Plan) -> None:
        named = {name: p for name, p in net.named_parameters() if p.requires_grad}
        embedding = [p for name, p in named.items() if "embed" in name]
        routes = [p for name, p in named.items() if _routes(name)]
        small = {id(p) for p in embedding + routes}
        matrices = {name: p for name, p in named.items() if id(p) not in small}
        views = [view_of(net.shape, plan, name) for name in matrices]
        self.plan = plan
        self.parameters = list(named.values())
        self.muon = Muon(list(matrices.values()), views, plan.decay)
        groups: list[dict[str, Any]] = [{"params": embedding, "base": plan.adam_lr}]
        if routes:
            groups.append({"params": routes, "base": plan.route_lr})
        fused = net.embed.is_cuda
        self.adam = torch.optim.AdamW(groups, lr=plan.adam_lr, betas=(0.9, 0.98), weight_decay=0.0, fused=fused)

    def step(self, factor: float) -> None:
        """Clip the gradients, move all parameters at `factor` times the plan's rates, and drop the gradients."""
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0, foreach=True)
        self.muon.step(self.plan.muon_lr * factor)
        for group in self.adam.param_groups:
            group["lr"] = group["base"] * factor
        self.adam.step()
        for parameter in self.parameters:
            parameter.grad = None


def view_of(shape: Shape, plan: Plan, name: str) -> View:
    """How many matrices lie along the rows and columns of the parameter of this name."""
    if "ffn" not in name or shape.kind == "dense" or not plan.by_block:
        return (1, 1)
    if name.endswith("down"):
        return (1, shape.blocks)
    return (2 * shape.blocks if shape.kind == "topk" else shape.blocks, 1)
