"""A calibration as tables for people: what each option keeps, what it answers, and what it costs."""

from rich.console import Console
from rich.table import Table

from weights.calibration import Calibration, Option

QUALITY = ("loss", "perplexity", "agreement", "KL", "relative")
SPEED = ("tokens/s", "at 16", "prefill", "MB/token", "MFLOP", "cost")
MEANS = (
    "tokens/s of one stream, of 16, and of prompts; bytes read and operations of one token; "
    "cost: time per token of one stream over the trained count's"
)


def show(calibration: Calibration, console: Console) -> None:
    """Print one row per option in each table, and the area under the hull."""
    console.print(_quality(calibration))
    if calibration.options[0].quality.tasks:
        console.print(_tasks(calibration))
    console.print(_speed(calibration))
    area = "area under the hull of relative quality over cost (AIQ)"
    console.print(f"{area}: {calibration.aiq:.4f}", highlight=False)


def _quality(calibration: Calibration) -> Table:
    scored = f"{calibration.text}; {calibration.tokens:,} tokens scored; trained count {calibration.trained}"
    table = _table(f"{calibration.model}: quality", scored, QUALITY)
    for option in calibration.options:
        quality = option.quality
        figures = (f"{quality.loss:.4f}", f"{quality.perplexity:.3f}", f"{quality.agreement:.1%}")
        table.add_row(option.name, *figures, f"{quality.kl:.4f}", f"{quality.relative:.4f}")
    return table


def _tasks(calibration: Calibration) -> Table:
    names = tuple(calibration.options[0].quality.tasks)
    table = _table(f"{calibration.model}: tasks", "share of right answers", names)
    for option in calibration.options:
        table.add_row(option.name, *(f"{option.quality.tasks[name]:.3f}" for name in names))
    return table


def _speed(calibration: Calibration) -> Table:
    kind = f"{calibration.dtype}, {calibration.kernels}, {calibration.machine}"
    priced = ("price/M",) if calibration.cost_per_million else ()
    names = (*SPEED, *priced)
    table = _table(f"{calibration.model}: speed", f"{MEANS}; {kind}", names)
    for option in calibration.options:
        price = [f"{calibration.cost_per_million[option.name]:.4g}"] if priced else []
        table.add_row(option.name, *_rates(option), *_work(option), f"{option.relative_cost:.3f}", *price)
    return table


def _table(title: str, caption: str, columns: tuple[str, ...]) -> Table:
    table = Table(title=title, caption=caption)
    table.add_column("option")
    for name in columns:
        table.add_column(name, justify="right")
    return table


def _rates(option: Option) -> list[str]:
    if option.speed is None:
        return ["", "", ""]
    rates = [*option.speed.tokens_per_second.values(), option.speed.prefill_tokens_per_second]
    return [f"{rate:.0f}" for rate in rates]


def _work(option: Option) -> list[str]:
    return [f"{option.bytes_per_token / 1e6:.1f}", f"{option.flops_per_token / 1e6:.1f}"]
