"""The losses of a run, drawn against the step."""

from collections.abc import Mapping, Sequence
from pathlib import Path


def plot_losses(log: Sequence[Mapping[str, float]], path: Path, title: str) -> None:
    """Draw every series of the log against the step."""
    from matplotlib.figure import Figure  # here: its import takes most of a second

    figure = Figure(figsize=(7, 4))
    axes = figure.subplots()
    steps = [row["step"] for row in log]
    for name in (name for name in (log[0] if log else {}) if name != "step"):
        axes.plot(steps, [row[name] for row in log], label=name)
    axes.set(xlabel="step", ylabel="loss (nats per token)", title=title)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
