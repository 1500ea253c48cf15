"""Two plots: the losses of a run, and the shipped models' quality per expert count (`python -m training.plot`)."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure

matplotlib.use("Agg")


def plot_losses(log: Sequence[Mapping[str, float]], path: Path, title: str) -> None:
    """Draw every series of the log against the step."""
    figure, axes = pyplot.subplots(figsize=(7, 4))
    steps = [row["step"] for row in log]
    for name in (name for name in (log[0] if log else {}) if name != "step"):
        axes.plot(steps, [row[name] for row in log], label=name)
    axes.set(xlabel="step", ylabel="loss (nats per token)", title=title)
    _save(figure, axes, path)


def plot_quality(cards: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw each model's held-out loss against the expert count."""
    figure, axes = pyplot.subplots(figsize=(6, 3.2))
    for card in cards:
        rows = card["quality"]
        counts = [row["num_experts"] for row in rows]
        losses = [row["loss"] for row in rows]
        axes.plot(counts, losses, marker="o", label=card["name"])
    axes.set_xscale("log", base=2)
    axes.set_xticks([1, 2, 4, 8], labels=["1", "2", "4", "8"])
    axes.set(xlabel="experts per token (K), chosen per request", ylabel="held-out loss (nats)")
    axes.grid(alpha=0.3)
    _save(figure, axes, path)


def _save(figure: Figure, axes: Axes, path: Path) -> None:
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    cards = [json.loads(card.read_text()) for card in sorted(Path("weights/bundled").glob("*/card.json"))]
    plot_quality(cards, Path("docs/quality.png"))
