"""What this machine is and what it can do at best: memory reads and bf16 matrix products, measured in the same run as
the speeds they are the ceilings of. It does not depend on a model or a peer."""

import ctypes
import os
import platform
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Linear = Callable[[Tensor], Tensor]


def best(call: Callable[[], object], times: int = 7) -> float:
    """Seconds of the fastest of several calls."""
    seconds = []
    for _ in range(times):
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def bandwidth() -> float:
    """GB/s of reading one array of 1 GiB, far larger than any cache, with all threads; the best of seven."""
    x = torch.ones(1 << 28, dtype=torch.float32)
    return x.nbytes / best(x.sum) / 1e9


def packed_linear(weight_FD: Tensor, rows: int) -> Linear:
    """x ↦ x Wᵀ in bf16 with the weight laid out once for oneDNN, for products of about `rows` rows; plain where this
    processor has no bf16 for it."""
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return lambda x: F.linear(x, weight_FD)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight_FD, rows)
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")


@torch.inference_mode()
def matrix_peak(size: int = 2048) -> float:
    """GFLOP/s of a square bf16 product with all threads: torch's own and a prepacked one, the best of seven of
    either."""
    x, weight = torch.randn(2, size, size).bfloat16().unbind()
    packed = packed_linear(weight, size)
    seconds = min(best(lambda: F.linear(x, weight)), best(lambda: packed(x)))
    return 2 * size**3 / seconds / 1e9


def processor() -> str:
    """The processor's name and those of its features that matrix products use."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    parts = (line.partition(":") for line in lines)
    fields = {key.strip(): value.strip() for key, _, value in parts}
    wanted = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16")
    features = [name for name in wanted if name in fields.get("flags", "").split()]
    if not features:
        return platform.machine()
    return f"{fields.get('model name', platform.machine())} ({', '.join(features)})"


def facts() -> dict[str, Any]:
    """What every JSON line opens with."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="minutes"),
        "machine": processor(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "memory_gb_s": round(bandwidth(), 1),
    }


def introduce(values: dict[str, Any]) -> None:
    """The same for people; a busy machine is called one."""
    lines = (f"{name}: {value}" for name, value in values.items())
    print(*lines, sep="\n", flush=True)
    if values["load"] > 0.5:
        print("The machine is busy: these figures are not to be quoted.", flush=True)


def use_threads(threads: int) -> None:
    """All cores by default."""
    torch.set_num_threads(threads or os.cpu_count() or 1)


def give_back_freed_memory() -> None:
    """What loading has left behind, which may be more than the model is: several have to fit beside each other."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
