"""From settings to a running engine: load the model, size the cache, put scheduler and runner together."""

import ctypes
import logging
import platform
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from engine.blocks import BlockManager
from engine.calibrate import MOST_ROWS, measure
from engine.cost import ExpertPool, StepCost
from engine.engine import Engine
from engine.grammars.compiler import Grammars
from engine.progress import Progress
from engine.runner import ModelRunner
from engine.scheduler import Scheduler
from engine.speculation import Speculator, speculator_of
from engine.types import EngineInfo, EngineSettings, Request, Sampling, TokenEvent
from model.backends.cpu.decoder import NativeDecoder, refusal
from model.backends.cpu.kernels.library import load
from model.backends.torch.attend import bytes_per_block, bytes_per_sequence
from model.budget import ExpertBudget
from model.decoder import Decoder, parameter_count
from model.errors import CheckpointError, InvalidRequest
from model.resources import available_cores, available_memory
from model.shapes.decoder import DecoderConfig, Infinity, TopK
from weights.folder import resolve_model
from weights.load import load_model, read_config, run_dtype
from weights.tokenizer import Tokenizer

log = logging.getLogger(__name__)

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt
KEPT_BYTES = 1 << 30


def build_engine(settings: EngineSettings) -> tuple[Engine, EngineInfo]:
    """Load the model and assemble the engine around it.

    Raises:
        CheckpointError: the model cannot be loaded, or its cache does not fit the memory.
    """
    started = time.perf_counter()
    keep_freed_memory()
    log_resources()
    torch.set_num_threads(settings.threads or available_cores().value)
    folder = resolve_model(settings.model)
    config, raw = read_config(folder)
    check(config, settings)
    cache_blocks(config, settings, run_dtype(raw, settings.dtype))
    tokenizer = tokenizer_for(folder, config, settings)
    with Progress(settings.terminal_columns) as progress:
        loaded, _ = load_model(folder, settings.dtype, progress)
    loaded.config = replace(loaded.config, extrapolates=settings.allow_extrapolated_experts)
    parameters = parameter_count(loaded)
    model, reason = prepare(loaded, settings)
    if isinstance(model, NativeDecoder):
        torch.set_num_threads(1)  # what is left to torch is small, and a second pool's threads would be in the way
    give_back_freed_memory()
    engine, blocks = assemble(model, settings, grammars=grammars_for(folder, model.config, tokenizer))
    info = EngineInfo(
        family=raw["model_type"],
        parameters=parameters,
        kv_blocks=blocks,
        kernels_reason=reason,
        load_seconds=time.perf_counter() - started,
        **describe(model, settings),
    )
    prove(engine, info)
    if not settings.step_ms:
        return engine, info
    engine.scheduler.cost = measure(engine.runner, info, pools(model.config), settings.max_step_tokens)
    return engine, replace(info, step_cost=engine.scheduler.cost)


def check(config: DecoderConfig, settings: EngineSettings) -> None:
    """Refuse what does not fit the config, before the weights are read: a large model takes minutes."""
    model_length(config, settings)
    experts = replace(config, extrapolates=settings.allow_extrapolated_experts).experts
    try:
        for count in settings.aliases.values():
            experts.budget(count, "aliases")
        if settings.default_num_experts:
            experts.budget(settings.default_num_experts, "default_num_experts")
    except InvalidRequest as error:
        raise CheckpointError(error.message) from None


def tokenizer_for(folder: Path, config: DecoderConfig, settings: EngineSettings) -> Tokenizer | None:
    """The checkpoint's tokenizer; None where it has none.

    Raises:
        CheckpointError: it is damaged, or has ids that the model has not.
    """
    if not (folder / "tokenizer.json").exists():
        return None
    tokenizer = Tokenizer.load(folder, settings.generation_config == "auto")
    if beyond := tokenizer.check_ids(config.vocabulary):
        log.warning("%d special tokens have no embedding; a prompt that holds one is refused", len(beyond))
    return tokenizer


def grammars_for(folder: Path, config: DecoderConfig, tokenizer: Tokenizer | None) -> Grammars | None:
    """What compiles grammars for a checkpoint's vocabulary; None where it has no tokenizer, or no end of a text."""
    ends = tokenizer.eos_ids if tokenizer else ()
    return Grammars(str(folder / "tokenizer.json"), config.vocabulary, ends) if ends else None


def prove(engine: Engine, info: EngineInfo) -> None:
    """Compute one token. Raises CheckpointError where that fails: no request could do better."""
    budget = ExpertBudget((info.experts.trained,) * info.experts.layers)
    engine.add(Request("first", (0,), budget, Sampling(max_tokens=1, seed=0, temperature=0.0)))
    events: list[TokenEvent] = []
    while engine.has_work:
        events += engine.step().events
    if events[-1].finish == "error":
        raise CheckpointError(f"the model cannot compute a token: {events[-1].error}")


