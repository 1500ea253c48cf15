"""The losses of a run, drawn against the step."""

from collections.abc import Mapping, Sequence
from pathlib import Path

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


def _save(figure: Figure, axes: Axes, path: Path) -> None:
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
