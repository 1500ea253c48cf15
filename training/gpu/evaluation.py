"""Measures of a trained network: held-out loss at each count, the share of blocks used, and the spread of its draws.

It depends on windows of token ids, not on text or files.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from training.gpu.kernels import Layout
from training.gpu.network import Infinity, Network


@torch.no_grad()
def evaluate(net: Network, window_NS: Tensor, counts: Sequence[int], rows: int = 64) -> list[dict[str, Any]]:
    """Held-out loss in nats, share of blocks used and how evenly, for each count."""
    net.eval()
    found = [_measure(net, window_NS, count, rows) for count in counts]
    net.train()
    return found


def _measure(net: Network, window_NS: Tensor, count: int, rows: int) -> dict[str, Any]:
    total = used = 0.0
    loads = []
    for part_NS in window_NS.split(rows):
        loss, load_LB = _part(net, part_NS, count)
        total += loss
        if load_LB is not None:
            used += float(load_LB.mean()) * len(part_NS)
            loads.append(load_LB * len(part_NS))
    row = {"K": count, "loss": round(total / window_NS[:, 1:].numel(), 4)}
    if loads:
        evenness = _evenness(torch.stack(loads).sum(0))
        row |= {"used": round(used / len(window_NS), 4), "evenness": round(evenness, 3)}
    return row


def _part(net: Network, part_NS: Tensor, count: int) -> tuple[float, Tensor | None]:
    """Summed loss of some windows, and the share of their tokens that use each block [L, B], if there are any."""
    rows, length = part_NS.shape
    layout = Layout.of([count] * rows, length - 1, part_NS.device)
    with torch.autocast(part_NS.device.type, torch.bfloat16):
        x_NSD, masks = net.hidden(part_NS[:, :-1], layout)
        logits_TV = F.linear(x_NSD, net.embed).float().flatten(0, 1)
    loss = float(F.cross_entropy(logits_TV, part_NS[:, 1:].flatten(), reduction="sum"))
    loads = [(mask_TB != 0).float().mean(0) for mask_TB in masks if mask_TB is not None]
    return loss, torch.stack(loads) if loads else None


def _evenness(load_LB: Tensor) -> float:
    """Entropy of how often each block is used, as a share of the largest possible; the mean of all layers."""
    share_LB = load_LB / load_LB.sum(-1, keepdim=True)
    entropy_L = -(share_LB * (share_LB + 1e-9).log()).sum(-1)
    return float(entropy_L.mean()) / math.log(load_LB.shape[-1])


@torch.no_grad()
def spreads(net: Network, window_NS: Tensor) -> list[float]:
    """Per layer the mean learned σ over the spread of the means, for networks that draw."""
    found: list[float] = []

    def look(module: Infinity, given: tuple[Tensor, Layout]) -> None:
        routed_TX = F.linear(given[0], module.router).float()
        mean_TZ, log_TZ = routed_TX.chunk(2, dim=-1)
        found.append(round(float(log_TZ.exp().mean() / mean_TZ.std()), 3))

    drawing = [block.ffn for block in net.stack() if isinstance(block.ffn, Infinity)]
    hooks = [ffn.register_forward_pre_hook(look) for ffn in drawing]
    rows, length = window_NS.shape
    layout = Layout.of([1] * rows, length - 1, window_NS.device)
    with torch.autocast(window_NS.device.type, torch.bfloat16):
        net.hidden(window_NS[:, :-1], layout)
    for hook in hooks:
        hook.remove()
    return found
