"""Is a cascade worth its second run? `make bench-cascade TEXT=STORIES.txt`.

Measures: each held-out document is scored at every count, as if it were the answer. A cascade takes its loss at the low
count, or, where the mean entropy or margin of its tokens there passes a threshold, at the high count. Quality: the
perplexity at the trained count over that of the whole text; cost: the experts that a token runs in a layer, in both
runs. For all thresholds together: the area under the hull of cost and quality (AIQ of RouterBench, arXiv 2403.12031)
from the cost of the low count to that of both. Beside it: fixed counts from the low to the high one, with the hull that
mixing them reaches. Floor: the same second runs for documents that are drawn at random. Ceiling: the same choice of
documents if it cost nothing, so that each is run once.

It is the loss of given text, not what a reader thinks of generated text: a story has no reference answer. A measure of
the model's own tokens may choose better or worse than one of a writer's.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from torch.nn.functional import cross_entropy

from benchmarks.machine import facts, introduce, use_threads
from benchmarks.tables import grid
from calibration.scoring import sequence_of
from calibration.texts import documents
from engine.build import build_engine
from engine.expert_stats import ExpertStats
from engine.plan import Chunk
from engine.runner import ModelRunner
from engine.sampling.uncertainty import uncertainty
from engine.types import EngineSettings
from model.budget import ExpertBudget
from weights.calibration_hull import Point, area, hull
from weights.folder import bundled_models, read_text, resolve_model
from weights.tokenizer import Tokenizer

LONGEST = 512  # tokens of a document
MAX_BYTES = 256 << 20
Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


class Scored(NamedTuple):
    """Of each document at one count."""

    loss_D: Floats  # sums of nats
    entropy_D: Floats  # means over tokens, as the next
    margin_D: Floats
    pairs_D: Floats


@dataclass(frozen=True, slots=True)
class Text:
    """Scored documents: how many tokens and layers there are, and their scores by count."""

    tokens: int  # that are scored
    layers: int
    trained: int
    by_count: dict[int, Scored]

    def point(self, loss_D: Floats, pairs_D: Floats) -> Point:
        """Cost and quality of documents that were each scored in one way or another."""
        best = float(self.by_count[self.trained].loss_D.sum())
        quality = float(np.exp((best - loss_D.sum()) / self.tokens))
        return float(pairs_D.sum()) / (self.tokens * self.layers), quality

    def fixed(self, count: int) -> Point:
        """Those of one count for all documents."""
        scored = self.by_count[count]
        return self.point(scored.loss_D, scored.pairs_D)

    def cascade(self, low: int, high: int, unsure_D: Floats, first_run: bool = True) -> list[Point]:
        """Those of every threshold: the documents with the largest of `unsure_D`, none to all, are run again. Without
        `first_run` its cost is left out where there is a second."""
        less, more = self.by_count[low], self.by_count[high]
        rank_D = np.argsort(np.argsort(-unsure_D))
        points = []
        for again in range(len(rank_D) + 1):
            chosen_D: Bools = rank_D < again
            kept_D = less.pairs_D if first_run else np.where(chosen_D, 0.0, less.pairs_D)
            loss_D = np.where(chosen_D, more.loss_D, less.loss_D)
            points.append(self.point(loss_D, kept_D + np.where(chosen_D, more.pairs_D, 0.0)))
        return points


@torch.inference_mode()
def score(runner: ModelRunner, texts: Sequence[tuple[int, ...]], budget: ExpertBudget) -> Scored:
    """Every document at one budget; the first token of each is not scored."""
    rows: list[tuple[float, float, float, float]] = []
    for tokens in texts:
        stats = ExpertStats()
        logits_SV = runner.forward((Chunk(sequence_of(tokens, budget, runner), 0, len(tokens) - 1),), stats).float()
        loss = float(cross_entropy(logits_SV, torch.tensor(tokens[1:]), reduction="sum"))
        entropy, margin = (float(uncertainty(logits_SV, by).mean()) for by in ("entropy", "margin"))
        rows.append((loss, entropy, margin, float(stats.pairs)))
    return Scored(*np.array(rows).T)


def read(folder: Path, text: Path, most: int, runs: Sequence[tuple[int, int]], threads: int) -> Text:
    """The first documents of a text, scored at every count that a cascade is compared with."""
    engine, info = build_engine(EngineSettings(str(folder), threads=threads, step_ms=0))
    tokenizer, longest = Tokenizer.load(folder), min(LONGEST, info.max_model_len)
    encoded = (tuple(tokenizer.encode(one))[:longest] for one in documents(read_text(text, MAX_BYTES), tokenizer))
    texts = [tokens for _, tokens in zip(range(most), encoded, strict=False) if len(tokens) > 1]
    runner, experts = engine.runner, info.experts
    assert isinstance(runner, ModelRunner)
    counts = {experts.trained} | {count for low, high in runs for count in range(low, high + 1)}
    found = {count: score(runner, texts, experts.budget(count)) for count in sorted(counts)}
    return Text(sum(map(len, texts)) - len(texts), experts.layers, experts.trained, found)


def compare(text: Text, low: int, high: int) -> dict[str, Any]:
    """The areas of a cascade and of what it is compared with, and the qualities at the cost of each fixed count."""
    first = text.by_count[low]
    unsure = {"entropy": first.entropy_D, "margin": -first.margin_D}
    curves = {f"cascade by {by}": text.cascade(low, high, values) for by, values in unsure.items()}
    fixed = {count: text.fixed(count) for count in range(low, high + 1)}
    curves["fixed counts"] = list(fixed.values())
    whole = curves["cascade by entropy"]
    curves["second runs at random"] = [whole[0], whole[-1]]
    curves["by entropy, first runs free"] = text.cascade(low, high, first.entropy_D, first_run=False)
    end = (max(cost for points in curves.values() for cost, _ in points), 0.0)  # all areas end at the largest cost
    at = {
        name: {count: value_at(points, cost) for count, (cost, _) in fixed.items()} for name, points in curves.items()
    }
    return {
        "low": low,
        "high": high,
        "documents": len(first.loss_D),
        "tokens": text.tokens,
        "area": {name: round(area([*points, end]), 5) for name, points in curves.items()},
        "fixed": {count: round(quality, 5) for count, (_, quality) in fixed.items()},
        "at_cost_of": at,
        "mean_entropy": round(float(first.entropy_D.mean()), 4),
    }


def value_at(points: Sequence[Point], cost: float) -> float:
    """The quality that the hull of some points reaches at a cost within it."""
    corners = hull(points)
    return round(float(np.interp(cost, [x for x, _ in corners], [y for _, y in corners])), 5)


def show(model: str, found: dict[str, Any]) -> None:
    counts = list(found["fixed"])
    print(
        f"\n{model}, {found['low']} then {found['high']}: {found['documents']} documents, {found['tokens']:,} tokens\n"
    )
    head = ["quality at the cost of", *(f"K = {count}" for count in counts), "area"]
    alone = ["that count alone", *(f"{found['fixed'][count]:.4f}" for count in counts), ""]
    rows = [
        [name, *(f"{found['at_cost_of'][name][count]:.4f}" for count in counts), f"{size:.4f}"]
        for name, size in found["area"].items()
    ]
    print(grid(head, [alone, *rows]))


def main(
    text: Annotated[Path, typer.Option(exists=True, help="text that none of them was trained on")],
    model: Annotated[list[str] | None, typer.Option(help="a folder or a bundled model's name")] = None,
    runs: Annotated[list[str], typer.Option(help="counts of the first and the second run")] = ["1:4", "2:4", "1:8"],  # noqa: B006
    most: Annotated[int, typer.Option(help="documents of the text")] = 100,
    threads: Annotated[int, typer.Option(help="0: all cores")] = 0,
) -> None:
    """Print tables for people and one JSON line for machines."""
    use_threads(threads)
    machine = facts()
    introduce(machine)
    pairs = [(int(low), int(high)) for low, _, high in (each.partition(":") for each in runs)]
    rows: list[dict[str, Any]] = []
    for name in model or bundled_models():
        scored = read(resolve_model(name), text, most, pairs, threads)
        for low, high in pairs:
            rows.append({"model": Path(name).name} | compare(scored, low, high))
            show(Path(name).name, rows[-1])
    print(json.dumps(machine | {"rows": rows}))


if __name__ == "__main__":
    typer.run(main)
