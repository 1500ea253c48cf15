"""The training loop: tokens in, a decoder out. Resumes, shows the loss per K, and plots it at the end.

Run `python -m training.train --recipe infinity --tokens FOLDER --heldout FILE --out runs/infinity`.
It writes training state and an exported checkpoint; `weights/` knows the format of checkpoints.
"""

import itertools
import json
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm

from model.decoder import Decoder, parameter_count
from model.moe.topk import TopKMixture
from model.shapes.decoder import DecoderConfig
from training.corpus import documents, encode
from training.evaluate import COUNTS, held_out_loss
from training.optimiser import build_optimisers
from training.plot import plot_losses
from training.recipe import RECIPES, Recipe
from training.step import draw_counts, initialise, next_token_loss
from weights.config import decoder_config


def compile_parts(model: Decoder) -> None:
    """Fuse what has static shapes. The routing itself is ragged and stays eager."""
    layers: Iterable[Any] = model.layers
    for layer in layers:
        layer.attention.compile(dynamic=False)
        layer.attention_norm.compile(dynamic=False)
        layer.ffn_norm.compile(dynamic=False)
        if isinstance(layer.ffn, TopKMixture):
            layer.ffn.dense = torch.compile(layer.ffn.dense, dynamic=False)  # type: ignore[method-assign]
            layer.ffn.execute = layer.ffn.run_dense
        else:
            layer.ffn.execute = torch.compile(layer.ffn.run_masked, dynamic=False)


class Windows:
    """Every window of `length` + 1 tokens once per epoch, in an order that depends on the seed alone."""

    def __init__(self, tokens: np.ndarray, length: int, seed: int) -> None:
        self.tokens, self.length, self.seed = tokens, length, seed
        self.count = (len(tokens) - 1) // length

    def __call__(self, step: int, rows: int) -> Tensor:
        """[rows, length + 1] token ids for a step; the same after a restart."""
        numbers = range(step * rows, (step + 1) * rows)
        starts = [self._index(number) * self.length for number in numbers]
        size = self.length + 1
        windows = np.stack([self.tokens[start : start + size] for start in starts])
        return torch.from_numpy(windows.astype(np.int64))

    def _index(self, n: int) -> int:
        epoch, place = divmod(n, self.count)
        if getattr(self, "_epoch", None) != epoch:
            generator = np.random.default_rng([self.seed, epoch])
            self._epoch, self._order = epoch, generator.permutation(self.count)
        return int(self._order[place])


