"""The loss plot at the end of a run. Nothing else."""

from collections.abc import Mapping, Sequence
from pathlib import Path


def plot_losses(log: Sequence[Mapping[str, float]], path: Path, title: str) -> None:
    """Draw every series of the log against the step."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for name in (name for name in (log[0] if log else {}) if name != "step"):
        axes.plot([row["step"] for row in log], [row[name] for row in log], label=name)
    axes.set(xlabel="step", ylabel="loss (nats per token)", title=title)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
