"""The safetensors files of one model folder: which tensors there are, and reading them one at a time.

The only place that opens weight files. Everything that a damaged or hostile folder can do to a reader ends here, as one
`CheckpointError`. It does not know what a tensor is for.
"""

import json
import math
import os
import struct
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from model.errors import CheckpointError
from weights.folder import INDEX, PACKED, SINGLE, open_regular, weight_map
from weights.forms import Form

PICKLES = {".bin", ".pt", ".pth", ".ckpt"}  # formats that run code when they are read
MAX_HEADER = 100 * 1024 * 1024
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
}


@dataclass(frozen=True, slots=True)
class Stored:
    """Where one tensor lies: in which file, from which byte, and as what.

    `form`: as `Grouped` (`model/grouped.py`), where it has such a form. `turned`: that has the last two dimensions the
    other way round than `shape`.
    """

    file: str
    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    form: Form | None = None
    turned: bool = False

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def grouped(self) -> int:
        """Its bytes as `Grouped`; 0 where it has no such form."""
        return 0 if self.form is None else self.form.bytes(self.matrices)

    @property
    def matrices(self) -> tuple[int, ...]:
        """The shape with outputs and inputs as the last dimensions."""
        return (*self.shape[:-2], self.shape[-1], self.shape[-2]) if self.turned else self.shape


class TensorFiles:
    """All tensors of a folder, lazily. Use as a context manager.

    Bytes are read where they are wanted, not mapped: pages of a map would count as memory on top of the model.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._stack = ExitStack()
        self._open_files: dict[str, BinaryIO] = {}
        self.stored: dict[str, Stored] = {}

    def __enter__(self) -> Self:
        try:
            for name in self._file_names():
                self._open(name)
            self._check_index()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def read(self, name: str) -> Tensor:
        """One tensor, as stored."""
        tensor = torch.empty(self.stored[name].shape, dtype=self.stored[name].dtype)
        self.read_into(name, tensor)
        return tensor

    def read_into(self, name: str, target: Tensor) -> None:
        """The bytes of one tensor into a contiguous one of its dtype and shape.

        Raises:
            CheckpointError: the file ends before the tensor does.
        """
        stored = self.stored[name]
        data: Any = target.view(-1).view(torch.uint8).numpy() if target.numel() else b""
        wanted = memoryview(data)
        file, done = self._open_files[stored.file], 0
        while done < len(wanted):
            count = os.preadv(file.fileno(), [wanted[done:]], stored.start + done)
            if count <= 0:
                raise CheckpointError(f"{stored.file}: tensor {name!r} cannot be read: the file ends before it does")
            done += count

    def _file_names(self) -> list[str]:
        if (self.folder / INDEX).exists():
            return sorted(set(weight_map(self.folder).values()))
        if (self.folder / SINGLE).exists():
            return [SINGLE]
        if (self.folder / PACKED).exists():
            raise CheckpointError(f"{self.folder} is a packed model: only moedial serve reads it")
        others = sorted(path.name for path in self.folder.glob("*") if path.suffix in PICKLES)
        hint = f"; {', '.join(others[:3])} will not be opened, only safetensors is" if others else ""
        raise CheckpointError(f"{self.folder} has neither {SINGLE} nor {INDEX}{hint}")

    def _open(self, name: str) -> None:
        start, header = read_header(self.folder / name)
        try:
            with safe_open(self.folder / name, framework="np"):
                pass  # the library checks offsets and sizes
            self._open_files[name] = self._stack.enter_context(open_regular(self.folder / name))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{name} is damaged: {error}") from None
        for tensor, entry in header.items():
            if tensor in self.stored:
                raise CheckpointError(f"tensor {tensor!r} is in both {self.stored[tensor].file} and {name}")
            if entry["dtype"] not in DTYPES:
                raise CheckpointError(f"{name}: tensor {tensor!r} has dtype {entry['dtype']}, which is not supported")
            first = start + entry["data_offsets"][0]
            dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
            self.stored[tensor] = Stored(name, first, dtype, shape)

    def _check_index(self) -> None:
        if not (self.folder / INDEX).exists():
            return
        files = {tensor: stored.file for tensor, stored in self.stored.items()}
        wrong = [tensor for tensor, file in weight_map(self.folder).items() if files.get(tensor) != file]
        if wrong:
            raise CheckpointError(f"{INDEX}: {len(wrong)} tensors are not where it says, first {wrong[0]!r}")


def read_header(path: Path) -> tuple[int, dict[str, dict[str, Any]]]:
    """Where the tensors' bytes begin, and the entry of each tensor.

    Raises:
        CheckpointError: what the safetensors library lets through, too: a header larger than the limit, repeated names.
    """
    try:
        with open_regular(path) as file:
            head = file.read(8)
            size = struct.unpack("<Q", head)[0] if len(head) == 8 else -1
            if not 0 < size <= min(MAX_HEADER, path.stat().st_size - 8):
                raise CheckpointError(
                    f"{path.name}: header of {size} bytes does not fit a file of {path.stat().st_size}"
                )
            header = json.loads(file.read(size), object_pairs_hook=lambda pairs: _unique(path, pairs))
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path.name}: header cannot be read: {error}") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path.name}: the header must be a JSON object")
    return 8 + size, {name: entry for name, entry in header.items() if name != "__metadata__"}


def _unique(path: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = dict(pairs)
    if len(names) != len(pairs):
        raise CheckpointError(f"{path.name}: a name appears twice in the header")
    return names
