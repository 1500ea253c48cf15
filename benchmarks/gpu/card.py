"""What the card is and what it can do at best: memory, matrix products, the price of a launch. Other parts take their
shares of these figures.
"""

import importlib.util
import platform
from functools import partial
from importlib.metadata import version

import torch
from torch import Tensor

from benchmarks.gpu.part import Part
from benchmarks.gpu.timing import host_seconds, timed

FIGURES = "figures of the card"
PACKAGES = ("torch", "triton", "transformers", "numpy")


def run(part: Part) -> None:
    """Names and versions, then what the card reaches."""
    found = {name: version(name) for name in PACKAGES if importlib.util.find_spec(name)}
    part.add("software", python=platform.python_version(), cuda=str(torch.version.cuda), **found)
    if part.dry:
        part.add(FIGURES, card="none: a dry run", copy_gb_s=None, read_gb_s=None, bf16_tflop_s=None,
                 graph_launch_us=None, eager_launch_us=None)  # fmt: skip
        return
    card = torch.cuda.get_device_properties(0)
    gigabytes, processors = card.total_memory / 1e9, card.multi_processor_count
    part.add("card", name=card.name, memory_gb=gigabytes, processors=processors, l2_mb=card.L2_cache_size / 1e6)
    copy, read = _memory(part.device)
    graph, eager = _launches(part.device)
    part.add(FIGURES, card=card.name, copy_gb_s=copy, read_gb_s=read, bf16_tflop_s=_products(part.device),
             graph_launch_us=graph, eager_launch_us=eager)  # fmt: skip


def _memory(device: torch.device) -> tuple[float, float]:
    """GB/s of copying 4 GiB, bytes read and written, and of reading them alone."""
    x, y = (torch.ones(1 << 30, dtype=torch.float32, device=device) for _ in range(2))
    copy = timed([partial(y.copy_, x)], device).seconds
    read = timed([x.sum], device).seconds
    assert copy is not None and read is not None
    return 2 * x.nbytes / copy / 1e9, x.nbytes / read / 1e9


def _products(device: torch.device) -> float:
    """TFLOP/s of a square product in bfloat16 of random values."""
    size = 8192
    x, y = torch.randn(2, size, size, dtype=torch.bfloat16, device=device).unbind()
    seconds = timed([partial(torch.mm, x, y)], device).seconds
    assert seconds is not None
    return float(2 * size**3 / seconds / 1e12)


def _launches(device: torch.device) -> tuple[float, float]:
    """Microseconds of one tiny launch among 100 that follow each other, in a graph; and of the host, without one."""
    x = torch.zeros(1, device=device)
    call = partial(_add_one, x)
    seconds = timed([call] * 100, device).seconds
    eager = host_seconds(call, 1000)
    torch.cuda.synchronize()
    assert seconds is not None
    return 1e6 * seconds, 1e6 * eager


def _add_one(x: Tensor) -> None:
    x.add_(1.0)
