"""What each kind's training adds to the loss, or does to its gates, as its paper has it.

A term has a state of its own where it is steered; it is kept with that of a run.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from model.decoder import Decoder
from model.moe.deep import DeepMixture
from model.moe.topk import TopKMixture
from model.shapes.mixtures import TopK
from model.shapes.moe_plus_plus import MoEPlusPlus
from model.step import Observer
from training.demos.recipes import BALANCE

WANTED = 2  # experts per token that ReMoE is steered to, and that MoE++ takes of its pool
STEER, FIRST = 1.2, 1e-4  # ReMoE's coefficient: what a step changes it by, and where it begins
SHARE = 0.75  # of MoE++: the weight of experts that compute nothing (τ)
DIVERSE = 1e-3  # DynMoE's coefficient
SIZE = 1e-3  # of ST-MoE's router logits (z-loss)
MARGIN = 200.0  # tokens that a Deep MoE's expert may have above the mean, in the first phase
FIRST_PHASE = 0.5  # its share of all steps


class Routing(Observer):
    """Keeps what the routers of a step say."""

    def __init__(self) -> None:
        self.scores: list[Tensor] = []
        self.loads: list[Tensor] = []

    def routed(self, layer: int, pairs: int, load_E: Tensor, scores_TE: Tensor | None) -> None:
        assert scores_TE is not None
        self.scores.append(scores_TE)
        self.loads.append(load_E)

    @property
    def mean(self) -> float:
        """Experts that a token ran in a layer."""
        tokens = sum(len(scores_TE) for scores_TE in self.scores)
        if not tokens:
            return 0.0
        return float(sum(load_E.sum() for load_E in self.loads)) / tokens


class Term:
    """Adds nothing."""

    def __init__(self, model: Decoder) -> None:
        self.model = model

    def begin(self, done: float) -> None:
        """A step begins; `done` is the share of all steps before it."""

    def __call__(self, routing: Routing) -> Tensor | float:
        """What is added to the loss of a step."""
        return 0.0

    def state(self) -> dict[str, Tensor]:
        """What a run that goes on later needs."""
        return {}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on from `state`."""


class SwitchBalance(Term):
    """E · Σ f_e P_e (arXiv 2101.03961, eq. 4)."""

    def __call__(self, routing: Routing) -> Tensor | float:
        parts = zip(routing.scores, routing.loads, strict=True)
        return BALANCE * torch.stack([_balance(*part) for part in parts]).mean()


class StMoE(SwitchBalance):
    """The balance, and the mean of logsumexp(logits)² (arXiv 2202.08906, eq. 5)."""

    def __init__(self, model: Decoder) -> None:
        super().__init__(model)
        self.sizes: list[Tensor] = []
        for module in mixtures(model):
            object.__setattr__(module, "logits", self._seen(module))

    def _seen(self, module: TopKMixture) -> Callable[[Tensor], Tensor]:
        def logits(x_TD: Tensor) -> Tensor:
            logits_TE = TopKMixture.logits(module, x_TD)
            self.sizes.append(logits_TE.logsumexp(-1).square().mean())
            return logits_TE

        return logits

    def begin(self, done: float) -> None:
        self.sizes.clear()

    def __call__(self, routing: Routing) -> Tensor | float:
        return super().__call__(routing) + SIZE * torch.stack(self.sizes).mean()


class WeightedBalance(Term):
    """Σ η_e f_e P_e over the pool, η = 1 for feed-forward experts and τ for the others (arXiv 2410.07348, eq. 7)."""

    def __call__(self, routing: Routing) -> Tensor | float:
        shape = self.model.config.mixtures[0]
        assert isinstance(shape, MoEPlusPlus)
        pool, losses = shape.num_experts, []
        weight_E = torch.where(torch.arange(pool) < shape.experts, 1.0, SHARE)
        for scores_TE in routing.scores:
            taken_E = F.one_hot(scores_TE.topk(WANTED).indices, pool).sum(1).float().mean(0)
            losses.append((weight_E * taken_E * scores_TE.mean(0)).sum())
        return BALANCE * torch.stack(losses).mean()


