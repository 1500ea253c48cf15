"""How much of what half the trained count loses is won back without training?

Measures: loss, KL divergence and agreement at half the trained count, plain and with what the searches of
`moedial calibrate` choose (normaliser, repair, a split over the layers, thresholds) and their combinations. They choose
by the first quarter of the text; the figures are of the rest. Ceiling: the trained count, which has lost nothing.
Floor: half of it, plain.
"""

import json
import tempfile
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.machine import facts, introduce, use_threads
from benchmarks.tables import grid
from calibration import allocation, normalisers, repair, thresholds
from calibration.opening import Opened, opened
from calibration.options import Options
from calibration.run import Run
from calibration.scoring import Score
from calibration.tasks import CachedRunner, accuracy
from model.budget import ExpertBudget, RoutingRule


def budgets(run: Run, half: int) -> dict[str, ExpertBudget]:
    """What is measured, by name: the ceiling, the floor, and what the searches chose at about the floor's cost."""
    split = allocation.search(run).profiles.get(f"p{half}")
    early = thresholds.search(run).options
    named = {"trained count": run.uniform(run.experts.trained), "half": run.uniform(half)}
    starts = {"half": run.uniform(half)} | ({"split": ExpertBudget(split)} if split else {})
    for (start, budget), (name, rule) in product(starts.items(), _rules(run, half).items()):
        named[f"{start}, {name}" if name else start] = replace(budget, rule=rule)
    return named | {name: budget for name, budget in early.items() if name.endswith(f"-{half}")}


def _rules(run: Run, half: int) -> dict[str, RoutingRule]:
    """The family's rule, and every combination of those that help at this count."""
    rules = {"": RoutingRule()}
    if (normaliser := normalisers.search(run).normalisers.get(str(half))) is not None:
        rules[normalisers.spelled(normaliser)] = RoutingRule(normaliser=normaliser)
    if repair.search(run).repaired:
        for name, rule in [*rules.items()]:
            rules[f"{name} and repair" if name else "repair"] = replace(rule, repair=True)
    return rules


def rows_of(model: str, options: Options, half: int) -> list[dict[str, Any]]:
    """All figures of one model."""
    with opened(options) as found:
        run = found.run
        half = half or run.experts.trained // 2
        named = budgets(run, half)
        scores = dict(zip(named, run.score(list(named.values()), run.report), strict=True))
        return [row(model, name, found, budget, scores) for name, budget in named.items()]


def row(model: str, name: str, found: Opened, budget: ExpertBudget, scores: dict[str, Score]) -> dict[str, Any]:
    """The figures of one budget, next to the ceiling and the floor."""
    score, ceiling, floor = scores[name], scores["trained count"], scores["half"]
    run = found.run
    cached = CachedRunner(run.runner, run.info.kv_blocks)
    tasks: dict[str, float] = {}
    for task in found.tasks:
        tasks |= accuracy(cached, budget, task, run.partial, run.progress)
    return {
        "model": model,
        "budget": name,
        "counts": budget.per_layer,
        "rule": str(budget.rule),
        "mean_count": round(score.pairs_per_token / run.experts.layers, 2),
        "tokens": score.tokens,
        "loss": round(score.loss, 4),
        "kl": round(score.kl, 5),
        "agreement": round(score.agreement, 4),
        "loss_won_back": round(1 - (score.loss - ceiling.loss) / (floor.loss - ceiling.loss), 3),
        "kl_won_back": round(1 - score.kl / floor.kl, 3),
        "tasks": tasks,
    }


def cells(each: dict[str, Any]) -> list[str]:
    """One line of the table."""
    figures = [str(each[key]) for key in ("mean_count", "loss", "kl", "agreement")]
    shares = [f"{each[key]:.0%}" for key in ("loss_won_back", "kl_won_back")]
    tasks = [f"{rate:.3f}" for rate in each["tasks"].values()]
    return [f"{each['model']}, {each['budget']}", *figures, *shares, *tasks]


def main(
    models: Annotated[list[str], typer.Option("--model", help="a folder or a bundled model's name")],
    text: Annotated[list[Path], typer.Option(help="text that none of them was trained on")],
    tasks: Annotated[list[Path] | None, typer.Option(help="multiple choice, as for moedial calibrate")] = None,
    half: Annotated[int, typer.Option(help="the count to win back at; 0: half the trained one")] = 0,
    minutes: Annotated[float, typer.Option(help="decides how much text is scored, as for moedial calibrate")] = 4.0,
    threads: Annotated[int, typer.Option(help="0: all cores")] = 0,
) -> None:
    """Print a table for people and one JSON line for machines."""
    use_threads(threads)
    machine = facts()
    introduce(machine)
    rows: list[dict[str, Any]] = []
    for model in models:
        with tempfile.TemporaryDirectory() as place:
            options = Options(model=model, text=text, tasks=tasks, minutes=minutes, output=Path(place), threads=threads)
            rows += rows_of(Path(model).name, options, half)
    head = ("model, budget", "experts", "loss", "KL", "agreement", "loss won back", "KL won back", *rows[0]["tasks"])
    print(grid(head, [cells(each) for each in rows]))
    print(json.dumps(machine | {"rows": rows}))


if __name__ == "__main__":
    typer.run(main)
