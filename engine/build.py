"""Builds an engine from its settings: loads the model, chooses its backend, and has the engine assembled around it.

Not here: how scheduler, cache and runner are connected (`engine/assembly.py`), how large the KV cache is
(`engine/sizes.py`), what the engine says of its model (`engine/description.py`), and the process with its socket
(`engine/process/worker.py`).
"""

import logging
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from engine.assembly import assemble, pools
from engine.calibrate import measure
from engine.description import describe
from engine.engine import Engine
from engine.grammars.compiler import GrammarCompiler
from engine.memory import give_back_freed_memory, keep_freed_memory, log_device, log_resources
from engine.packing import ReadyModel, start_packed
from engine.progress import LoadingProgress
from engine.sizes import block_size, cache_sizes, model_length
from engine.types import EngineInfo, EngineSettings, Request, Sampling, TokenEvent
from model.backends import choose
from model.backends.base import Backend, Runnable
from model.budget import ExpertBudget
from model.decoder import Decoder, parameter_count
from model.devices import CPU, make_current, resolve
from model.errors import CheckpointError, InvalidRequest
from model.options import Options
from model.ranks.share import Share
from model.resources import available_cores
from model.shapes.decoder import DecoderConfig
from weights.config import read_config
from weights.folder import resolve_model
from weights.groups import KeepGroups, bytes_per_weight, kept_as
from weights.load import empty_model, load_model, run_dtype
from weights.packed import is_packed
from weights.repair import LoadedRepair, give_tables, load_repair
from weights.sizes import weight_files
from weights.small_files import TOKENIZER, small_files
from weights.tokenizer import Tokenizer

log = logging.getLogger(__name__)


