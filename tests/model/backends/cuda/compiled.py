"""Compiles kernels for sm_90 (H100, H200) without a GPU, from the launches of the functions that run them.

`record` takes launches over: the arguments, which may be meta tensors, become a signature as Triton would make it (a 1
is a constant, a multiple of 16 is known as one), and nothing runs. For a process whose Triton does not interpret.
"""

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

SHARED = 227 * 1024  # bytes that a program can have on sm_90
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")
TYPES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.bool: "*i1",
}


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of one launch."""

    name: str
    ptx: str
    shared: int  # bytes
    registers: int
    stack: int  # bytes; spilled registers lie here

    @property
    def tensor_cores(self) -> bool:
        """Whether its products are the warp-group instruction of sm_90."""
        return "wgmma.mma_async" in self.ptx

    @property
    def wide_loads(self) -> bool:
        """Whether it loads 16 bytes at a time, to registers or to shared memory."""
        return bool(re.search(r"ld\.global[.\w:]*\.v4\.b32|cp\.async\.cg\.shared\.global[^;]*, 0x10", self.ptx))

    @property
    def narrow_copies(self) -> bool:
        """Whether it copies less than 16 bytes at a time to shared memory."""
        return "cp.async.ca" in self.ptx


@contextmanager
def record() -> Iterator[list[Compiled]]:
    """Compile every kernel that is launched inside, and launch none."""
    found: list[Compiled] = []

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        options = {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}
        found.append(_compile(self, dict(zip(self.arg_names, args, strict=False)) | kwargs, options))

    original: Callable = JITFunction.run
    JITFunction.run = run
    try:
        yield found
    finally:
        JITFunction.run = original


def _compile(kernel: JITFunction, args: dict[str, Any], options: dict[str, Any]) -> Compiled:
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        value = args[parameter.name]
        kind, multiple = _kind(value)
        if parameter.is_constexpr or value is None or (kind == "i32" and value == 1):
            signature[parameter.name] = "constexpr"
            constants[(index,)] = value
        else:
            signature[parameter.name] = kind
            if multiple:
                attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    with tempfile.TemporaryDirectory() as cache, triton.knobs.cache.scope():
        triton.knobs.cache.dir = cache
        made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        return _read(kernel.__name__, made, Path(cache))


def _kind(value: Any) -> tuple[str, bool]:
    """The type of an argument, and whether it is known to be a multiple of 16."""
    if isinstance(value, Tensor):
        return TYPES[value.dtype], True
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return "i1", False
    if isinstance(value, float):
        return "fp32", False
    return "i32" if -(2**31) <= value < 2**31 else "i64", value % 16 == 0


def _read(name: str, made: Any, folder: Path) -> Compiled:
    binary = folder / "kernel.cubin"
    binary.write_bytes(made.asm["cubin"])
    command = [str(CUOBJDUMP), "--dump-resource-usage", str(binary)]
    usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    registers, stack = (int(re.search(rf"{word}:(\d+)", usage)[1]) for word in ("REG", "STACK"))
    return Compiled(name, made.asm["ptx"], made.metadata.shared, registers, stack)
