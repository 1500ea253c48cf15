"""The training loop of the demo models. A run keeps its state in a folder and goes on from there."""

import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from model.backends.torch.attend import WholeAttend
from model.decoder import Decoder
from model.step import Observer
from training.demos.recipes import ROWS, Recipe
from training.demos.rows import Draw
from training.demos.terms import TERMS, Routing, Term
from training.optimiser import Muon
from training.step import make_batch

STATE = "state.safetensors"
SAVE_EVERY = 100  # steps
# Parts of the names of matrices that AdamW trains: embeddings, tables of biases, everything that routes, and factors of
# experts.
BY_ADAM = ("embed", "bias", "router", "gate.", "gate_hidden", "slots", "residual", "constant", "p.experts", "n.experts")


def loss_of(model: Decoder, ids_BS: Tensor, target_BS: Tensor, count: int, observer: Observer | None) -> Tensor:
    """Mean cross-entropy in nats of the targets, with `count` experts in every mixture."""
    batch = make_batch(ids_BS, [count] * len(model.config.mixtures), 0)
    logits_TV = model(batch, WholeAttend(ids_BS.shape[1], ids_BS.device), observer)
    return F.cross_entropy(logits_TV.float(), target_BS.flatten())


def build_optimisers(model: Decoder, recipe: Recipe) -> list[tuple[torch.optim.Optimizer, float]]:
    """Muon for the matrices of attention and experts, AdamW for the rest; each with its largest learning rate."""
    named = dict(model.named_parameters())
    matrices = [p for name, p in named.items() if p.ndim >= 2 and not any(word in name for word in BY_ADAM)]
    chosen = {id(p) for p in matrices}
    rest = [p for p in named.values() if id(p) not in chosen]
    adam = torch.optim.AdamW(rest, lr=recipe.peak, betas=(0.9, 0.98), weight_decay=0.0)
    return [(Muon(matrices, lr=recipe.muon, dtype=torch.float32), recipe.muon), (adam, recipe.peak)]


class Run:
    """A model, its optimiser and the step it is at."""

    def __init__(self, model: Decoder, recipe: Recipe, draw: Draw, folder: Path) -> None:
        self.model, self.recipe, self.draw, self.folder = model, recipe, draw, folder
        self.term = TERMS.get(recipe.family, Term)(model)
        self.optimisers = build_optimisers(model, recipe)
        self.step, self.seconds = 0, 0.0  # of processor time

    def rate(self) -> float:
        """The learning rate of the step, as a share of the largest."""
        falling = 0.5 * (1 + math.cos(math.pi * self.step / self.recipe.steps)) if self.recipe.falls else 1.0
        return min((self.step + 1) / self.recipe.warm, falling)

    def train(self) -> Iterator[tuple[float, float]]:
        """Train to the end of the recipe: each step's loss, and the mean number of experts that ran."""
        while self.step < self.recipe.steps:
            began = time.process_time()
            loss, mean = self._one_step()
            self.seconds += time.process_time() - began
            if self.step % SAVE_EVERY == 0:
                self.save()
            yield loss, mean
        self.term.begin(1.0)

    def _one_step(self) -> tuple[float, float]:
        self.term.begin(self.step / self.recipe.steps)
        routing = Routing()
        loss = loss_of(self.model, *self.draw(self.step, ROWS), self.model.config.experts.trained, routing)
        (loss + self.term(routing)).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimiser, peak in self.optimisers:
            optimiser.param_groups[0]["lr"] = peak * self.rate()
            optimiser.step()
            optimiser.zero_grad()
        self.step += 1
        return float(loss.detach()), routing.mean

    def save(self) -> None:
        """Write the state, replaced as a whole."""
        self.folder.mkdir(parents=True, exist_ok=True)
        state = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        for optimiser, _ in self.optimisers:
            for parameter, kept in optimiser.state.items():
                state |= {f"optimiser.{names[id(parameter)]}.{key}": value for key, value in kept.items()}
        state |= {f"term.{key}": value for key, value in self.term.state().items()}
        fresh = self.folder / "state.new"
        facts = {"step": str(self.step), "seconds": str(self.seconds)}
        save_file({name: value.detach().contiguous() for name, value in state.items()}, fresh, metadata=facts)
        fresh.replace(self.folder / STATE)

    def resume(self) -> None:
        """Go on from a saved state, if there is one."""
        path = self.folder / STATE
        if not path.exists():
            return
        state = load_file(path)
        self.model.load_state_dict(_under("model.", state))
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        for optimiser, _ in self.optimisers:
            for parameter in optimiser.param_groups[0]["params"]:
                optimiser.state[parameter] = _under(f"optimiser.{names[id(parameter)]}.", state)
        self.term.restore(_under("term.", state))
        with safe_open(path, framework="pt") as file:
            facts = file.metadata()
        self.step, self.seconds = int(facts["step"]), float(facts["seconds"])


def _under(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin with the prefix, under the rest of their names."""
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
