"""Opens a calibration: where its files go, the loaded engine, the text and the tasks. It measures nothing."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from calibration import partial as partials
from calibration.counts import grid
from calibration.options import Options
from calibration.partial import Partial
from calibration.progress import Progress
from calibration.repair_fit import Tables
from calibration.run import Run
from calibration.scoring import Scorer
from calibration.source import Source
from calibration.tasks import Task, read_task
from calibration.texts import hash_of
from engine.build import build_engine
from engine.runner import ModelRunner
from engine.types import EngineSettings
from model.budget import ExpertBudget
from model.errors import CheckpointError
from weights import calibration as files
from weights.config import read_config
from weights.folder import beside, resolve_model
from weights.repair import neutral_tables
from weights.small_files import TOKENIZER, small_files
from weights.tokenizer import Tokenizer

WINDOW = 512  # tokens that are scored in a row, unless the context is shorter
MAX_ROWS = 16  # sequences at a time
QUESTIONS_PER_MINUTE = 100  # of each task


@dataclass(frozen=True, slots=True)
class Opened:
    """A run, and what belongs to its report."""

    run: Run
    checkpoint: str  # hash
    text: str  # what is scored, in words
    tasks: tuple[Task, ...]


@contextmanager
def opened(options: Options) -> Iterator[Opened]:
    """Everything that measuring needs. Partial results are written where it ends early, whatever the reason.

    Raises:
        CheckpointError, InvalidRequest: the model, a text, a task or an option cannot be used.
    """
    path = resolve_model(options.model)
    settings = _settings(path, options)
    checkpoint = files.checkpoint_hash(path)
    work = work_folder(path, options.output)
    partial = Partial(work / partials.FILE, _key(options, checkpoint))
    try:
        yield _open(options, settings, checkpoint, work, partial)
    except BaseException:
        partial.flush()
        raise


def _open(options: Options, settings: EngineSettings, checkpoint: str, work: Path, partial: Partial) -> Opened:
    path, progress = Path(settings.model), Progress()
    if partial.resumed:
        progress.say(f"going on from {partial.path}")
    has_tokenizer = small_files(path, options.tokenizer).has(TOKENIZER)
    tokenizer = Tokenizer.load(path, tokenizer=options.tokenizer) if has_tokenizer else None
    tasks = _tasks(options, tokenizer, settings.max_model_len)
    repair = Tables(*neutral_tables(read_config(path)[0]))
    engine, info = build_engine(settings, (repair.scale, repair.shift))
    runner = engine.runner
    assert isinstance(runner, ModelRunner)
    counts = grid(info.experts, options.asked_counts)
    trained = ExpertBudget((info.experts.trained,) * info.experts.layers)
    scorer = Scorer(runner, trained, partial, progress)
    source = Source(tuple(options.texts), tokenizer, info.vocabulary, info.max_model_len, options.minutes)
    budgets = [ExpertBudget((count,) * info.experts.layers) for count in counts]
    decide, report = source.windows(engine, scorer, [*budgets, trained], partial, progress)
    run = Run(
        model=path,
        work=work,
        engine=engine,
        runner=runner,
        info=info,
        counts=counts,
        decide=decide,
        report=report,
        repair=repair,
        scorer=scorer,
        partial=partial,
        progress=progress,
        minutes=options.minutes,
    )
    return Opened(run, checkpoint, source.described(report), tasks)


def _tasks(options: Options, tokenizer: Tokenizer | None, length: int) -> tuple[Task, ...]:
    """The questions of each file, as many as the time allows."""
    if options.task_files and tokenizer is None:
        raise CheckpointError("--tasks needs a tokenizer.json beside the weights")
    most = max(1, round(QUESTIONS_PER_MINUTE * options.minutes))
    return tuple(read_task(path, tokenizer, length, most) for path in options.task_files if tokenizer)


def work_folder(model: Path, output: Path | None) -> Path:
    """Where files are written: `output`, or beside the checkpoint, or if that is read-only a cache folder.

    Raises:
        CheckpointError: no such place can be written.
    """
    places = (output,) if output else (beside(model), files.cache_folder(model))
    for place in places:
        if writable(place):
            return place
    raise CheckpointError(f"{places[-1]} cannot be written; --output names another folder")


def writable(folder: Path) -> bool:
    """Whether a file can be made there; the folder itself is made as well."""
    probe = folder / f".calibration.{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError:
        return False
    return True


def _key(options: Options, checkpoint: str) -> dict[str, str]:
    """What partial results belong to. Neither price, plots nor places change a result."""
    settings = (
        options.dtype,
        options.quantize,
        options.quantize_layers,
        options.kv_cache_dtype,
        options.threads,
        options.allow_extrapolated_experts,
    )
    return {
        "checkpoint": checkpoint,
        "text": hash_of(options.texts),
        "tasks": hash_of(options.task_files),
        "settings": repr((files.FORMAT, options.asked_counts, options.minutes, *settings)),
    }


def _settings(path: Path, options: Options) -> EngineSettings:
    """An engine for measuring: nothing is remembered between sequences, and only tokens bound a step.

    Raises:
        CheckpointError: the model has no experts to choose among, or predicts no tokens of a text.
        InvalidRequest: a count that it cannot run.
    """
    config, _ = read_config(path)
    if not config.mixtures:
        raise CheckpointError(f"{path} has no mixture-of-experts layers, so there is no count to calibrate")
    if config.score_refusal:
        raise CheckpointError(f"{path} cannot be calibrated by texts: {config.score_refusal}")
    grid(replace(config, extrapolates=options.allow_extrapolated_experts).experts, options.asked_counts)
    return EngineSettings(
        model=str(path),
        tokenizer=str(options.tokenizer or ""),
        dtype=options.dtype,
        device="cpu",  # tables of repair are changed in place while they are fitted
        allow_extrapolated_experts=options.allow_extrapolated_experts,
        quantize=options.quantize,
        quantize_layers=options.quantize_layers,
        kv_cache_dtype=options.kv_cache_dtype,
        threads=options.threads,
        max_model_len=min(WINDOW, config.context),
        max_running=MAX_ROWS,
        step_ms=0,
        prefix_cache=False,
    )
