"""The reader of GGUF files gives back what was written, and refuses everything that does not fit the file."""

import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.errors import CheckpointError
from tests.weights.gguf.writer import Blob, blob, gguf_bytes, header_bytes, string, write_gguf
from weights.gguf import header
from weights.gguf.reader import GgufFile

METADATA: dict[str, Any] = {
    "general.architecture": "olmoe",
    "olmoe.block_count": 2,
    "olmoe.eps": 0.5,
    "neg": -3,
    "yes": True,
    "tokens": ["a", "ß", ""],
    "types": [1, 3, 1],
    "flags": [True, False],
    "empty": [],
}
TENSORS = {"a": blob("F32", (3, 2), struct.pack("<6f", *range(6))), "b": blob("Q8_0", (2, 64)), "c": blob("F16", (5,))}


def opened(path: Path, data: bytes) -> GgufFile:
    path.write_bytes(data)
    return GgufFile(path)


@pytest.mark.parametrize("version", [2, 3])
def test_what_was_written_is_read(version: int, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "x.gguf", METADATA, TENSORS, version)
    with GgufFile(path) as file:
        assert file.metadata == METADATA
        assert {name: (entry.type.name, entry.shape) for name, entry in file.tensors.items()} == {
            name: (each.type, each.shape) for name, each in TENSORS.items()
        }
        for name, each in TENSORS.items():
            found = bytearray(file.tensors[name].nbytes)
            file.read_into(name, memoryview(found))
            assert bytes(found) == each.data
            file.read_into(name, memoryview(found)[:4], offset=4)
            assert bytes(found)[:4] == each.data[4:8]


def test_alignment_is_the_files(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "x.gguf", METADATA | {"general.alignment": 256}, TENSORS)
    with GgufFile(path) as file:
        assert all(entry.start % 256 == 0 for entry in file.tensors.values())


NUMBERS = st.integers(-(2**31), 2**31 - 1) | st.booleans() | st.floats(width=32, allow_nan=False)
STRINGS = st.text(max_size=9)
VALUES = NUMBERS | STRINGS | st.lists(STRINGS, max_size=5) | st.lists(st.integers(0, 2**32 - 1), max_size=5)


@settings(max_examples=30)
@given(st.dictionaries(st.text("a.é\0", max_size=9), VALUES, max_size=6))
def test_any_metadata_is_read(tmp_path_factory: pytest.TempPathFactory, metadata: dict[str, Any]) -> None:
    with GgufFile(write_gguf(tmp_path_factory.mktemp("any") / "x.gguf", metadata, {})) as file:
        assert file.metadata == metadata


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    data = gguf_bytes(METADATA, TENSORS)
    for length in range(0, len(data), 3):
        with pytest.raises(CheckpointError):
            opened(tmp_path / "x.gguf", data[:length])


def test_a_file_cut_while_it_is_read_is_refused(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "x.gguf", METADATA, TENSORS)
    with GgufFile(path) as file:
        with path.open("r+b") as other:
            other.truncate(100)
        with pytest.raises(CheckpointError, match="ends before it does"):
            file.read_into("b", memoryview(bytearray(136)))


def one(kind: str | int, shape: tuple[int, ...], offset: int = 0, data: int = 64) -> bytes:
    """A file with one tensor that says so of itself."""
    head = header_bytes({}, [("t", Blob(kind, shape, b""), offset)])
    return head + bytes(-len(head) % 32 + data)


def lying(count: int, at: int) -> bytes:
    """A good file with another number of eight bytes at one place."""
    data = bytearray(gguf_bytes({"k": "value"}, {"a": blob("F32", (4,))}))
    data[at : at + 8] = struct.pack("<Q", count)
    return bytes(data)


def key(value: bytes, keys: int = 1) -> bytes:
    """A file with keys of these bytes."""
    return b"GGUF" + struct.pack("<IQQ", 3, 0, keys) + value


