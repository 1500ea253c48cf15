"""Draws the picture of README.md: loss against speed at each count, a line per bundled model. It measures nothing."""

from html import escape

from docs.calibrated import Calibrations, plain_counts
from weights.calibration import Option
from weights.calibration_plot import HEIGHT, LEFT, STYLE, WIDTH, Plot, text_at

COLOURS = (("#1f6fb4", "#6db3f2"), ("#c4500c", "#ff9a55"), ("#3a7d2c", "#7fce6e"))  # of a line, in light and dark

NAME = 36  # width of a point's name


def svg(calibrations: Calibrations) -> str:
    """A whole SVG document: fewer experts to the right, where more tokens per second are; lower is better."""
    lines = {name: [one for one in plain_counts(found) if one.speed] for name, found in calibrations.items()}
    plot = Plot.of([_point(option) for options in lines.values() for option in options])
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">',
        f"<title>loss against speed at each expert count</title><style>{STYLE}{_colours(len(lines))}</style>",
        text_at(LEFT, 22, "one model, one process: every request chooses K", size=15),
        *plot.axes("tokens/s, one stream", "held-out loss, nats per token (lower is better)"),
    ]
    for number, (name, options) in enumerate(lines.items()):
        parts.append(text_at(LEFT + 170 * number, 42, f"● {name}", more=f'class="name{number}"'))
        parts.append(f'<polyline class="line{number}" points="{plot.line(map(_point, options))}"/>')
        parts += [_dot(plot, option, number) for option in options]
    return "\n".join([*parts, "</svg>"]) + "\n"


def _point(option: Option) -> tuple[float, float]:
    assert option.speed is not None
    return option.speed.tokens_per_second["1"], option.quality.loss


def _dot(plot: Plot, option: Option, number: int) -> str:
    """A point with its count; only powers of two are named. Lines rise to the right: above and left is free."""
    x, y = (place(value) for place, value in zip((plot.x, plot.y), _point(option), strict=True))
    count = option.counts[0]
    told = escape(f"K = {count}: loss {option.quality.loss:.4f}, {_point(option)[0]:.0f} tokens/s")
    dot = f'<circle class="name{number}" cx="{x:.1f}" cy="{y:.1f}" r="4"><title>{told}</title></circle>'
    if count & (count - 1):
        return dot
    if x < LEFT + NAME:  # left of the point is the axis
        return dot + text_at(x + 6, y + 15, f"K={count}", 11)
    return dot + text_at(x - 6, y - 6, f"K={count}", 11, "end")


def _colours(lines: int) -> str:
    light = "".join(_rules(number, COLOURS[number % len(COLOURS)][0]) for number in range(lines))
    dark = "".join(_rules(number, COLOURS[number % len(COLOURS)][1]) for number in range(lines))
    return f"{light}@media (prefers-color-scheme: dark) {{ {dark} }}\n"


def _rules(number: int, colour: str) -> str:
    line = f".line{number} {{ stroke: {colour}; fill: none; stroke-width: 2 }}\n"
    return f".name{number} {{ fill: {colour} }}\n{line}"
