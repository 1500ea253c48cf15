"""Trains and measures the demo models: one small model of each kind of mixture.

`python -m training.demos base --text FILE --out FOLDER` trains the dense model that all decoders begin with;
`python -m training.demos train NAME --base FOLDER --text FILE --heldout FILE --out FOLDER` trains one of the models,
measures its quality and writes its card. Both go on where a run was stopped. `python -m benchmarks.demo_speed FOLDER…`
adds the speed to the cards.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from tokenizers import Tokenizer

from model.decoder import Decoder, parameter_count
from training.corpus import documents, encode, train_tokenizer
from training.demos.export import export, write_card, write_readme
from training.demos.fresh import begin_from, fresh_model
from training.demos.loop import STATE, Run
from training.demos.measure import asked_of, quality
from training.demos.recipes import BASE, BASE_RECIPE, LENGTH, RECIPES, ROWS, VOCABULARY, Recipe
from training.demos.rows import Beginnings, Draw, windows
from weights.load import load_model

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
HELD_OUT_ROWS = 256
Text = Annotated[Path, typer.Option(help="training text, documents separated by <|endoftext|>")]
Out = Annotated[Path, typer.Option(help="the checkpoint's folder; beside it is FOLDER.run, with the state of the run")]
Steps = Annotated[int, typer.Option(help="0: as the recipe says")]


@dataclass(frozen=True)
class Trained:
    """A run at its end."""

    run: Run
    raw: dict[str, Any]
    tokenizer: Tokenizer


def draw_of(tokenizer: Tokenizer, texts: list[str], seed: int, encoder: bool) -> Draw:
    """Rows for a model with an encoder or without one."""
    return Beginnings(tokenizer, texts, seed) if encoder else windows(tokenizer, texts, seed)


def trained(recipe: Recipe, text: Path, out: Path, base: Path | None) -> Trained:
    """Train to the end of the recipe and export."""
    torch.set_num_threads(1)
    texts = list(documents(text))
    tokenizer = train_tokenizer(texts, VOCABULARY)
    raw = dict(recipe.config) | {"vocab_size": tokenizer.get_vocab_size()}
    model = fresh_model(raw, recipe.seed)
    encoder = model.config.encoder is not None
    run = Run(model, recipe, draw_of(tokenizer, texts, recipe.seed, encoder), out.with_suffix(".run"))
    if base is not None and not (run.folder / STATE).exists():
        begin_from(model, load_model(base, "float32")[0])
    run.resume()
    print(f"{parameter_count(model) / 1e6:.2f} M parameters", flush=True)
    for line in told(run):
        print(line, flush=True)
    export(model, raw, tokenizer, out)
    return Trained(run, raw, tokenizer)


def told(run: Run) -> Iterator[str]:
    """Train, with a line now and then."""
    losses: list[float] = []
    for loss, mean in run.train():
        losses = [*losses[-24:], loss]
        if run.step % 25 == 0:
            yield f"step {run.step}: {sum(losses) / len(losses):.3f}, {mean:.2f} experts, {run.seconds:.0f} s"


@app.command(BASE)
def train_base(text: Text, out: Out, steps: Steps = 0) -> None:
    """Train the dense model."""
    trained(replace(BASE_RECIPE, steps=steps or BASE_RECIPE.steps), text, out, None)


@app.command()
def train(
    name: Annotated[str, typer.Argument(help=", ".join(RECIPES))],
    text: Text,
    heldout: Annotated[Path, typer.Option(help="held-out text")],
    out: Out,
    base: Annotated[Path | None, typer.Option(help="the dense model's folder; encoder–decoders take none")] = None,
    steps: Steps = 0,
) -> None:
    """Train, export and measure the quality."""
    recipe = RECIPES[name]
    if (base is None) != ("d_model" in recipe.config):
        raise typer.BadParameter(f"{name} {'needs --base' if base is None else 'takes no --base'}")
    recipe = replace(recipe, steps=steps or recipe.steps)
    done = trained(recipe, text, out, base)
    facts = facts_of(name, recipe, done) | training_of(recipe, done.run, text)
    held = list(documents(heldout))
    size = sum(len(one.encode()) for one in held) / len(encode(done.tokenizer, held))
    rows = draw_of(done.tokenizer, held, 0, base is None)(0, HELD_OUT_ROWS)
    facts |= {"bytes_per_token": round(size, 3), "held_out_tokens": int((rows[1] >= 0).sum())}
    for kind, asked in asked_of(recipe, facts["trained"]).items():
        facts[kind] = quality(out, asked, rows, size)
        print(*facts[kind], sep="\n", flush=True)
    write_card(out, facts)
    write_readme(out, recipe, facts)


def facts_of(name: str, recipe: Recipe, done: Trained) -> dict[str, Any]:
    """What the card says of the model."""
    model: Decoder = done.run.model
    facts: dict[str, Any] = {"name": name, "family": recipe.family, "parameters": parameter_count(model)}
    return facts | {"vocabulary": done.raw["vocab_size"], "trained": model.config.experts.trained}


def training_of(recipe: Recipe, run: Run, text: Path) -> dict[str, Any]:
    """What the card says of the training."""
    names = ("muon", "peak", "warm", "seed")
    facts = {"megabytes": round(text.stat().st_size / 1e6, 1), "steps": run.step, "rows": ROWS, "length": LENGTH}
    facts |= {"tokens": run.step * ROWS * LENGTH, "cpu_seconds": round(run.seconds)}
    return {"training": facts | {name: getattr(recipe, name) for name in names}}


if __name__ == "__main__":
    app()
