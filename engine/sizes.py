"""How large an engine is: its longest sequence, its KV cache and what else it keeps of sequences, from the settings
and the memory that is free.

Not here: the blocks themselves (`engine/blocks.py`), and what the tensors of a step take (`engine/memory.py`).
"""

from typing import NamedTuple

import torch

from engine.calibrate import MAX_ROWS
from engine.memory import cache_fraction, step_bytes
from engine.types import EngineSettings
from model.backends import choose
from model.devices import free_memory, resolve
from model.errors import CheckpointError
from model.shapes.decoder import DecoderConfig
from model.shapes.memory import bytes_per_block, bytes_per_sequence

SNAPSHOT_SHARE = 8  # of the cache without the states of running sequences, unless a number is set


class CacheSizes(NamedTuple):
    """What the cache has room for."""

    blocks: int
    snapshots: int  # of states, in addition to those of running sequences


def model_length(config: DecoderConfig, settings: EngineSettings) -> int:
    """The longest sequence served. Raises CheckpointError if the setting is above the checkpoint's context."""
    if settings.max_model_len > config.context:
        raise CheckpointError(
            f"max_model_len {settings.max_model_len} is more than the model's context {config.context}"
        )
    return settings.max_model_len or config.context


def block_size(settings: EngineSettings) -> int:
    """Tokens per block of the cache: the setting, or where it is 0 what is best on the device."""
    return settings.block_size or choose.block_size(resolve(settings.device))


def state_slots(settings: EngineSettings) -> int:
    """How many sequences can have recurrent states at once: those that run, or the rows of a calibration plan."""
    return max(settings.max_running, MAX_ROWS)


def shares_prefixes(config: DecoderConfig, settings: EngineSettings, overlaps: bool) -> bool:
    """Whether there is a prefix cache. There is none for models with states if steps overlap: when a step is committed,
    the next one has already changed the states."""
    return settings.prefix_cache and config.prefix_reusable and not (config.has_states and overlaps)


def cache_sizes(
    config: DecoderConfig, settings: EngineSettings, dtype: torch.dtype, workspace: int = 0, overlaps: bool = False
) -> CacheSizes:
    """How many KV blocks the memory setting allows, at most what `max_running` whole contexts can use, and how many
    snapshots of states. `workspace`: bytes that the backend needs in addition to the cache."""
    element, scale = (1, 4) if settings.kv_cache_dtype == "int8" else (dtype.itemsize, 0)
    per_block = max(1, bytes_per_block(config.memory, block_size(settings), element, scale))
    device = resolve(settings.device)
    steps = step_bytes(config, settings.max_step_tokens, settings.max_running, device)
    free = max(0, free_memory(device).value - workspace - steps)
    allowed = settings.kv_cache_bytes or int(free * cache_fraction(settings.kv_cache_fraction, device))
    length = model_length(config, settings)
    blocks_per_context = -(-length // block_size(settings))
    needed = blocks_per_context * per_block
    states, snapshots = bytes_per_sequence(config.memory), 0
    allowed -= states * state_slots(settings)
    if states and shares_prefixes(config, settings, overlaps):
        most = min(2 * settings.max_running, allowed // SNAPSHOT_SHARE // states, (allowed - needed) // states)
        snapshots = settings.prefix_snapshots or max(1, most)
        allowed -= states * snapshots
    if allowed < needed:
        lower = "max_model_len or prefix_snapshots" if settings.prefix_snapshots and snapshots else "max_model_len"
        raise CheckpointError(
            f"the KV cache has {max(0, allowed)} bytes, but one sequence of {length} tokens needs {needed}; "
            f"lower {lower} or raise kv_cache_bytes"
        )
    return CacheSizes(min(allowed // per_block, blocks_per_context * settings.max_running), snapshots)