HOSTILE: Mapping[str, tuple[bytes, str]] = {
    "empty": (b"", "empty"),
    "another format": (b"PK\x03\x04" + bytes(99), "four bytes GGUF"),
    "version 1": (b"GGUF" + struct.pack("<I", 1) + bytes(99), "version 1"),
    "big-endian": (b"GGUF" + struct.pack(">I", 3) + bytes(99), "big-endian"),
    "more tensors than are supported": (lying(2**63, 8), "9223372036854775808 tensors"),
    "more keys than are supported": (lying(2**63, 16), "9223372036854775808 keys"),
    "more tensors than there are": (lying(2, 8), "ends inside|tensor"),
    "more keys than there are": (lying(60_000, 16), "bytes; at most|ends inside|appears twice"),
    "a long key": (lying(2**60, 24), "the name of a key has"),
    "a long string": (lying(2**40, 37), "the value of 'k' has"),
    "a string beyond the end": (lying(2**20, 37), "ends inside"),
    "a key twice": (key((string("k") + struct.pack("<II", 4, 1)) * 2, 2), "'k' appears twice"),
    "a key that is no text": (key(string(b"\xff") + struct.pack("<II", 4, 1)), "not UTF-8"),
    "an unknown type of value": (key(string("k") + struct.pack("<II", 13, 1)), "unknown type 13"),
    "a third truth": (key(string("k") + struct.pack("<IB", 7, 2)), "neither 0 nor 1"),
    "arrays of arrays": (key(string("k") + struct.pack("<IIQIQ", 9, 9, 1, 9, 1)), "array of arrays"),
    "a huge array": (key(string("k") + struct.pack("<IIQ", 9, 0, 2**62)), "4611686018427387904 items"),
    "an array beyond the end": (key(string("k") + struct.pack("<IIQ", 9, 10, 2**20)), "ends inside the values"),
    "strings beyond the end": (key(string("k") + struct.pack("<IIQ", 9, 8, 2**20)), "ends inside"),
    "a long string of many": (key(string("k") + struct.pack("<IIQQ", 9, 8, 1, 2**50)), "too long"),
    "a string of many that is no text": (key(string("k") + struct.pack("<IIQ", 9, 8, 1) + string(b"\xff")), "string 0"),
    "no axes": (one("F32", ()), "0 axes"),
    "many axes": (one("F32", (1, 1, 1, 1, 1)), "5 axes"),
    "an axis of zero": (one("F32", (4, 0)), "no rows of"),
    "half a block": (one("Q4_0", (48,)), "no rows of 32"),
    "a shape that overflows": (one("F32", (2**32, 2**32, 4)), "but the file has"),
    "a shape that overflows to few bytes": (one("F32", (2**62 + 4,)), "but the file has"),
    "an offset outside": (one("F32", (4,), 64), "but the file has"),
    "an absurd offset": (one("F32", (4,), 2**64 - 32), "but the file has"),
    "an offset between alignments": (one("F32", (4,), 4), "no multiple of the alignment"),
    "a type that is not read": (one(16, (256,)), r"IQ2_XXS \(16\); supported are F32, F16, Q4_0"),
    "a type that is not known": (one(77, (256,)), r"unknown \(77\)"),
    "tensors that overlap": (
        header_bytes({}, [("a", blob("F32", (16,)), 0), ("b", blob("F32", (4,)), 32)]) + bytes(99),
        "'a' and 'b' overlap",
    ),
    "a tensor twice": (header_bytes({}, [("a", blob("F32", (4,)), 0)] * 2) + bytes(99), "'a' appears twice"),
    "no power of two": (gguf_bytes({"general.alignment": 48}, {}), "general.alignment is 48"),
    "an alignment of zero": (header_bytes({"general.alignment": 0}, []), "general.alignment is 0"),
    "an alignment in words": (header_bytes({"general.alignment": "32"}, []), "general.alignment is '32'"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_files_are_refused(what: str, tmp_path: Path) -> None:
    data, message = HOSTILE[what]
    with pytest.raises(CheckpointError, match=message):
        opened(tmp_path / "x.gguf", data)


def test_items_of_all_arrays_count_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(header, "MAX_ITEMS", 5)
    write_gguf(tmp_path / "x.gguf", {"a": [1, 2], "b": ["x", "y", "z"]}, {})
    GgufFile(tmp_path / "x.gguf")
    with pytest.raises(CheckpointError, match="'b' has 4 items; at most 5"):
        GgufFile(write_gguf(tmp_path / "x.gguf", {"a": [1, 2], "b": ["x", "y", "z", ""]}, {}))


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        GgufFile(tmp_path / "x.gguf")
    with pytest.raises(CheckpointError, match="not a regular file"):
        GgufFile(tmp_path)


def write_parts(folder: Path, change: Callable[[int], dict[str, Any]] = lambda part: {}) -> Path:
    """Three parts with one tensor each; the first has the metadata."""
    for part, (name, each) in enumerate(TENSORS.items()):
        split = {"split.no": part, "split.count": 3, "split.tensors.count": 3} | change(part)
        write_gguf(folder / f"m-0000{part + 1}-of-00003.gguf", split | (METADATA if part == 0 else {}), {name: each})
    return folder / "m-00001-of-00003.gguf"


@pytest.mark.parametrize("part", [1, 2, 3])
def test_all_parts_are_read_from_any_of_them(part: int, tmp_path: Path) -> None:
    write_parts(tmp_path)
    with GgufFile(tmp_path / f"m-0000{part}-of-00003.gguf") as file:
        assert file.metadata["tokens"] == METADATA["tokens"]
        assert [file.tensors[name].part for name in TENSORS] == [0, 1, 2]
        found = bytearray(24)
        file.read_into("a", memoryview(found))
        assert bytes(found) == TENSORS["a"].data


def test_parts_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    path = write_parts(tmp_path, lambda part: {"split.no": 0})
    with pytest.raises(CheckpointError, match=r"split.no 0, but by its name it is part 1 of 3"):
        GgufFile(path)
    path = write_parts(tmp_path, lambda part: {"split.tensors.count": 4})
    with pytest.raises(CheckpointError, match=r"split.tensors.count is 4, but the 3 parts have 3"):
        GgufFile(path)
    write_parts(tmp_path).rename(tmp_path / "renamed.gguf")
    with pytest.raises(CheckpointError, match=r"split.count is 3"):
        GgufFile(tmp_path / "renamed.gguf")
    with pytest.raises(CheckpointError, match=r"m-00001-of-00003.gguf does not exist; all 3 parts must lie in one"):
        GgufFile(path)
    with pytest.raises(CheckpointError, match="part 4 of 3"):
        GgufFile(tmp_path / "m-00004-of-00003.gguf")
    write_parts(tmp_path)
    write_gguf(
        tmp_path / "m-00002-of-00003.gguf",
        {"split.no": 1, "split.count": 3, "split.tensors.count": 3},
        {"a": TENSORS["a"]},
    )
    with pytest.raises(CheckpointError, match="'a' is in two parts"):
        GgufFile(path)
