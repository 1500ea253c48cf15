"""GGUF files, one or split in parts: their metadata, which tensors there are, and reading the tensors' bytes.

Torch-free, so that the HTTP process may use it. It does not depend on families, and does not decode the blocks of
tensors (`weights/gguf/blocks.py`).
"""

import mmap
import os
import re
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

from model.errors import CheckpointError, shown
from weights.folder import open_regular
from weights.gguf.header import MAX_HEADER, Header, TensorEntry, Value, read_header

_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
MAX_PARTS = 1024


class GgufFile:
    """All metadata and tensors of a GGUF file and of the other parts of it. Use as a context manager to read tensors;
    metadata and the table of tensors outlive it.

    Attributes:
        metadata: the first part's.
        tensors: of all parts.
    """

    def __init__(self, path: Path) -> None:
        """
        Raises:
            CheckpointError: a part is missing, damaged, hostile, or of a version or with types that are not read.
        """
        self.paths = part_paths(path)
        self._stack = ExitStack()
        self._files: list[BinaryIO] = []
        try:
            headers = [self._open(part, number) for number, part in enumerate(self.paths)]
            self.metadata: dict[str, Value] = headers[0].metadata
            self.tensors: dict[str, TensorEntry] = {}
            for name, entry in (item for header in headers for item in header.tensors.items()):
                if name in self.tensors:
                    raise CheckpointError(f"{path.name}: tensor {shown(name)} is in two parts")
                self.tensors[name] = entry
            self._check_parts(headers)
        except BaseException:
            self._stack.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def read_into(self, name: str, target: memoryview, offset: int = 0) -> None:
        """The bytes of one tensor, from `offset` to as many as `target` takes.

        Raises:
            CheckpointError: the file has become shorter since it was opened.
        """
        entry, done = self.tensors[name], 0
        assert offset + len(target) <= entry.nbytes
        file = self._files[entry.part].fileno()
        while done < len(target):
            count = os.preadv(file, [target[done:]], entry.start + offset + done)
            if count <= 0:
                raise CheckpointError(
                    f"{self.paths[entry.part].name}: tensor {shown(name)} cannot be read: the file ends before it does"
                )
            done += count

    def _open(self, path: Path, part: int) -> Header:
        """The header of one part; its file stays open."""
        try:
            file = self._stack.enter_context(open_regular(path))
            self._files.append(file)
            size = os.fstat(file.fileno()).st_size
            if not size:
                raise CheckpointError(f"{path.name} is empty")
            # Not the whole file: processes that read small files alone have a limit of address space.
            with mmap.mmap(file.fileno(), min(size, MAX_HEADER), access=mmap.ACCESS_READ) as data:
                return read_header(data, path.name, size, part)
        except FileNotFoundError:
            count = len(self.paths)
            parts = f"; all {count} parts must lie in one folder" if count > 1 else ""
            raise CheckpointError(f"{path} does not exist{parts}") from None
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path.name} cannot be read: {error}") from None

    def _check_parts(self, headers: list[Header]) -> None:
        """Raise CheckpointError unless every part says which one it is, and of how many, as its name does."""
        count = len(headers)
        for number, (path, header) in enumerate(zip(self.paths, headers, strict=True)):
            said = header.metadata.get("split.count", 0), header.metadata.get("split.no", 0)
            if said != (count, number) and (count > 1 or said != (0, 0)):
                raise CheckpointError(
                    f"{path.name}: split.count is {shown(said[0])} and split.no {shown(said[1])}, but by its name it is"
                    f" part {number} of {count}, counted from 0"
                )
        wanted = self.metadata.get("split.tensors.count")
        if count > 1 and wanted != len(self.tensors):
            raise CheckpointError(
                f"{self.paths[0].name}: split.tensors.count is {shown(wanted)}, but the {count} parts have"
                f" {len(self.tensors)} tensors"
            )


def part_paths(path: Path) -> list[Path]:
    """Every part of a file, in order; the file alone if its name, NAME-00001-of-00003.gguf, does not say otherwise.

    Raises:
        CheckpointError: the name's numbers make no sense.
    """
    match = _PART.fullmatch(path.name)
    if match is None:
        return [path]
    number, count = int(match["number"]), int(match["count"])
    if not 1 <= number <= count <= MAX_PARTS:
        raise CheckpointError(f"{path.name}: part {number} of {count} cannot be; at most {MAX_PARTS} are supported")
    return [path.with_name(f"{match['stem']}-{each:05}-of-{count:05}.gguf") for each in range(1, count + 1)]