def build_engine(settings: EngineSettings, tables: tuple[Tensor, Tensor] | None = None) -> tuple[Engine, EngineInfo]:
    """Load the model and assemble the engine around it.

    `tables`: repair statistics to run with instead of the checkpoint's calibration (see `weights.repair.give_tables`).

    Raises:
        CheckpointError: the model cannot be loaded, its device is not there, or its cache does not fit the memory.
    """
    started = time.perf_counter()
    keep_freed_memory()
    log_resources()
    device = resolve(settings.device)
    log_device(device, settings.device)
    make_current(device)
    settings = replace(settings, device=device)
    local = 1 if settings.rank_address else settings.ranks
    threads = settings.threads or max(1, available_cores().value // local)
    torch.set_num_threads(threads)  # for reading the weights
    path = resolve_model(settings.model)
    config, raw = read_config(path)
    dtype = run_dtype(raw, settings.dtype)
    check(config, settings, dtype)
    cache_sizes(config, settings, dtype, overlaps=device != CPU)
    tokenizer = tokenizer_for(path, config, settings)
    choose.provide(device)
    if is_packed(path):
        ready = start_packed(path, config, settings, dtype, options_of(config, settings, threads))
    else:
        ready = start_checkpoint(path, config, settings, threads, tables)
    model = ready.model
    give_back_freed_memory()
    grammars = grammars_for(settings.tokenizer or path, model.config, tokenizer)
    engine, blocks = assemble(model, settings, grammars=grammars)
    load_seconds, described = time.perf_counter() - started, describe(model, settings, ready.kept)
    info = EngineInfo(
        family=raw["model_type"],
        parameters=ready.parameters,
        kv_blocks=blocks,
        kernels_reason=ready.kernels_reason,
        load_seconds=load_seconds,
        calibration_reason=ready.calibration_reason,
        expert_bytes=ready.expert_bytes,
        weight_files=weight_files(path),
        loaded_bytes=ready.loaded_bytes,
        **described,
    )
    compute_one_token(engine, info)
    if not settings.step_ms:
        return engine, info
    engine.scheduler.cost = measure(
        engine.runner, info, pools(model.config), settings.max_step_tokens, token_buckets=model.token_buckets
    )
    return engine, replace(info, step_cost=engine.scheduler.cost)


def start_checkpoint(
    path: Path, config: DecoderConfig, settings: EngineSettings, threads: int, tables: tuple[Tensor, Tensor] | None
) -> ReadyModel:
    """The model of a checkpoint, with its ranks where there are several."""
    share, group = None, None
    if settings.ranks > 1:
        from engine.ranks.group import RankGroup  # here, since it imports torch.distributed

        share, group = Share(0, settings.ranks), RankGroup(settings, path, threads)
    loaded, calibration_reason = load(path, settings, tables, share)
    parameters = parameter_count(loaded if share is None else empty_model(config, loaded.dtype))
    expert_bytes = group.connect(loaded) if group else ()
    kept, loaded_bytes = kept_as(loaded), bytes_per_weight(loaded)
    model, reason = prepare(loaded, settings, threads)
    return ReadyModel(model, parameters, kept, loaded_bytes, reason, calibration_reason, expert_bytes)


def load(
    path: Path, settings: EngineSettings, tables: tuple[Tensor, Tensor] | None, share: Share | None = None
) -> tuple[Decoder, str]:
    """The decoder, or a rank's part of it, with the repair statistics of its calibration or `tables`, and why the
    calibration is not used."""
    keep = keep_groups(path, settings)
    with LoadingProgress(settings.terminal_columns) as progress:
        loaded, _ = load_model(path, settings.dtype, progress, resolve(settings.device), share, keep)
    loaded.config = replace(loaded.config, extrapolates=settings.allow_extrapolated_experts)
    if tables is None:
        repair = load_repair(loaded, path)
    else:
        give_tables(loaded, *tables)
        repair = LoadedRepair(tuple(range(1, loaded.config.experts.trained)))  # the caller finds where it helps
    loaded.config = replace(loaded.config, repaired=repair.repaired)
    return loaded, repair.reason


def keep_groups(path: Path, settings: EngineSettings) -> KeepGroups | None:
    """The function that names the parameters which stay quantised as in the checkpoint: those that the backend can
    multiply so. None if the settings ask for another format."""
    if settings.quantize != "none" or settings.dtype != "auto":
        return None
    config, raw = read_config(path)
    return backend_for(config, settings, run_dtype(raw, settings.dtype)).groups


def check(config: DecoderConfig, settings: EngineSettings, dtype: torch.dtype) -> None:
    """Refuse settings that the config does not allow, before the weights are read: a large model takes minutes."""
    model_length(config, settings)
    experts = replace(config, extrapolates=settings.allow_extrapolated_experts).experts
    try:
        for count in settings.aliases.values():
            experts.budget(count, "aliases")
        if settings.default_num_experts:
            experts.budget(settings.default_num_experts, "default_num_experts")
    except InvalidRequest as error:
        raise CheckpointError(error.message) from None
    backend_for(config, settings, dtype)


def backend_for(config: DecoderConfig, settings: EngineSettings, dtype: torch.dtype) -> Backend:
    """The backend that will run the model. Raises CheckpointError if all refuse."""
    options = replace(options_of(config, settings), dtype=str(dtype).removeprefix("torch."))
    backend, _ = choose.choose(config, options)
    return backend


def tokenizer_for(path: Path, config: DecoderConfig, settings: EngineSettings) -> Tokenizer | None:
    """The tokenizer of the checkpoint at `path`, or the one in its place; None where it has none.

    Raises:
        CheckpointError: it is damaged, or has ids outside the model's vocabulary.
    """
    other = Path(settings.tokenizer) if settings.tokenizer else None
    if not small_files(path, other).has(TOKENIZER):
        return None
    tokenizer = Tokenizer.load(path, settings.generation_config == "auto", other)
    if beyond := tokenizer.check_ids(config.vocabulary):
        log.warning("%d special tokens have no embedding; a prompt that holds one is refused", len(beyond))
    return tokenizer


def grammars_for(path: Path | str, config: DecoderConfig, tokenizer: Tokenizer | None) -> GrammarCompiler | None:
    """The grammar compiler for a checkpoint's vocabulary; None if it has no tokenizer or no end-of-text token."""
    ends = tokenizer.eos_ids if tokenizer else ()
    return GrammarCompiler(str(path), config.vocabulary, ends) if ends else None


def compute_one_token(engine: Engine, info: EngineInfo) -> None:
    """Compute one token. Raises CheckpointError if that fails, since every request would fail as well."""
    budget = ExpertBudget((info.experts.trained,) * info.experts.layers)
    try:
        engine.add(Request("first", (0,), budget, Sampling(max_tokens=1, seed=0, temperature=0.0)))
    except InvalidRequest as error:  # its context has no room for one
        raise CheckpointError(f"the model cannot compute a token: {error}") from None
    events: list[TokenEvent] = []
    while engine.has_work:
        events += engine.step().events
    if events[-1].finish == "error":
        raise CheckpointError(f"the model cannot compute a token: {events[-1].error}")


def prepare(model: Decoder, settings: EngineSettings, threads: int = 0) -> tuple[Runnable, str]:
    """The decoder on the fastest backend that runs it, and why it is not a faster one. A backend may take over the
    weights.

    Raises:
        CheckpointError: no backend runs it.
    """
    runnable, reason = choose.prepare(model, options_of(model.config, settings, threads))
    if reason:
        log.warning("running on %s: %s", runnable.kernels, reason)
    return runnable, reason


def options_of(config: DecoderConfig, settings: EngineSettings, threads: int = 0) -> Options:
    """What a backend needs to know of the settings."""
    return Options(
        block_size=block_size(settings),
        length=model_length(config, settings),
        quantize=settings.quantize,
        quantize_layers=settings.quantize_layers,
        kv_cache=settings.kv_cache_dtype,
        threads=threads or settings.threads,
        device=resolve(settings.device),
        ranks=settings.ranks,
    )
