"""Everything from the teacher to trained twins on one GPU in about ten minutes.

`python -m training.on_gpu teacher …` cuts the teacher's vocabulary, `… text …` samples stories and writes tokens,
`… twin …` trains one model of a recipe for a time and writes its weights. Each part works on a CPU as well, slowly,
which is how it is tested.
"""

import json
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from safetensors.torch import save_file
from tokenizers import Tokenizer

from training.export import windows as held_out_windows
from training.gpu import stories
from training.gpu.evaluation import evaluate, spreads
from training.gpu.loop import Windows, train
from training.gpu.network import Network, decoder_state
from training.gpu.plan import Plan
from training.gpu.recipes import TWINS

app = typer.Typer(add_completion=False, no_args_is_help=True)
COUNTS = (1, 2, 3, 4, 6, 8, 12, 16)


def say(text: str) -> None:
    """Print with the time of day."""
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


def best_device() -> torch.device:
    """The GPU, if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@app.command()
def teacher(
    model: Annotated[Path, typer.Option(help="a checkpoint with its tokenizer in llama2.c's layout")],
    vocabulary_text: Annotated[Path, typer.Option(help="real stories, whose tokens are kept")],
    out: Annotated[Path, typer.Option(help="the safetensors file to write")],
) -> None:
    """Cut the teacher to the tokens that real stories use."""
    count = stories.cut_teacher(model, vocabulary_text.read_text(encoding="utf-8"), out)
    say(f"{count} tokens kept")


@app.command()
def text(
    teacher: Annotated[Path, typer.Option(help="written by the command of that name")],
    tokenizer: Annotated[Path, typer.Option()],
    heldout: Annotated[Path, typer.Option()],
    out: Annotated[Path, typer.Option(help="folder for tokens.npy and held.npy")],
    seconds: float = 60,
    most: Annotated[int, typer.Option(help="sampled tokens at most")] = 1 << 40,
    rows: int = 4096,
    temperatures: str = "0.9,1.0",
    seed: int = 1,
    length: int = 512,
) -> None:
    """Sample stories from the teacher and encode them."""
    with stories.workers() as pool:  # before the GPU is used: its processes are forked
        out.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(seed)
        writer = stories.Teacher(teacher, rows, best_device())
        ids_BS = sample(writer, tuple(map(float, temperatures.split(","))), seconds, most)
        began = time.monotonic()
        started = stories.tokenise(pool, ids_BS, writer.pieces, tokenizer, seed)
        tokens, characters, count = stories.collect(started)
    np.save(out / "tokens.npy", tokens)
    held_BS, _ = held_out_windows(Tokenizer.from_file(str(tokenizer)), heldout, length, 0)
    np.save(out / "held.npy", held_BS.numpy().astype(np.uint16))
    facts = {"stories": count, "characters": characters, "tokens": len(tokens)}
    (out / "text.json").write_text(json.dumps(facts))
    amounts = f"{count} stories, {characters / 1e6:.1f} M characters, {len(tokens) / 1e6:.1f} M tokens"
    say(f"{amounts}, encoded in {time.monotonic() - began:.1f} s")


def sample(writer: stories.Teacher, temperatures: tuple[float, ...], seconds: float, most: int) -> NDArray[np.int16]:
    """All sampled ids [rows, positions]."""
    began = time.monotonic()
    ids_BS = np.concatenate(list(stories.sample(writer, temperatures, seconds, most)), axis=1)
    spent = time.monotonic() - began
    speed = ids_BS.size / spent / 1e6
    say(f"{ids_BS.size / 1e6:.1f} M tokens sampled in {spent:.1f} s: {speed:.3f} M/s")
    return ids_BS


@app.command()
def twin(
    name: Annotated[str, typer.Argument(help="a recipe of training.gpu.recipes")],
    tokens: Annotated[Path, typer.Option(help="folder with tokens.npy and held.npy")],
    out: Annotated[Path, typer.Option(help="folder for weights and log")],
    seconds: Annotated[float, typer.Option(help="of training; 0: as many steps as the recipe says")] = 0,
    steps: Annotated[int, typer.Option(help="0: as the recipe says")] = 0,
    rows: Annotated[int, typer.Option(help="windows of a step; 0: as the recipe says")] = 0,
) -> None:
    """Train one twin."""
    shape, recipe = TWINS[name]
    plan = replace(recipe, steps=steps or recipe.steps, rows=rows or recipe.rows)
    if seconds:
        plan = replace(plan, steps=1 << 30)  # the measured speed decides
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(plan.seed)
    net = Network(shape).to(best_device())
    millions = sum(p.numel() for p in net.parameters()) / 1e6
    say(f"{name}: {millions:.1f} M parameters, {shape}")
    result = train_and_measure(net, plan, tokens, seconds)
    for row in result["quality"]:
        say(f"{name} {row}")
    (out / f"{name}.json").write_text(json.dumps(result, indent=1))
    state = {key: value.bfloat16() for key, value in decoder_state(net).items()}
    save_file(state, out / f"{name}.safetensors")


def train_and_measure(net: Network, plan: Plan, folder: Path, seconds: float) -> dict[str, Any]:
    """Train a network on a folder's tokens; what the run took, and held-out quality per count."""
    device = net.embed.device
    windows = Windows(np.load(folder / "tokens.npy"), plan.length, plan.seed, device)
    result = train(net, windows, plan, say, seconds)
    held_BS = torch.from_numpy(np.load(folder / "held.npy").astype(np.int64)).to(device)
    counts = [count for count in COUNTS if count <= net.shape.largest]
    result["quality"] = evaluate(net, held_BS, counts)
    result["spread"] = spreads(net, held_BS[:16]) if net.shape.kind == "infinity" else None
    device_name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    given = {"shape": asdict(net.shape), "plan": asdict(plan)}
    return result | given | {"device": device_name, "torch": torch.__version__}


if __name__ == "__main__":
    app()
