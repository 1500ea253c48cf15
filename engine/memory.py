"""How the engine process uses memory: settings of the C allocator, and what is logged of memory and cores.

It knows no models. What there is of memory and cores is for `model/resources.py` to find out.
"""

import ctypes
import logging
import platform

from model.devices import CPU, devices, free_memory
from model.resources import available_cores, available_memory

log = logging.getLogger(__name__)

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt
KEPT_BYTES = 1 << 30


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


def keep_freed_memory() -> None:
    """Make glibc keep freed memory instead of returning it: every step allocates the same large intermediates, and
    page faults took up to a quarter of a step. Without glibc this does nothing."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        for parameter in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD):
            libc.mallopt(parameter, KEPT_BYTES)


def give_back_freed_memory() -> None:
    """Return freed memory to the system once, after loading: the weights as read are not needed again."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
