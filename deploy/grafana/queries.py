"""A panel of the Grafana board, and the queries that panels are made of: rates, sums and quantiles of one series.

It depends on the labels of series and Grafana's variables for them; the names of series are in `panels.py`.
"""

from dataclasses import dataclass
from typing import Literal

SERVER = 'job=~"$job",instance=~"$instance"'
MODEL = f'{SERVER},model_name=~"$model_name"'
COUNT = f'{MODEL},num_experts=~"$num_experts"'
RANGE = "[$__rate_interval]"


@dataclass(frozen=True, slots=True)
class Panel:
    """One panel. `queries` are expressions with their legends; `unit` is one of Grafana's."""

    title: str
    description: str
    unit: str
    queries: tuple[tuple[str, str], ...]
    kind: Literal["timeseries", "stat", "heatmap"] = "timeseries"
    stacking: Literal["none", "normal", "percent"] = "none"
    width: int = 8


def rate(name: str, labels: str = MODEL) -> str:
    return f"rate(moedial:{name}{{{labels}}}{RANGE})"


def total(name: str, by: str = "", labels: str = MODEL) -> str:
    """The rate of a counter, summed over all labels but those of `by`."""
    return f"sum{f' by ({by})' if by else ''} ({rate(name, labels)})"


def gauge(name: str, by: str = "instance") -> str:
    return f"sum by ({by}) (moedial:{name}{{{MODEL}}})"


def quantile(share: float, name: str, by: str = "num_experts", labels: str = COUNT) -> str:
    groups = "le, " + by if by else "le"
    return f"histogram_quantile({share}, sum by ({groups}) ({rate(f'{name}_bucket', labels)}))"


def by_count(name: str) -> tuple[tuple[str, str], ...]:
    """The median and the 95th percentile of a histogram, by expert count."""
    return tuple((quantile(share, name), f"p{share * 100:.0f} K={{{{num_experts}}}}") for share in (0.5, 0.95))


def ratio(part: str, rest: str) -> str:
    """The share of one rate in the sum of two."""
    return f"{part} / ({part} + {rest})"


def or_zero(expression: str) -> str:
    """0 where a series with labels of its own has no sample yet."""
    return f"({expression}) or vector(0)"


def stat(title: str, description: str, unit: str, expression: str) -> Panel:
    return Panel(title, description, unit, ((expression, ""),), "stat", width=4)
