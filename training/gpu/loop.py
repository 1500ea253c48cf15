"""The training loop of the fast network: windows in the order of an epoch, the loss of a step, and the pace of a run.

It depends on windows of token ids, not on text or files.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from training.gpu.kernels import Layout
from training.gpu.network import Network, TopK
from training.gpu.optimiser import Optimiser
from training.gpu.plan import Plan, draw_counts, schedule

Report = Callable[[str], None]
MEASURED = (10, 40)  # a run of so many seconds times the steps between these


class Windows:
    """Windows of `length` + 1 tokens on the device; an epoch has every one once, in an order of the seed.

    Where the rows of a step do not divide the windows, an epoch leaves out the last few of its order.
    """

    def __init__(self, tokens: NDArray[np.uint16], length: int, seed: int, device: torch.device) -> None:
        self.tokens = torch.from_numpy(tokens.astype(np.int16)).to(device)  # ids below 32,768
        self.generator = np.random.default_rng(seed)
        self.length = length
        self.count = (len(tokens) - 1) // length
        self.device = device
        self.shuffle()

    def shuffle(self) -> None:
        """Start an epoch; its order lies on the device, so that no step waits for a copy."""
        self.order = torch.from_numpy(self.generator.permutation(self.count)).to(self.device)
        self.place = 0

    def __call__(self, rows: int) -> Tensor:
        """[rows, length + 1] token ids."""
        if rows > self.count:
            raise ValueError(
                f"a step of {rows} windows needs as many of {self.length} tokens, the text has {self.count}"
            )
        if self.place + rows > self.count:
            self.shuffle()
        chosen = self.order[self.place : self.place + rows]
        self.place += rows
        steps = torch.arange(self.length + 1, device=self.device)
        return self.tokens[chosen[:, None] * self.length + steps].long()


def cross_entropy(net: Network, ids_NS: Tensor, target_NS: Tensor, layout: Layout) -> Tensor:
    """Mean loss in nats, in four parts so that the logits stay small."""
    x_TD = net.hidden(ids_NS, layout)[0].flatten(0, 1)
    total = x_TD.new_zeros(())
    for x_tD, target_t in zip(x_TD.chunk(4), target_NS.flatten().chunk(4), strict=True):
        total = total + F.cross_entropy(F.linear(x_tD, net.embed).float(), target_t, reduction="sum")
    return total / target_NS.numel()


def distilled(net: Network, window_NS: Tensor, both: Layout, weight: float) -> tuple[Tensor, Tensor]:
    """Loss to train by and loss to show, where every text stands twice: at the largest count and at a drawn one."""
    half = len(window_NS)
    ids_NS = torch.cat([window_NS[:, :-1]] * 2)
    logits_NSV = net.logits(ids_NS, both)
    target_T = window_NS[:, 1:].flatten()
    large = F.cross_entropy(logits_NSV[:half].flatten(0, 1).float(), target_T)
    small_TV = logits_NSV[half:].flatten(0, 1).float()
    small = F.cross_entropy(small_TV, target_T)
    teacher_TV = logits_NSV[:half].detach().flatten(0, 1).float().log_softmax(-1)
    divergence = F.kl_div(small_TV.log_softmax(-1), teacher_TV, log_target=True, reduction="batchmean")
    second = (1 - weight) * small + weight * divergence
    return 0.5 * large + 0.5 * second, 0.5 * (large + small)


class Trainer:
    """One run: what is trained, on what, how far it has come. `plan.steps` changes where a run has a time limit."""

    def __init__(self, net: Network, windows: Windows, plan: Plan, report: Report) -> None:
        self.net, self.windows, self.plan, self.report = net, windows, plan, report
        self.optimiser = Optimiser(net, plan)
        self.rows = plan.rows // 2 if plan.distil else plan.rows
        counts = draw_counts(plan.counts, self.rows, net.shape.largest)
        if plan.distil:
            counts = [net.shape.largest] * self.rows + counts
        self.layout = Layout.of(counts, plan.length, net.embed.device)
        self.routers = [block.ffn for block in net.stack() if isinstance(block.ffn, TopK)]
        self.curve: list[tuple[int, float]] = []
        self.done = 0  # steps
        self.began = self.measured = time.monotonic()

    def step(self) -> Tensor:
        """Train on one batch; returns its loss."""
        window_NS = self.windows(self.rows)
        with torch.autocast(self.net.embed.device.type, torch.bfloat16):
            if self.plan.distil:
                loss, shown = distilled(self.net, window_NS, self.layout, self.plan.distil)
            else:
                target_NS = window_NS[:, 1:]
                loss = shown = cross_entropy(self.net, window_NS[:, :-1], target_NS, self.layout)
        for router in self.routers:
            loss = loss + self.plan.balance / len(self.routers) * router.balance
        loss.backward()
        self.optimiser.step(schedule(self.plan, self.done))
        self.done += 1
        return shown.detach()

    def set_pace(self, seconds: float) -> None:
        """Once the first steps are measured, plan as many as fit into `seconds` since the start."""
        first, last = MEASURED
        if self.done not in MEASURED:
            return
        if self.net.embed.is_cuda:
            torch.cuda.synchronize()
        now = time.monotonic()
        if self.done == first:
            self.measured = now
            return
        each = (now - self.measured) / (last - first)
        steps = int((seconds - (now - self.began)) / each) + self.done
        self.plan = replace(self.plan, steps=steps)
        speed = self.plan.rows * self.plan.length / each / 1e6
        self.report(f"{each * 1e3:.1f} ms per step, {speed:.2f} M tokens/s, {steps} steps")

    def log(self, loss: Tensor) -> None:
        """Note every 50th loss and the last, report every 200th. Reading it waits for the device."""
        ends = self.done == self.plan.steps
        if self.done % 50 and not ends:
            return
        value = float(loss)
        self.curve.append((self.done, round(value, 4)))
        if self.done % 200 == 0 or ends:
            seconds = time.monotonic() - self.began
            self.report(f"step {self.done} loss {value:.4f} after {seconds:.1f} s")

    def run(self, seconds: float) -> dict[str, Any]:
        """Train to the end of the plan; what the run took."""
        while self.done < self.plan.steps:
            loss = self.step()
            if seconds:
                self.set_pace(seconds)
            self.log(loss)
        spent = round(time.monotonic() - self.began, 1)
        tokens = self.done * self.rows * self.plan.length
        taken = {"steps": self.done, "seconds": spent, "tokens": tokens}
        return taken | {"curve": self.curve, "plan_steps": self.plan.steps}


def train(net: Network, windows: Windows, plan: Plan, report: Report, seconds: float = 0.0) -> dict[str, Any]:
    """Train for `plan.steps`, or, where `seconds` is given, for as many steps as fit, measured over the first ones."""
    return Trainer(net, windows, plan, report).run(seconds)
