"""From settings to a running engine: load the model, size the cache, put scheduler and runner together."""

import ctypes
import platform
import time

import psutil
import torch

from engine.blocks import BlockManager
from engine.engine import Engine
from engine.runner import ModelRunner
from engine.scheduler import Scheduler
from engine.types import EngineInfo, EngineSettings
from model.attend import PagedCache
from model.config import DecoderConfig, Infinity, TopK
from model.decoder import Decoder, parameter_count
from model.errors import CheckpointError
from weights.folder import resolve_model
from weights.load import load_model

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt
KEPT_BYTES = 1 << 30


def build_engine(settings: EngineSettings) -> tuple[Engine, EngineInfo]:
    """Load and assemble.

    Raises:
        CheckpointError: the model cannot be loaded, or its cache does not fit the memory.
    """
    started = time.perf_counter()
    keep_freed_memory()
    if settings.threads:
        torch.set_num_threads(settings.threads)
    model, raw = load_model(resolve_model(settings.model), settings.dtype)
    engine, blocks = assemble(model, settings)
    return engine, describe(model, raw["model_type"], settings, blocks, time.perf_counter() - started)


def keep_freed_memory() -> None:
    """Have glibc keep what is freed instead of giving it back: every step allocates the same large intermediates,
    and fetching their pages anew took up to a quarter of a step. Elsewhere than on glibc, nothing happens."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        for parameter in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD):
            libc.mallopt(parameter, KEPT_BYTES)


def assemble(model: Decoder, settings: EngineSettings) -> tuple[Engine, int]:
    """An engine around a loaded model, and the number of its cache blocks."""
    config, dtype = model.config, next(model.parameters()).dtype
    blocks = cache_blocks(config, settings, dtype)
    cache = PagedCache(len(config.layers), blocks, settings.block_size, config.kv_heads, config.head_width, dtype)
    manager = BlockManager(
        blocks, settings.block_size, prefix_cache=settings.prefix_cache and model.token_local, noisy=config.draws_noise
    )
    scheduler = Scheduler(
        manager,
        max_running=settings.max_running,
        max_step_tokens=settings.max_step_tokens,
        max_model_len=model_length(config, settings),
        chunked=model.token_local,
    )
    return Engine(ModelRunner(model, cache), scheduler), blocks


def model_length(config: DecoderConfig, settings: EngineSettings) -> int:
    """The longest sequence served. Raises CheckpointError when more is asked for than the checkpoint allows."""
    if settings.max_model_len > config.context:
        raise CheckpointError(
            f"max_model_len {settings.max_model_len} is more than the model's context {config.context}"
        )
    return settings.max_model_len or config.context


def cache_blocks(config: DecoderConfig, settings: EngineSettings, dtype: torch.dtype) -> int:
    """How many blocks the memory setting allows, but no more than `max_running` whole contexts can use."""
    per_block = PagedCache.bytes_per_block(
        len(config.layers), settings.block_size, config.kv_heads, config.head_width, dtype
    )
    allowed = settings.kv_cache_bytes or int(psutil.virtual_memory().available * settings.kv_cache_fraction)
    whole = -(-model_length(config, settings) // settings.block_size)
    if allowed // per_block < whole:
        raise CheckpointError(
            f"the KV cache has {allowed} bytes, but one sequence of {model_length(config, settings)} tokens needs "
            f"{whole * per_block}; lower max_model_len or raise kv_cache_bytes"
        )
    return min(allowed // per_block, whole * settings.max_running)


def describe(model: Decoder, family: str, settings: EngineSettings, blocks: int, seconds: float) -> EngineInfo:
    """What the engine says of itself."""
    config = model.config
    kind = config.mixtures[0] if config.mixtures else None
    total = kind.blocks if isinstance(kind, Infinity) else kind.experts if isinstance(kind, TopK) else 0
    return EngineInfo(
        family=family,
        dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
        parameters=parameter_count(model),
        vocabulary=config.vocabulary,
        max_model_len=model_length(config, settings),
        experts=config.experts,
        experts_total=total,
        shared_experts=0,
        kv_blocks=blocks,
        block_size=settings.block_size,
        load_seconds=seconds,
    )
