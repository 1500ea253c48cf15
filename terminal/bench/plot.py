"""Draws a run: distributions of TTFT and ITL by count, and the speed of one stream. The only module with matplotlib."""

from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from terminal.bench.figures import by_count, percentile, series
from terminal.bench.load import RunResult
from terminal.counts import Count, label
from terminal.errors import BadOption

if TYPE_CHECKING:
    from matplotlib.axes import Axes

GREY = "#777777"  # of requests without a count, which are not on the scale


def check(path: Path) -> None:
    """Raises BadOption, before the run, where the plot cannot be drawn or written."""
    if find_spec("matplotlib") is None:
        raise BadOption("--plot needs matplotlib: pip install 'moedial[training]'")
    from matplotlib.figure import Figure

    formats = Figure().canvas.get_supported_filetypes()
    if path.suffix.lstrip(".").lower() not in formats:
        raise BadOption(f"--plot {path}: the name must end in one of {', '.join(sorted(formats))}")


def draw(run: RunResult, path: Path, title: str) -> None:
    """Write the plot of a run to a file."""
    from matplotlib.figure import Figure

    groups = by_count(run.outcomes)
    colours = _colours(list(groups))
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    first, gaps, speed = figure.subplots(1, 3)
    for axes, name, head in ((first, "ttft_ms", "time to first token"), (gaps, "itl_ms", "between events of a stream")):
        values = {count: sorted(series(outcomes, name)) for count, outcomes in groups.items()}
        _cumulative(axes, values, colours)
        axes.set(title=head, xlabel="ms, as far as the 99th percentile", ylabel="share of the values", ylim=(0, 1.02))
    _boxes(speed, {count: series(outcomes, "stream_tokens_per_second") for count, outcomes in groups.items()}, colours)
    speed.set(title="speed of one stream", xlabel="experts per token (K)", ylabel="tokens/s")
    figure.suptitle(title, fontsize="medium")
    figure.savefig(path, dpi=110)


def _colours(counts: list[Count | None]) -> dict[Count | None, str]:
    """Light to dark as the count grows."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    known = [count for count in counts if count is not None]
    colours: dict[Count | None, str] = {None: GREY}
    for i, count in enumerate(known):
        position = i / max(1, len(known) - 1)
        colours[count] = to_hex(colormaps["viridis_r"](0.15 + 0.85 * position))
    return colours


def _cumulative(axes: "Axes", values: dict[Count | None, list[float]], colours: dict[Count | None, str]) -> None:
    for count, ordered in values.items():
        if ordered:
            axes.ecdf(ordered, color=colours[count], label=_name(count))
    axes.grid(alpha=0.3)
    if drawn := sorted(chain.from_iterable(values.values())):
        axes.set_xlim(0, percentile(drawn, 0.99) * 1.02 or 1)
        axes.legend(loc="lower right", fontsize="small")


def _boxes(axes: "Axes", values: dict[Count | None, list[float]], colours: dict[Count | None, str]) -> None:
    drawn = {count: found for count, found in values.items() if found}
    axes.grid(alpha=0.3, axis="y")
    if not drawn:
        return
    names = [label(count) for count in drawn]
    boxes = axes.boxplot(list(drawn.values()), tick_labels=names, patch_artist=True, widths=0.5)
    for box, count in zip(boxes["boxes"], drawn, strict=True):
        box.set_facecolor(colours[count])
    for median in boxes["medians"]:
        median.set_color("black")
    axes.set_ylim(bottom=0)


def _name(count: Count | None) -> str:
    return label(count) if count is None else f"K = {label(count)}"
