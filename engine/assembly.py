"""Assembles an engine around a loaded model: block manager with its snapshots, speculator, scheduler and runner.

It reads no file. Not here: how the model is loaded and its backend chosen (`engine/build.py`), and how large the KV
cache is (`engine/sizes.py`).
"""

import logging

from engine.blocks import BlockManager
from engine.cost import ExpertPool, StepCost
from engine.description import experts_of
from engine.engine import Engine
from engine.grammars.compiler import GrammarCompiler
from engine.runner import ModelRunner
from engine.scheduler import Scheduler
from engine.sizes import block_size, cache_sizes, model_length, shares_prefixes, state_slots
from engine.snapshots import Snapshots
from engine.speculation import Speculator, speculator_of
from engine.types import EngineSettings
from model.backends.base import Runnable
from model.batch import Cache
from model.errors import CheckpointError, InvalidRequest
from model.shapes.decoder import DecoderConfig
from model.shapes.memory import bytes_per_sequence
from model.states import copier

log = logging.getLogger(__name__)


def assemble(
    model: Runnable,
    settings: EngineSettings,
    cost: StepCost | None = None,
    grammars: GrammarCompiler | None = None,
) -> tuple[Engine, int]:
    """An engine around a loaded model, and the number of its KV blocks. Without a `cost`, only tokens bound a step."""
    config = model.config
    size, shares = block_size(settings), shares_prefixes(config, settings, model.overlaps)
    if settings.prefix_cache and not shares:
        log.info("no prefix cache: %s", unshared(model))
    blocks, kept = cache_sizes(config, settings, model.dtype, model.workspace, model.overlaps)
    cache = model.cache(blocks, size, state_slots(settings) + kept)
    snapshots = snapshots_for(model, settings, cache, kept)
    manager = BlockManager(blocks, size, prefix_cache=shares, noisy=config.draws_noise, snapshots=snapshots)
    scheduler = Scheduler(
        manager,
        max_running=settings.max_running,
        max_step_tokens=settings.max_step_tokens,
        max_model_len=model_length(config, settings),
        chunked=config.chunkable,
        cost=cost,
        step_seconds=settings.step_ms / 1000,
        speculator=speculator_for(model, settings),
        experts=experts_of(model),
        score_refusal=config.score_refusal,
    )
    runner = ModelRunner(model, cache)
    runner.draft_experts = scheduler.speculator.experts if scheduler.speculator else 0
    overlapping = runner if model.overlaps else None
    return Engine(runner, scheduler, grammars, overlapping=overlapping, repeatable=not config.has_states), blocks


def snapshots_for(model: Runnable, settings: EngineSettings, cache: Cache, count: int) -> Snapshots | None:
    """The snapshots of states that the cache has slots for, behind those of running sequences; None if it has none."""
    if not count:
        return None
    memory = model.config.memory
    size = bytes_per_sequence(memory)
    log.info("the prefix cache keeps %d snapshots of states, %.2f MB each", count, size / 1e6)
    copy, spacing = copier(cache, memory), settings.prefix_snapshot_tokens
    return Snapshots(state_slots(settings), count, spacing, cache.block_size, copy, state_bytes=size)


def unshared(model: Runnable) -> str:
    """Why no sequence can use what another one has computed."""
    if model.config.prefix_reusable:
        return f"this model keeps states, and steps overlap on {model.device}"
    return "this model keeps states, or mixes tokens, which no other sequence can share"


def speculator_for(model: Runnable, settings: EngineSettings) -> Speculator | None:
    """The speculator that the settings ask for, or None. Raises CheckpointError if drafts cannot be verified."""
    try:
        speculator = speculator_of(settings.speculate)
    except InvalidRequest as error:
        raise CheckpointError(error.message) from None
    if settings.speculate == "grammar" and not model.exact:
        return None  # the default must be exact, and torch's products may round a draft's row differently
    if settings.speculate == "grammar" and model.overlaps:
        log.info("no drafts from grammars: they need the tokens before them, and steps overlap on %s", model.device)
        return None
    if settings.speculate == "grammar" and not model.config.rewinds:
        log.info("no drafts from grammars: this model keeps states, or mixes tokens, so that drafts cannot be undone")
        return None
    if speculator is not None and not model.config.rewinds:
        why = "this model keeps states, or mixes tokens, so that drafts cannot be undone"
        raise CheckpointError(f"speculate {settings.speculate}: {why}")
    return speculator


def pools(config: DecoderConfig) -> tuple[ExpertPool, ...]:
    """The expert pool of each MoE layer, for the cost model."""
    return tuple(ExpertPool(shape.num_experts, shape.experts_per_draw) for shape in config.mixtures)
