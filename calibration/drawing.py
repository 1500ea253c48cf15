"""Draws a calibration into a file: SVG by `weights/calibration_plot.py`, PNG by matplotlib, only here."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from model.errors import InvalidRequest
from weights.calibration import Calibration
from weights.calibration_plot import curve, svg

KINDS = (".svg", ".png")


def check(paths: Sequence[Path]) -> None:
    """Raises InvalidRequest, before anything is measured, where a plot could not be drawn or written."""
    for path in paths:
        if path.suffix.lower() not in KINDS:
            raise InvalidRequest(f"--plot {path}: the name must end in one of {', '.join(KINDS)}", "plot")
        if path.suffix.lower() == ".png" and find_spec("matplotlib") is None:
            raise InvalidRequest("--plot FILE.png needs matplotlib: pip install 'moedial[training]'", "plot")
        if not path.absolute().parent.is_dir():
            raise InvalidRequest(f"--plot {path}: {path.absolute().parent} is no folder", "plot")


def draw(calibration: Calibration, path: Path) -> None:
    """Write the plot of quality against speed."""
    if path.suffix.lower() == ".svg":
        path.write_text(svg(calibration), encoding="utf-8")
    else:
        _png(calibration, path)


def _png(calibration: Calibration, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    line = curve(calibration)
    axes.plot([x for x, _ in line], [y for _, y in line], color="#777777", label=f"hull, AIQ {calibration.aiq:.4f}")
    for option in calibration.options:
        if option.speed is not None:
            point = (option.speed.tokens_per_second["1"], option.quality.relative)
            axes.plot(*point, marker="o", color="#1f77b4")
            axes.annotate(option.name, point, xytext=(4, 4), textcoords="offset points", fontsize=8)
    axes.set(title=calibration.model, xlabel="tokens/s, one stream", ylabel="relative quality")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=110)
