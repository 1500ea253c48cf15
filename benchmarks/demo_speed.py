"""How fast the engine decodes the demo models at each count.

`python -m benchmarks.demo_speed FOLDER…` writes it into their cards.

Not here: training; the questions are the list that the models' quality was measured for.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Annotated

import torch
import typer

from calibration.machine import processor
from calibration.speed import BATCHES, Clock
from engine.build import build_engine
from engine.types import EngineSettings
from model.budget import ExpertBudget
from training.demos.export import write_card
from training.demos.measure import Asked, asked_of
from training.demos.recipes import RECIPES
from weights.folder import read_card


def speed(
    folders: Annotated[list[Path], typer.Argument(help="checkpoints with a card.json")],
    rounds: Annotated[int, typer.Option(help="of which medians are taken")] = 7,
) -> None:
    """Measure decoding speed at each count, and write it into card.json."""
    torch.set_num_threads(1)
    for folder in folders:
        facts = read_card(folder)
        asked = asked_of(RECIPES[facts["name"]], facts["trained"])
        rows = facts["quality"] + facts["rules"]
        speeds = measured(folder, asked["quality"] + asked["rules"], rounds)
        for row, tokens in zip(rows, speeds, strict=True):
            row["tokens_per_second"] = tokens
            print(folder.name, row, flush=True)
        write_card(folder, facts | {"machine": machine()})


def measured(folder: Path, asked: Sequence[Asked], rounds: int) -> list[dict[str, int]]:
    """Of each: tokens per second of a decoding engine, by batch; medians over rounds in which all take turns. Of one
    thread, in seconds of its processor time, which other work on the machine takes none of."""
    settings = EngineSettings(
        model=str(folder),
        allow_extrapolated_experts=True,
        device="cpu",
        threads=1,
        kv_cache_bytes=1 << 26,
        step_ms=0,
        prefix_cache=False,
    )
    engine, info = build_engine(settings)
    clock = Clock(engine, info.vocabulary, info.max_model_len, time.process_time)
    layers = info.experts.layers
    budgets = [ExpertBudget((one.count,) * layers, rule=one.rule) for one in asked]
    clock.round(budgets[0])
    timed = [[clock.round(budget) for budget in budgets] for _ in range(rounds)]
    return [{str(n): round(n / median(one[i][str(n)] for one in timed)) for n in BATCHES} for i in range(len(asked))]


def machine() -> str:
    """Where speed is measured, in words."""
    return (
        f"{processor()}, one thread and its processor time, float32, {torch.backends.cpu.get_cpu_capability().lower()}"
    )


if __name__ == "__main__":
    typer.run(speed)
