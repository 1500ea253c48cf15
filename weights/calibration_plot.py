"""Draws a calibration as SVG: quality against speed, a labelled point for each option, and the upper hull.

Standard library only: the HTTP process serves it. The colours are the reader's: light or dark, as the system is set.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from html import escape
from itertools import pairwise
from math import ceil, floor, log10

from model.errors import printable
from weights.calibration import Calibration, Option
from weights.calibration_hull import Point, hull

WIDTH, HEIGHT = 720, 440
LEFT, RIGHT, TOP, BOTTOM = 70, 24, 70, 52  # margins
LABEL, LINE = 6.6, 12  # width of a letter, height of a line
GAP = 6  # between a point and its name
STEPS = 16  # between two corners of the hull, which are curves where the axis is speed
TICKS = 6  # about so many on an axis
# What is drawn has its colours for light, also where a viewer reads no style; the style has those for dark.
STYLE = """
svg { background: #ffffff; font-family: system-ui, sans-serif }
@media (prefers-color-scheme: dark) {
svg { background: #16181c } text { fill: #e6e6e6 } .axis, .grid { stroke: #c8c8c8 } .hull { stroke: #a0a0a0 }
.point { fill: #6db3f2 } .trained { fill: #ff9a55 }
}
"""
TEXT, LINES, HULL, POINT, TRAINED = "#1a1a1a", "#444444", "#777777", "#1f6fb4", "#c4500c"


def curve(calibration: Calibration) -> list[Point]:
    """The hull as points of tokens per second of one stream, and relative quality.

    It is the hull over cost, time per token. Between two corners a share of the tokens runs at one, the rest at the
    other: times add up, so that in speed the line is bent. Beyond its last corner it is flat.
    """
    timed = [option for option in calibration.options if option.speed]
    corners = hull((1 / _rate(option), option.quality.relative) for option in timed)
    points = [(1 / cost, quality) for cost, quality in corners[:1]]
    for (cost, quality), (next_cost, next_quality) in pairwise(corners):
        for step in range(1, STEPS + 1):
            share = step / STEPS
            seconds = cost + share * (next_cost - cost)
            points.append((1 / seconds, quality + share * (next_quality - quality)))
    if points:
        points.append((min(_rate(option) for option in timed), corners[-1][1]))
    return points


def svg(calibration: Calibration) -> str:
    """A whole SVG document."""
    timed = [option for option in calibration.options if option.speed]
    plot = Plot.of([(_rate(option), option.quality.relative) for option in timed])
    title = f"{calibration.model}: quality against speed"
    kind = f"{calibration.dtype}, {calibration.kernels}"
    below = f"{calibration.machine}; {kind}; area under the hull {calibration.aiq:.4f}"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">',
        f"<title>{_escaped(title)}</title><style>{STYLE}</style>",
        text_at(LEFT, 22, title, size=15),
        text_at(LEFT, 40, below, size=11),
        *plot.axes("tokens/s, one stream", "relative quality"),
        f'<polyline class="hull" fill="none" stroke="{HULL}" points="{plot.line(curve(calibration))}"/>',
        *_options(timed, plot, calibration.trained),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


@dataclass(frozen=True, slots=True)
class Plot:
    """Where values lie in the picture."""

    x_ticks: Sequence[float]
    y_ticks: Sequence[float]

    @classmethod
    def of(cls, points: Sequence[Point]) -> "Plot":
        """A picture that has all these points."""
        return cls(_ticks([x for x, _ in points]), _ticks([y for _, y in points]))

    def x(self, value: float) -> float:
        return LEFT + _share(value, self.x_ticks) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - _share(value, self.y_ticks) * (HEIGHT - TOP - BOTTOM)

    def line(self, points: Iterable[Point]) -> str:
        return " ".join(f"{self.x(x):.1f},{self.y(y):.1f}" for x, y in points)

    def axes(self, x_name: str, y_name: str) -> list[str]:
        """Grid, numbers and names."""
        bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
        parts = [_path("axis", f"M{LEFT},{TOP}V{bottom}H{right}")]
        for value in self.x_ticks:
            parts.append(_path("grid", f"M{self.x(value):.1f},{TOP}V{bottom}", 0.15))
            parts.append(text_at(self.x(value), bottom + 18, f"{value:.10g}", anchor="middle"))
        for value in self.y_ticks:
            parts.append(_path("grid", f"M{LEFT},{self.y(value):.1f}H{right}", 0.15))
            parts.append(text_at(LEFT - 8, self.y(value) + 4, f"{value:.10g}", anchor="end"))
        parts.append(text_at((LEFT + right) / 2, HEIGHT - 12, x_name, anchor="middle"))
        middle = (TOP + bottom) / 2
        turned = f'transform="rotate(-90 16 {middle:.0f})"'
        return [*parts, text_at(16, middle, y_name, anchor="middle", more=turned)]


def _options(options: Sequence[Option], plot: Plot, trained: int) -> list[str]:
    """A point with its name for each option."""
    parts: list[str] = []
    names: list[_Name] = []
    for option in options:
        x, y = plot.x(_rate(option)), plot.y(option.quality.relative)
        kind, colour = ("trained", TRAINED) if option.name == f"k{trained}" else ("point", POINT)
        circle = f'<circle class="{kind}" fill="{colour}" cx="{x:.1f}" cy="{y:.1f}" r="4">'
        parts.append(f"{circle}<title>{_told(option)}</title></circle>")
        text = f"{option.name} (trained)" if kind == "trained" else option.name
        name = _Name.beside(x, y, text).apart(names)
        names.append(name)
        parts.append(text_at(name.left, name.y, text))
    return parts


@dataclass(frozen=True, slots=True)
class _Name:
    """Where the name of a point lies."""

    left: float
    right: float
    y: float

    @classmethod
    def beside(cls, x: float, y: float, text: str) -> "_Name":
        """To the right of a point, or to its left where it would leave the picture."""
        width = LABEL * len(text)
        left = x + GAP if x + GAP + width < WIDTH - RIGHT else x - GAP - width
        return cls(left, left + width, y - GAP)

    def apart(self, others: Sequence["_Name"]) -> "_Name":
        """Below those that it would cover."""
        for other in sorted(others, key=lambda name: name.y):
            if self.covers(other):
                return replace(self, y=other.y + LINE).apart(others)
        return self

    def covers(self, other: "_Name") -> bool:
        """Whether the two have letters in one place."""
        return self.left < other.right and self.right > other.left and abs(self.y - other.y) < LINE


def _told(option: Option) -> str:
    """What a pointer over the point shows."""
    text = f"{option.name}: relative quality {option.quality.relative:.4f}, {_rate(option):.0f} tokens/s"
    return _escaped(text)


def _rate(option: Option) -> float:
    assert option.speed is not None
    return option.speed.tokens_per_second["1"]


def _ticks(values: Sequence[float]) -> list[float]:
    """Round numbers that cover the values."""
    least, most = min(values, default=0.0), max(values, default=1.0)
    span = most - least or abs(most) or 1.0
    power = 10.0 ** floor(log10(span / TICKS))
    step = next(power * factor for factor in (1, 2, 5, 10) if span / (power * factor) <= TICKS)
    first, last = floor(least / step), ceil(most / step)
    return [number * step for number in range(first, max(last, first + 1) + 1)]


def _share(value: float, ticks: Sequence[float]) -> float:
    return (value - ticks[0]) / (ticks[-1] - ticks[0])


def _escaped(text: str) -> str:
    """As XML has it, which has no place at all for control characters."""
    return escape(printable(text))


def _path(kind: str, line: str, opacity: float = 1) -> str:
    return f'<path class="{kind}" fill="none" stroke="{LINES}" stroke-opacity="{opacity:g}" d="{line}"/>'


def text_at(x: float, y: float, text: str, size: int = 12, anchor: str = "start", more: str = "") -> str:
    """A text element."""
    place = f'x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" fill="{TEXT}"'
    return f"<text {place} {more}>{_escaped(text)}</text>"
