"""Runs a whole calibration: loads the model, scores, searches, times, writes the file, prints and draws it."""

import hashlib
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console

from calibration import allocation, drawing, normalisers, repair, speed, table, thresholds
from calibration.found import Found, Search
from calibration.machine import processor
from calibration.measure import Measured, aiq, cost_per_million, option
from calibration.opening import Opened, opened
from calibration.options import Options
from calibration.run import Run
from calibration.tasks import CachedRunner, Task, accuracy
from calibration.work import DecoderWork, Weights
from engine.types import EngineInfo
from model.budget import ExpertBudget
from weights import calibration as files
from weights.calibration import Calibration
from weights.folder import model_name

# What looks for further options, in this order.
TIMING_SHARE = 0.2  # of the time
SEARCHES: tuple[Search, ...] = (normalisers.search, repair.search, allocation.search, thresholds.search)


def run(options: Options, searches: Sequence[Search] = SEARCHES) -> Path:
    """Calibrate; returns where `calibration.json` is.

    An interruption leaves partial results, from which the same call goes on.

    Raises:
        CheckpointError, InvalidRequest: the model, a text, a task or an option cannot be used.
    """
    drawing.check(options.plots)
    with opened(options) as found:
        extra = [search(found.run) for search in (searches if options.searches else ())]
        calibration = measured(found, options, extra)
        place_repair(extra, found.run.work)
        path = files.write(calibration, found.run.work)
        for plot in options.plots:
            drawing.draw(calibration, plot)
        found.run.partial.forget()
    table.show(calibration, Console())
    print(f"written: {path}", file=sys.stderr)
    return path


def measured(found: Opened, options: Options, extra: Sequence[Found]) -> Calibration:
    """All that the command measures, as the file's content."""
    run = found.run
    budgets = {f"k{count}": run.uniform(count) for count in run.counts}
    for each in extra:
        budgets |= each.options
    choices = _choices(extra)
    rows = _measure(run, budgets, found.tasks, choices.get("repair_hash", ""), options.minutes)
    trained = rows[list(budgets).index(f"k{run.experts.trained}")]
    work = DecoderWork.of(run.config)
    weights = Weights.of(run.info.loaded_bytes, options.quantize, options.quantize_layers)
    made = tuple(option(row, trained, work, weights) for row in rows)
    return Calibration(
        format=files.FORMAT,
        checkpoint=found.checkpoint,
        model=model_name(run.model),
        version=version("moedial"),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        machine=processor(),
        dtype=run.info.dtype,
        quantize=run.info.quantize,
        kv_cache_dtype=run.info.kv_cache_dtype,
        kernels=kernels(run.info),
        text=found.text,
        tokens=run.report.tokens,
        trained=run.experts.trained,
        layers=run.experts.layers,
        options=made,
        aiq=aiq(made),
        price_per_hour=options.price_per_hour,
        cost_per_million=cost_per_million(made, options.price_per_hour),
        **choices,
    )


def _measure(
    run: Run, budgets: dict[str, ExpertBudget], tasks: Sequence[Task], salt: str, minutes: float
) -> list[Measured]:
    """Quality on the reported text, tasks, and speed, of every budget."""
    each = list(budgets.values())
    scores = run.score(each, run.report, salt)
    cached = CachedRunner(run.runner, run.info.kv_blocks)
    answers: list[dict[str, float]] = []
    for budget in each:
        rates: dict[str, float] = {}
        for task in tasks:
            rates |= accuracy(cached, budget, task, run.partial, run.progress)
        answers.append(rates)
    clock = speed.Clock(run.engine, run.info.vocabulary, run.info.max_model_len)
    speeds = speed.measure(clock, each, TIMING_SHARE * minutes * 60, run.partial, run.progress)
    rows = zip(budgets, each, scores, answers, speeds, strict=True)
    return [Measured(*row) for row in rows]


def _choices(found: Sequence[Found]) -> dict[str, Any]:
    """What the searches chose, as fields of the calibration."""
    named = ("profiles", "normalisers", "thresholds")
    chosen: dict[str, Any] = {name: {} for name in named}
    for each in found:
        for name in named:
            chosen[name] = chosen[name] | getattr(each, name)
        if each.repair_file is not None:
            chosen |= {"repaired": each.repaired, "repair_hash": file_hash(each.repair_file)}
    return chosen


def place_repair(found: Sequence[Found], work: Path) -> None:
    """Move the statistics of repairs to where the calibration goes; those of an earlier calibration end with it."""
    target = work / files.REPAIR_FILE
    made = [each.repair_file for each in found if each.repair_file is not None]
    if made:
        made[0].replace(target)
    else:
        target.unlink(missing_ok=True)


def kernels(info: EngineInfo) -> str:
    """What the engine runs on, and what it has quantized."""
    return info.kernels if info.quantize == "none" else f"{info.kernels}, {info.quantize}"


def file_hash(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