class SteeredSparsity(Term):
    """Σ f_e · mean score of e, f_e = 1 where an expert has its part of the wanted load, times a coefficient that rises
    while too many run (arXiv 2412.14711, eq. 9)."""

    def __init__(self, model: Decoder) -> None:
        super().__init__(model)
        self.coefficient = FIRST

    def __call__(self, routing: Routing) -> Tensor | float:
        self.coefficient *= STEER if routing.mean > WANTED else 1 / STEER
        parts = zip(routing.scores, routing.loads, strict=True)
        return self.coefficient * torch.stack([_balanced_l1(*part) for part in parts]).mean()

    def state(self) -> dict[str, Tensor]:
        return {"coefficient": torch.tensor(self.coefficient, dtype=torch.float64)}

    def restore(self, state: dict[str, Tensor]) -> None:
        self.coefficient = float(state["coefficient"])


class DiverseGates(Term):
    """How far DynMoE's gates are from orthogonal ones: |W Wᵀ - 1| of unit rows (arXiv 2405.14297, eq. 7)."""

    def __call__(self, routing: Routing) -> Tensor | float:
        shape = self.model.config.mixtures[0]
        assert isinstance(shape, TopK)
        gates = [F.normalize(module.router, dim=-1) for module in mixtures(self.model)]
        eye = torch.eye(shape.experts)
        return DIVERSE * torch.stack([(w @ w.T - eye).square().sum().sqrt() for w in gates]).mean()


class Constraint:
    """Eigen et al.'s balancing: an expert whose running sum of weights is above the mean by a margin has no weight, and
    the others share it. They do so sample by sample; here it holds for the tokens of a step together."""

    def __init__(self, experts: int) -> None:
        self.total_E = torch.zeros(experts)

    def __call__(self, logits_TE: Tensor) -> Tensor:
        kept_TE = logits_TE.masked_fill(self.total_E > self.total_E.mean() + MARGIN, -torch.inf)
        self.total_E = self.total_E + kept_TE.detach().softmax(-1).sum(0)
        return kept_TE


class TwoPhases(Term):
    """Constrains a Deep MoE's gates in the first phase (arXiv 1312.4314); adds nothing."""

    def __init__(self, model: Decoder) -> None:
        super().__init__(model)
        self.levels = [layer.ffn for layer in model.layers if isinstance(layer.ffn, DeepMixture)]
        self.constraints = [Constraint(level.shape.experts) for level in self.levels]

    def begin(self, done: float) -> None:
        for level, constraint in zip(self.levels, self.constraints, strict=True):
            level.constraint = constraint if done < FIRST_PHASE else None

    def state(self) -> dict[str, Tensor]:
        return {str(number): constraint.total_E for number, constraint in enumerate(self.constraints)}

    def restore(self, state: dict[str, Tensor]) -> None:
        for number, constraint in enumerate(self.constraints):
            constraint.total_E = state[str(number)]


TERMS: dict[str, type[Term]] = {
    "switch_transformers": SwitchBalance,
    "st_moe": StMoE,
    "moe_plus_plus": WeightedBalance,
    "remoe": SteeredSparsity,
    "dynmoe": DiverseGates,
    "deep_moe": TwoPhases,
}


def mixtures(model: Decoder) -> Iterator[TopKMixture]:
    """The top-k mixtures of a model, and those that are built on them."""
    for layer in model.layers:
        if isinstance(layer.ffn, TopKMixture):
            yield layer.ffn


def _balance(scores_TE: Tensor, load_E: Tensor) -> Tensor:
    return len(load_E) * (load_E / load_E.sum() * scores_TE.mean(0)).sum()


def _balanced_l1(scores_TE: Tensor, load_E: Tensor) -> Tensor:
    share_E = load_E * len(load_E) / (WANTED * len(scores_TE))
    return (share_E * scores_TE.mean(0)).sum() / len(load_E)