class Trainer:
    """Holds a model, its optimisers and the step it is at."""

    def __init__(self, recipe: Recipe, config: DecoderConfig, tokens: np.ndarray, out: Path) -> None:
        self.recipe, self.out = recipe, out
        self.windows = Windows(tokens, recipe.length, recipe.seed)
        self.model = Decoder(config)
        initialise(self.model, recipe.seed)
        self.optimisers = build_optimisers(self.model, recipe.muon_lr, recipe.adam_lr, recipe.decay)
        self.base_lrs = [o.param_groups[0]["lr"] for o in self.optimisers]
        self.step = 0

    def train_step(self) -> float:
        """One optimiser step over `recipe.rows` windows in micro-batches; returns the mean loss in nats."""
        generator = torch.Generator().manual_seed(self.recipe.seed * 1_000_003 + self.step)
        window_BS = self.windows(self.step, self.recipe.rows)
        micro = self.recipe.micro_rows
        total = 0.0
        for start in range(0, self.recipe.rows, micro):
            with torch.autocast("cpu", torch.bfloat16):
                loss = self.loss(window_BS[start : start + micro], generator)
            (loss * (micro / self.recipe.rows)).backward()
            total += float(loss.detach()) * micro / self.recipe.rows
        self._update()
        return total

    def loss(self, window_BS: Tensor, generator: torch.Generator) -> Tensor:
        """The loss of one micro-batch at counts that are drawn for it."""
        counts = draw_counts(self.model.config, self.recipe.largest_count, generator)
        noise_seed = int(torch.randint(1 << 40, (1,), generator=generator))
        return next_token_loss(self.model, window_BS, counts, noise_seed, self.recipe.balance)

    def _update(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimiser, base in zip(self.optimisers, self.base_lrs, strict=True):
            optimiser.param_groups[0]["lr"] = base * self.recipe.schedule(self.step)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        self.step += 1

    def save(self) -> None:
        """Write weights and optimiser state; safetensors only, replaced atomically."""
        state = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        names = {id(p): name for name, p in self.model.named_parameters()}
        for optimiser in self.optimisers:
            for parameter, values in optimiser.state.items():
                name = names[id(parameter)]
                state |= {f"state.{name}.{key}": value for key, value in values.items()}
        fresh = self.out / "state.new"
        stored = {name: value.detach().contiguous() for name, value in state.items()}
        save_file(stored, fresh, metadata={"step": str(self.step)})
        fresh.replace(self.out / "state.safetensors")

    def resume(self) -> None:
        """Continue from a saved state, if there is one."""
        path = self.out / "state.safetensors"
        if not path.exists():
            return
        state = load_file(path)
        self.model.load_state_dict(_under("model.", state))
        for optimiser in self.optimisers:
            for parameter in optimiser.param_groups[0]["params"]:
                name = next(n for n, p in self.model.named_parameters() if p is parameter)
                optimiser.state[parameter] = _under(f"state.{name}.", state)
        with safe_open(path, framework="pt") as file:  # in the same file, so that weights and step never disagree
            self.step = int(file.metadata()["step"])


def _under(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin with the prefix, under the rest of their names."""
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def run(trainer: Trainer, heldout: Tensor, minutes: float) -> list[dict[str, float]]:
    """Train to the end of the schedule (or for so many minutes); returns the log, one row per evaluation."""
    recipe, log_path, log = trainer.recipe, trainer.out / "log.json", []
    if log_path.exists():
        log = json.loads(log_path.read_text())
    deadline, saved, mean = time.monotonic() + minutes * 60, time.monotonic(), None
    bar = tqdm(total=recipe.steps, initial=trainer.step, unit="step", mininterval=5)
    while trainer.step < recipe.steps and time.monotonic() < deadline:
        loss = trainer.train_step()
        mean = loss if mean is None else 0.95 * mean + 0.05 * loss
        bar.update()
        bar.set_postfix(loss=f"{mean:.3f}")
        if trainer.step % recipe.evaluate_every == 0 or trainer.step == recipe.steps:
            losses = {f"K={k}": held_out_loss(trainer.model, heldout, k) for k in COUNTS}
            log.append({"step": trainer.step, "train": mean, **losses})
            log_path.write_text(json.dumps(log, indent=1))
            shown = "  ".join(f"{name} {loss:.4f}" for name, loss in losses.items())
            bar.write(f"step {trainer.step}: {shown}")
        if time.monotonic() - saved > 300:
            trainer.save()
            saved = time.monotonic()
    bar.close()
    trainer.save()
    return log


def main(
    recipe: Annotated[str, typer.Option(help="infinity or topk")],
    tokens: Annotated[Path, typer.Option(help="folder with tokenizer.json and tokens.npy (training.corpus)")],
    heldout: Annotated[Path, typer.Option(help="held-out text, documents separated by <|endoftext|>")],
    out: Annotated[Path, typer.Option(help="where state, log, plot and checkpoint go")],
    steps: Annotated[int, typer.Option(help="0: as the recipe says")] = 0,
    rows: Annotated[int, typer.Option(help="windows per step; 0: as the recipe says")] = 0,
    minutes: Annotated[float, typer.Option(help="stop, resumable, after so many minutes")] = 1e9,
    field: Annotated[list[str], typer.Option(help="override of one config field, name=json")] = [],  # noqa: B006
) -> None:
    """Train one recipe, resuming if OUT holds a state."""
    chosen = RECIPES[recipe].override(steps, rows, field)
    out.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(chosen, decoder_config(chosen.config), np.load(tokens / "tokens.npy", mmap_mode="r"), out)
    trainer.resume()
    compile_parts(trainer.model)
    print(f"{parameter_count(trainer.model) / 1e6:.2f} M parameters, {chosen.tokens / 1e6:.1f} M tokens to train on")
    log = run(trainer, held_out_windows(tokens, heldout, chosen.length), minutes)
    plot_losses(log, out / "loss.png", title=recipe)
    (out / "config.json").write_text(json.dumps(chosen.config, indent=2) + "\n")


def held_out_windows(folder: Path, text: Path, length: int, rows: int = 32) -> Tensor:
    """The first `rows` windows of the held-out text, for the progress log only."""
    stories = list(itertools.islice(documents(text), rows * 4))
    ids = encode(Tokenizer.from_file(str(folder / "tokenizer.json")), stories)
    size = length + 1
    kept_T = torch.from_numpy(ids[: rows * size].astype(np.int64))
    return kept_T.unflatten(0, (-1, size))


if __name__ == "__main__":
    typer.run(main)