def give_back_freed_memory() -> None:
    """Once, after loading: the weights as they were read are not needed again."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def prepare(model: Decoder, settings: EngineSettings) -> tuple[Decoder | NativeDecoder, str]:
    """The decoder in the form that runs best here, and why if that is torch. A native one takes the weights over.

    Raises:
        CheckpointError: int8 is asked for, which only the native kernels have.
    """
    kernels = load()
    reason = kernels.reason or refusal(model.config, settings.block_size)
    if reason is None:
        length = model_length(model.config, settings)
        native = NativeDecoder(model, length, settings.quantize, settings.quantize_layers == "experts")
        torch.ops.moedial.set_threads(torch.get_num_threads())
        return native, ""
    if settings.quantize != "none":
        raise CheckpointError(f"quantize {settings.quantize} needs the native kernels: {reason}")
    log.warning("plain torch runs this model, several times slower than the native kernels: %s", reason)
    return model, reason


def log_resources() -> None:
    """Say what there is to be shared out, and where the figures come from: in a container mostly its limits."""
    cores, memory = available_cores(), available_memory()
    log.info("%d cores (%s), %.2f GB of memory free (%s)", cores.value, cores.source, memory.value / 1e9, memory.source)


def keep_freed_memory() -> None:
    """Have glibc keep what is freed instead of giving it back: every step allocates the same large intermediates,
    and fetching their pages anew took up to a quarter of a step. Elsewhere than on glibc, nothing happens."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        for parameter in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD):
            libc.mallopt(parameter, KEPT_BYTES)


def assemble(
    model: Decoder | NativeDecoder,
    settings: EngineSettings,
    cost: StepCost | None = None,
    grammars: Grammars | None = None,
) -> tuple[Engine, int]:
    """An engine around a loaded model, and the number of its cache blocks. Without a `cost`, tokens bound its steps."""
    config = model.config
    blocks = cache_blocks(config, settings, model.dtype, model.workspace)
    manager = BlockManager(
        blocks,
        settings.block_size,
        prefix_cache=settings.prefix_cache and model.token_local and model.reusable,
        noisy=config.draws_noise,
    )
    scheduler = Scheduler(
        manager,
        max_running=settings.max_running,
        max_step_tokens=settings.max_step_tokens,
        max_model_len=model_length(config, settings),
        chunked=model.token_local,
        cost=cost,
        step_seconds=settings.step_ms / 1000,
        speculator=speculator_for(model, settings),
    )
    runner = ModelRunner(model, model.cache(blocks, settings.block_size, state_slots(settings)))
    runner.draft_experts = scheduler.speculator.experts if scheduler.speculator else 0
    return Engine(runner, scheduler, grammars, repeatable=model.reusable), blocks


def speculator_for(model: Decoder | NativeDecoder, settings: EngineSettings) -> Speculator | None:
    """Who guesses, if anybody does. Raises CheckpointError where guesses cannot be checked, or not exactly."""
    try:
        speculator = speculator_of(settings.speculate)
    except InvalidRequest as error:
        raise CheckpointError(error.message) from None
    if settings.speculate == "grammar" and not isinstance(model, NativeDecoder):
        return None  # the default asks for what is free and exact; torch's products may round a guess's row otherwise
    if speculator is not None and not (model.token_local and model.reusable):
        why = "this model keeps states, or mixes tokens, so that guesses cannot be undone"
        raise CheckpointError(f"speculate {settings.speculate}: {why}")
    return speculator


def model_length(config: DecoderConfig, settings: EngineSettings) -> int:
    """The longest sequence served. Raises CheckpointError when more is asked for than the checkpoint allows."""
    if settings.max_model_len > config.context:
        raise CheckpointError(
            f"max_model_len {settings.max_model_len} is more than the model's context {config.context}"
        )
    return settings.max_model_len or config.context


def state_slots(settings: EngineSettings) -> int:
    """Sequences that have states at once: those that run, or the rows of a calibration's plan."""
    return max(settings.max_running, MOST_ROWS)


def cache_blocks(config: DecoderConfig, settings: EngineSettings, dtype: torch.dtype, workspace: int = 0) -> int:
    """How many blocks the memory setting allows, but no more than `max_running` whole contexts can use. `workspace`:
    bytes that attention takes beside the cache."""
    memory = [shape.memory for shape in config.mixers]
    per_block = max(1, bytes_per_block(memory, settings.block_size, dtype))
    allowed = settings.kv_cache_bytes or int(max(0, available_memory().value - workspace) * settings.kv_cache_fraction)
    allowed -= bytes_per_sequence(memory) * state_slots(settings)
    whole = -(-model_length(config, settings) // settings.block_size)
    if allowed // per_block < whole:
        raise CheckpointError(
            f"the KV cache has {allowed} bytes, but one sequence of {model_length(config, settings)} tokens needs "
            f"{whole * per_block}; lower max_model_len or raise kv_cache_bytes"
        )
    return min(allowed // per_block, whole * settings.max_running)


def pools(config: DecoderConfig) -> tuple[ExpertPool, ...]:
    """What a token chooses from, per MoE layer."""
    return tuple(
        ExpertPool(kind.blocks, kind.kept) if isinstance(kind, Infinity) else ExpertPool(kind.experts)
        for kind in config.mixtures
    )


def describe(model: Decoder | NativeDecoder, settings: EngineSettings) -> dict[str, Any]:
    """What the engine says of the model that it runs."""
    config = model.config
    kind = config.mixtures[0] if config.mixtures else None
    total = kind.blocks if isinstance(kind, Infinity) else kind.experts if isinstance(kind, TopK) else 0
    return {
        "dtype": str(model.dtype).removeprefix("torch."),
        "vocabulary": config.vocabulary,
        "max_model_len": model_length(config, settings),
        "experts": config.experts,
        "experts_total": total,
        "shared_experts": int(isinstance(kind, TopK) and kind.shared is not None),
        "block_size": settings.block_size,
        "kernels": load().name if isinstance(model, NativeDecoder) else "torch",
        "quantize": settings.quantize
        if settings.quantize == "none"
        else f"{settings.quantize} {settings.quantize_layers}",
        "step_cost": None,
    }
