"""The file of a calibration: what is written is read, and nothing that is damaged or another checkpoint's is."""

import json
from pathlib import Path

import pytest
from msgspec.structs import replace

from model.errors import CheckpointError
from tests.weights.checkpoints import OLMOE, write
from tests.weights.test_calibration_plot import THREE, calibration
from weights.calibration import FILE, FORMAT, MAX_BYTES, REPAIR_FILE, checkpoint_hash, find, read
from weights.calibration import write as write_calibration

HASH = "0" * 64


def test_what_is_written_is_read(tmp_path: Path) -> None:
    given = replace(calibration(*THREE), profiles={"fast": (1, 2)}, normalisers={"k1": 16, "k2": "raw"})
    assert read(write_calibration(given, tmp_path), HASH) == given
    assert [file.name for file in tmp_path.iterdir()] == [FILE]
    assert given.option("k2") == THREE[1] and given.option("k3") is None


def test_that_of_another_checkpoint_is_refused_by_name(tmp_path: Path) -> None:
    path = write_calibration(calibration(*THREE), tmp_path)
    with pytest.raises(CheckpointError, match="belongs to another checkpoint") as refused:
        read(path, "1" * 64)
    assert str(path) in str(refused.value) and "moedial calibrate" in str(refused.value)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (b"", "is damaged"),
        (b"{", "is damaged"),
        (b"\xff\xfe", "is damaged"),
        (b"[" * 100_000, "is damaged"),
        (b'{"format": 1}', "is damaged: Object missing required field"),
        (b" " * (MAX_BYTES + 1), f"is larger than {MAX_BYTES} bytes"),
    ],
)
def test_a_damaged_file_is_refused_by_name(tmp_path: Path, damage: bytes, message: str) -> None:
    path = tmp_path / FILE
    path.write_bytes(damage)
    with pytest.raises(CheckpointError, match=message) as refused:
        read(path, HASH)
    assert str(path) in str(refused.value)


def test_another_format_and_an_unknown_field_are_refused(tmp_path: Path) -> None:
    path = write_calibration(replace(calibration(*THREE), format=FORMAT + 1), tmp_path)
    with pytest.raises(CheckpointError, match=f"has format {FORMAT + 1}, not {FORMAT}"):
        read(path, HASH)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": FORMAT, "more": 1}))
    with pytest.raises(CheckpointError, match="unknown field `more`"):
        read(path, HASH)


def test_a_hash_follows_config_and_weights_and_nothing_else(tmp_path: Path) -> None:
    write(tmp_path / "a", OLMOE)
    before = checkpoint_hash(tmp_path / "a")
    for name in (FILE, REPAIR_FILE, "card.json"):
        (tmp_path / "a" / name).write_text("{}")
    assert checkpoint_hash(tmp_path / "a") == before
    write(tmp_path / "b", OLMOE | {"num_experts_per_tok": 3})
    assert checkpoint_hash(tmp_path / "b") != before
    weights = tmp_path / "a" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert checkpoint_hash(tmp_path / "a") != before


def test_it_is_found_beside_the_weights_first_then_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from weights.calibration import cache_folder

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "model"
    folder.mkdir()
    assert find(folder) is None
    cached = write_calibration(calibration(*THREE), cache_folder(folder))
    assert find(folder) == cached and cached.is_relative_to(tmp_path / "cache")
    beside = write_calibration(calibration(*THREE), folder)
    assert find(folder) == beside
