"""The safetensors files of one model folder: which tensors there are, and reading them one at a time.

The only place that opens weight files. Everything that a damaged or hostile folder can do to a reader ends here, as one
`CheckpointError`. It does not know what a tensor is for.
"""

import json
import struct
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from safetensors import SafetensorError, safe_open
from torch import Tensor

from model.errors import CheckpointError
from weights.folder import read_json

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
MAX_HEADER = 100 * 1024 * 1024


class TensorFiles:
    """All tensors of a folder, lazily. Use as a context manager."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._stack = ExitStack()
        self._handles: dict[str, Any] = {}
        self.files: dict[str, str] = {}  # tensor name -> file name

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
        try:
            return self._handles[self.files[name]].get_tensor(name)  # type: ignore[no-any-return]
        except SafetensorError as error:
            raise CheckpointError(f"{self.files[name]}: tensor {name!r} cannot be read: {error}") from None

    def _file_names(self) -> list[str]:
        if (self.folder / INDEX).exists():
            names = set(self._weight_map().values())
            return sorted(self._inside(name) for name in names)
        if (self.folder / SINGLE).exists():
            return [SINGLE]
        others = sorted(p.name for p in self.folder.glob("*") if p.suffix in {".bin", ".pt", ".pth", ".ckpt"})
        hint = f"; {', '.join(others[:3])} will not be opened, only safetensors is" if others else ""
        raise CheckpointError(f"{self.folder} has neither {SINGLE} nor {INDEX}{hint}")

    def _weight_map(self) -> dict[str, str]:
        weight_map = read_json(self.folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
            raise CheckpointError(f"{INDEX}: weight_map must map tensor names to file names")
        return weight_map

    def _inside(self, name: str) -> str:
        """A shard must be a plain file name. (A symlink may lead out: that is how the hub's cache stores files.)"""
        if Path(name).name != name or name in {"", ".", ".."} or not name.endswith(".safetensors"):
            raise CheckpointError(f"{INDEX} names {name!r}, which is not a safetensors file inside the folder")
        return name

    def _open(self, name: str) -> None:
        check_header(self.folder / name)
        try:
            handle = self._stack.enter_context(safe_open(self.folder / name, framework="pt"))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{name} is damaged: {error}") from None
        self._handles[name] = handle
        for tensor in handle.keys():  # noqa: SIM118  a safetensors handle is not a mapping
            if tensor in self.files:
                raise CheckpointError(f"tensor {tensor!r} is in both {self.files[tensor]} and {name}")
            self.files[tensor] = name

    def _check_index(self) -> None:
        if not (self.folder / INDEX).exists():
            return
        wrong = [tensor for tensor, file in self._weight_map().items() if self.files.get(tensor) != file]
        if wrong:
            raise CheckpointError(f"{INDEX}: {len(wrong)} tensors are not where it says, first {wrong[0]!r}")


def check_header(path: Path) -> None:
    """What the safetensors library lets through: a header larger than the file or the limit, and repeated names."""
    try:
        with path.open("rb") as file:
            head = file.read(8)
            size = struct.unpack("<Q", head)[0] if len(head) == 8 else -1
            if not 0 < size <= min(MAX_HEADER, path.stat().st_size - 8):
                raise CheckpointError(
                    f"{path.name}: header of {size} bytes does not fit a file of {path.stat().st_size}"
                )
            json.loads(file.read(size), object_pairs_hook=lambda pairs: _unique(path, pairs))
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path.name}: header cannot be read: {error}") from None


def _unique(path: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = dict(pairs)
    if len(names) != len(pairs):
        raise CheckpointError(f"{path.name}: a name appears twice in the header")
    return names
