"""What does self-contrast decoding cost? `make bench-contrast`.

Measures: so many requests at once (random prompts of 32 tokens, 64 new ones, greedy), plain at the trained count, and
with every token computed a second time by the expert of rank 2 alone. One engine, no HTTP and no prefix cache, arms in
turn after a round that is not counted; medians. At best it takes the time of one row, at worst that of two requests.
Published (SCMoE, Mixtral 8x7B, one stream on GPUs): 1.30 times the time.
"""

import json
import random
from statistics import median
from time import perf_counter
from typing import Annotated, Any

import typer

from benchmarks.machine import facts, introduce, use_threads
from benchmarks.tables import grid
from engine.build import build_engine
from engine.engine import Engine
from engine.types import EngineInfo, EngineSettings, Request, Sampling
from model.budget import ExpertBudget
from model.contrast import Contrast

PROMPT, NEW = 32, 64
ARMS = {"plain": None, "contrasted": Contrast()}


def requests(info: EngineInfo, batch: int, contrast: Contrast | None) -> list[Request]:
    """The same prompts for both arms."""
    rng = random.Random(batch)
    budget = ExpertBudget((info.experts.trained,) * info.experts.layers, contrast=contrast)
    sampling = Sampling(NEW, seed=0, temperature=0.0)
    prompts = [tuple(rng.randrange(info.vocabulary) for _ in range(PROMPT)) for _ in range(batch)]
    return [Request(str(number), prompt, budget, sampling) for number, prompt in enumerate(prompts)]


def tokens_per_second(engine: Engine, asked: list[Request]) -> float:
    """New tokens over the time until the last one."""
    for request in asked:
        engine.add(request)
    began, tokens = perf_counter(), 0
    while engine.has_work:
        tokens += sum(event.token is not None for event in engine.step().events)
    if tokens != NEW * len(asked):
        raise RuntimeError(f"{tokens} tokens came instead of {NEW * len(asked)}")
    return tokens / (perf_counter() - began)


def measure(engine: Engine, info: EngineInfo, batch: int, repeats: int) -> dict[str, Any]:
    """Medians of both arms, and how many times the plain arm's time the other took: the median of each turn's ratio."""
    rounds = []
    for _ in range(repeats + 1):
        rounds.append(
            {name: tokens_per_second(engine, requests(info, batch, contrast)) for name, contrast in ARMS.items()}
        )
    counted = rounds[1:]
    speeds = {name: median(turn[name] for turn in counted) for name in ARMS}
    return {"batch": batch, **speeds, "times": median(turn["plain"] / turn["contrasted"] for turn in counted)}


def main(
    model: Annotated[str, typer.Option(help="a folder or a bundled model's name")] = "topk-stories",
    batch: Annotated[list[int], typer.Option(help="requests at once")] = [1, 4, 16],  # noqa: B006 - typer's way
    repeats: int = 5,
    threads: Annotated[int, typer.Option(help="0: all cores")] = 0,
) -> None:
    """Print a table for people and one JSON line for machines."""
    use_threads(threads)
    machine = facts()
    introduce(machine)
    settings = EngineSettings(
        model, threads=threads, max_model_len=PROMPT + NEW, max_running=2 * max(batch), prefix_cache=False, step_ms=0
    )
    engine, info = build_engine(settings)
    rows = [measure(engine, info, size, repeats) for size in batch]
    head = ("requests", "plain, tokens/s", "contrasted, tokens/s", "times the time")
    lines = [
        [str(row["batch"]), f"{row['plain']:,.0f}", f"{row['contrasted']:,.0f}", f"{row['times']:.2f}"] for row in rows
    ]
    print(f"\n{model}, K = {info.experts.trained}, {info.kernels}\n")
    print(grid(head, lines))
    print(json.dumps(machine | {"model": model, "kernels": info.kernels, "rows": rows}))


if __name__ == "__main__":
    typer.run(main)
