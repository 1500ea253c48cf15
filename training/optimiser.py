"""Optimisers for small mixtures: Muon for matrices (stacked experts included), AdamW for the rest.

Muon: momentum orthogonalised by a Newton–Schulz iteration (Jordan et al. 2024), scaled by sqrt(max(1, rows/cols)).
torch's own Muon takes 2-D parameters only; stacked experts [E, F, D] are E matrices. It depends on the names of
parameters, not on a model.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalise(matrix: Tensor, steps: int = 5, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """The nearest semi-orthogonal matrix to each [..., M, N], roughly: singular values end in about 0.7 to 1.2."""
    a, b, c = _COEFFICIENTS
    x = matrix.to(dtype)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        mix = b * gram + c * gram @ gram
        x = a * x + mix @ x
    return (x.mT if tall else x).to(matrix.dtype)


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised in `dtype`, with decoupled weight decay."""

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float,
        momentum: float = 0.95,
        decay: float = 0.0,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "decay": decay})
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # no caller has a closure
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)

    def _update(self, parameter: nn.Parameter, grad: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        momentum = state["momentum"]
        momentum.lerp_(grad, 1 - group["momentum"])
        update = orthogonalise(grad.lerp(momentum, group["momentum"]), dtype=self.dtype)
        scale = max(1.0, parameter.shape[-2] / parameter.shape[-1]) ** 0.5
        parameter.mul_(1 - group["lr"] * group["decay"])
        parameter.add_(update, alpha=-group["lr"] * scale)


def _routes(name: str) -> bool:
    """Whether AdamW has the parameter, also where it is a matrix."""
    return any(word in name for word in ("embed", "head", "norm", "router", "scores"))


def build_optimisers(model: nn.Module, muon_lr: float, adam_lr: float, decay: float) -> list[torch.optim.Optimizer]:
    """Muon on every hidden matrix; AdamW on embeddings, head, norms and everything that routes."""
    named = dict(model.named_parameters())
    hidden = (p for name, p in named.items() if not _routes(name))
    matrices = [p for p in hidden if p.ndim >= 2]
    chosen = {id(p) for p in matrices}
    rest = [p for p in named.values() if id(p) not in chosen]
    adam = torch.optim.AdamW(rest, lr=adam_lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    return [Muon(matrices, lr=muon_lr, decay=decay), adam]
