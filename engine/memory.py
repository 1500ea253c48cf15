"""How the engine process uses memory: how much of it steps and the KV cache get, settings of the C allocator, and what
is logged of memory and cores.

What there is of memory and cores is for `model/resources.py` and `model/devices.py` to find out.
"""

import ctypes
import logging
import platform

import torch

from model.devices import CPU, devices, free_memory
from model.resources import available_cores, available_memory
from model.shapes.decoder import DecoderConfig

log = logging.getLogger(__name__)

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt
KEPT_BYTES = 1 << 30
CPU_CACHE_FRACTION, GPU_CACHE_FRACTION = 0.3, 0.9  # of what is free


def log_resources() -> None:
    """Log the cores and memory available, and the source of each figure: in a container usually its limits."""
    cores, memory = available_cores(), available_memory()
    log.info("%d cores (%s), %.2f GB of memory free (%s)", cores.value, cores.source, memory.value / 1e9, memory.source)


def log_device(device: str, setting: str) -> None:
    """Log which device the model runs on, whether it was asked for or found, and what is free there."""
    how = "found" if setting == "auto" else "as set"
    if device == CPU:
        log.info("running on the CPU (%s)", "no GPU found" if setting == "auto" else how)
    else:
        free = free_memory(device).value / 1e9
        log.info("running on %s, %s (%s), %.2f GB of its memory free", device, devices()[device], how, free)


def cache_fraction(setting: float, device: str) -> float:
    """The share of free memory for the KV cache: the setting, or where it is 0 that of the device. A CPU's memory is
    shared with other programs."""
    return setting or (CPU_CACHE_FRACTION if device == CPU else GPU_CACHE_FRACTION)


def step_bytes(config: DecoderConfig, max_step_tokens: int, max_running: int, device: str) -> int:
    """About how many bytes the largest step at the trained count takes on a GPU, without attention. 0 on the CPU, whose
    default share of memory leaves far more.

    Float32 logits: two copies for each token that is scored, or six for each sequence that is sampled for. Two rows of
    the width for each routed pair, and eight for each token.
    """
    if device == CPU:
        return 0
    logits = config.vocabulary * max(2 * max_step_tokens, 6 * max_running)
    rows = config.width * max_step_tokens * (2 * config.experts.trained + 8)
    return 4 * (logits + rows)


def keep_freed_memory() -> None:
    """Make glibc keep freed memory instead of returning it: every step allocates the same large intermediates, and
    page faults took up to a quarter of a step. Without glibc this does nothing."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        for parameter in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD):
            libc.mallopt(parameter, KEPT_BYTES)


def give_back_freed_memory() -> None:
    """Return freed memory to the system and to the GPU once, after loading: the weights as read are not needed
    again."""
    torch.cuda.empty_cache()  # nothing where CUDA is not in use
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
