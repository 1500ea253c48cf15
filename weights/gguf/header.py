"""The header of one GGUF file: typed metadata and the table of tensors, with every length checked before it is used.

Torch-free, so that the HTTP process may use it. It reads no tensors. Format: github.com/ggml-org/ggml, docs/gguf.md.
"""

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from mmap import mmap
from typing import NoReturn

from model.errors import CheckpointError, shown
from weights.gguf.types import NOT_READ, TYPES, BlockType

Scalar = int | float | bool | str
Value = Scalar | list[Scalar]

VERSIONS = (2, 3)
MAX_TENSORS = MAX_KEYS = 65_536
MAX_ITEMS = 1 << 22  # of all arrays together; vocabularies have a few hundred thousand tokens and merges
MAX_HEADER = 256 * 1024 * 1024  # bytes before the tensors
MAX_NAME, MAX_STRING = 65_535, 16 * 1024 * 1024  # bytes of UTF-8
MAX_AXES = 4
MAX_ALIGNMENT = 65_536
STRING, ARRAY = 8, 9
BOOL = 7
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", BOOL: "?", 10: "Q", 11: "q", 12: "d"}


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor lies: in which part of the file, from which byte, and as what. Of `shape`, the last axis is that
    of neighbouring values."""

    part: int
    start: int
    type: BlockType
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) // self.type.values * self.type.bytes


@dataclass(frozen=True, slots=True)
class Header:
    metadata: dict[str, Value]
    tensors: dict[str, TensorEntry]


def read_header(data: mmap, name: str, size: int, part: int = 0) -> Header:
    """The header of a file of `size` bytes, of which at least the first `MAX_HEADER` are mapped.

    Raises:
        CheckpointError: it is no GGUF of a version and of types that are read, or it does not fit the file; `name` is
            the file's.
    """
    return _Reader(data, name, size).header(part)


class _Reader:
    """A position in the file that never passes its end."""

    def __init__(self, data: mmap, name: str, file_size: int) -> None:
        self._data, self._name, self._file_size = data, name, file_size
        self._size, self._at, self._items = len(data), 0, 0

    def header(self, part: int) -> Header:
        if self._size < 4 or self._data[:4] != b"GGUF":
            self._fail("it does not begin with the four bytes GGUF")
        self._at = 4
        version = self._number("I")
        if version not in VERSIONS:
            order = " (or it is stored in big-endian order)" if version in (2 << 24, 3 << 24) else ""
            self._fail(f"version {version} is not supported{order}; known are 2 and 3")
        tensors, keys = self._count(MAX_TENSORS, "tensors"), self._count(MAX_KEYS, "keys")
        metadata: dict[str, Value] = {}
        for _ in range(keys):
            key = self._string(MAX_NAME, "the name of a key")
            if key in metadata:
                self._fail(f"key {shown(key)} appears twice")
            metadata[key] = self._value(shown(key))
        return Header(metadata, self._table(tensors, self._alignment(metadata), part))

    def _table(self, count: int, alignment: int, part: int) -> dict[str, TensorEntry]:
        """The tensors' entries; their offsets count from the first aligned byte behind the table."""
        table: dict[str, TensorEntry] = {}
        for _ in range(count):
            name = self._string(MAX_NAME, "the name of a tensor")
            if name in table:
                self._fail(f"tensor {shown(name)} appears twice")
            table[name] = self._entry(shown(name), alignment, part)
        begin = -(-self._at // alignment) * alignment
        found = {name: TensorEntry(part, begin + entry.start, entry.type, entry.shape) for name, entry in table.items()}
        self._check_places(found)
        return found

    def _entry(self, name: str, alignment: int, part: int) -> TensorEntry:
        axes = self._number("I")
        if not 1 <= axes <= MAX_AXES:
            self._fail(f"tensor {name} has {axes} axes; 1 to {MAX_AXES} are supported")
        shape = tuple(self._number("Q") for _ in range(axes))[::-1]
        code, offset = self._number("I"), self._number("Q")
        if code not in TYPES:
            known = ", ".join(each.name for each in TYPES.values())
            self._fail(f"tensor {name} has type {NOT_READ.get(code, 'unknown')} ({code}); supported are {known}")
        kind = TYPES[code]
        if min(shape) < 1 or shape[-1] % kind.values:
            self._fail(f"tensor {name} of type {kind.name} has shape {shape}: no rows of {kind.values} values")
        if offset % alignment:
            self._fail(f"tensor {name} begins at {offset}, no multiple of the alignment of {alignment}")
        return TensorEntry(part, offset, kind, shape)

    def _check_places(self, tensors: dict[str, TensorEntry]) -> None:
        """Raise CheckpointError where a tensor reaches beyond the file or into another one."""
        before, end = "", 0
        for name, entry in sorted(tensors.items(), key=lambda item: item[1].start):
            if entry.start + entry.nbytes > self._file_size:
                self._fail(
                    f"tensor {shown(name)} needs the bytes from {entry.start} to {entry.start + entry.nbytes}, but the"
                    f" file has {self._file_size}"
                )
            if entry.start < end:
                self._fail(f"tensors {shown(before)} and {shown(name)} overlap")
            before, end = name, entry.start + entry.nbytes

    def _alignment(self, metadata: dict[str, Value]) -> int:
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or not 1 <= alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
            self._fail(f"general.alignment is {shown(alignment)}, no power of two up to {MAX_ALIGNMENT}")
        return alignment

    def _value(self, key: str) -> Value:
        kind = self._number("I")
        if kind == ARRAY:
            return self._array(key)
        if kind == STRING:
            return self._string(MAX_STRING, f"the value of {key}")
        return self._numbers(kind, 1, key)[0]

    def _array(self, key: str) -> list[Scalar]:
        kind = self._number("I")
        if kind == ARRAY:
            self._fail(f"key {key} is an array of arrays, which is not supported")
        count = self._number("Q")
        self._items += count
        if self._items > MAX_ITEMS:
            self._fail(f"key {key} has {count} items; at most {MAX_ITEMS} in all arrays together are supported")
        return self._strings(count, key) if kind == STRING else self._numbers(kind, count, key)

    def _numbers(self, kind: int, count: int, key: str) -> list[Scalar]:
        if kind not in NUMBERS:
            self._fail(f"key {key} has values of the unknown type {kind}")
        form = f"<{count}{NUMBERS[kind]}"
        at = self._advance(struct.calcsize(form), f"the values of {key}")
        if kind == BOOL and set(self._data[at : self._at]) - {0, 1}:
            self._fail(f"key {key} has a bool that is neither 0 nor 1")
        return list(struct.unpack_from(form, self._data, at))

    def _strings(self, count: int, key: str) -> list[Scalar]:
        """As `_string` so many times, in one loop: a vocabulary has some 150,000."""
        data, size, at = self._data, self._size, self._at
        unpack: Callable[..., tuple[int]] = struct.Struct("<Q").unpack_from
        found: list[Scalar] = []
        try:
            for _ in range(count):
                (length,) = unpack(data, at)
                at += 8
                if length > MAX_STRING or length > size - at:
                    self._fail(f"a string of {length} bytes in {key} is too long, or reaches beyond the file")
                found.append(data[at : at + length].decode())
                at += length
        except struct.error:
            self._fail(f"it ends inside {key}")
        except UnicodeDecodeError:
            self._fail(f"string {len(found)} of {key} is not UTF-8")
        self._at = at
        return found

    def _string(self, most: int, what: str) -> str:
        length = self._number("Q")
        if length > most:
            self._fail(f"{what} has {length} bytes; at most {most} are supported")
        at = self._advance(length, what)
        try:
            return self._data[at : self._at].decode()
        except UnicodeDecodeError:
            self._fail(f"{what} is not UTF-8")

    def _count(self, most: int, what: str) -> int:
        count = self._number("Q")
        if count > most:
            self._fail(f"it has {count} {what}; at most {most} are supported")
        return count

    def _number(self, form: str) -> int:
        at = self._advance(struct.calcsize("<" + form), "a number of the header")
        (value,) = struct.unpack_from("<" + form, self._data, at)
        return int(value)

    def _advance(self, count: int, what: str) -> int:
        """Where the next `count` bytes begin."""
        at = self._at
        if count > self._size - at:
            limit = f"a header may have {MAX_HEADER}" if self._size < self._file_size else f"the file has {self._size}"
            self._fail(f"it ends inside {what}: {count} bytes from {at}, and {limit}")
        self._at = at + count
        return at

    def _fail(self, message: str) -> NoReturn:
        raise CheckpointError(f"{self._name} is no GGUF file that can be read: {message}")
