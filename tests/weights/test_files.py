"""safetensors folders: every way in which files can be damaged or hostile ends in one CheckpointError that names it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from model.errors import CheckpointError
from tests.weights.checkpoints import OLMOE, raw_safetensors, write
from weights.files import TensorFiles
from weights.folder import read_json

ENTRY = '{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'


def said(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught, TensorFiles(folder) as files:
        for name in files.stored:
            files.read(name)
    return str(caught.value)


def shards(folder: Path, weight_map: dict[str, Any], **files: dict[str, float]) -> None:
    """Shards `a`, `b`, … with tensors of one value each, and an index."""
    for name, values in files.items():
        save_file({key: torch.tensor([value]) for key, value in values.items()}, folder / f"{name}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_two_shards_are_one_set_of_tensors(tmp_path: Path) -> None:
    shards(tmp_path, {"x": "a.safetensors", "y": "b.safetensors"}, a={"x": 1.0}, b={"y": 2.0})
    with TensorFiles(tmp_path) as files:
        assert {name: each.file for name, each in files.stored.items()} == {"x": "a.safetensors", "y": "b.safetensors"}
        assert files.read("y").item() == 2.0


def test_a_shard_may_be_a_link_as_in_the_hubs_cache(tmp_path: Path) -> None:
    folder = tmp_path / "snapshot"
    folder.mkdir()
    save_file({"x": torch.tensor([3.0])}, tmp_path / "blob")
    (folder / "model.safetensors").symlink_to(tmp_path / "blob")
    with TensorFiles(folder) as files:
        assert files.read("x").item() == 3.0


@pytest.mark.parametrize("keep", [0, 5, 8, 100, -4])
def test_a_truncated_file(keep: int, tmp_path: Path) -> None:
    write(tmp_path, OLMOE)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    assert "model.safetensors" in said(tmp_path)


def test_a_header_larger_than_the_file(tmp_path: Path) -> None:
    raw_safetensors(tmp_path / "model.safetensors", "{}", size=1 << 40)
    assert "header of 1099511627776 bytes does not fit a file of 10" in said(tmp_path)


def test_a_name_twice_in_the_header(tmp_path: Path) -> None:
    raw_safetensors(tmp_path / "model.safetensors", f'{{"x":{ENTRY},"x":{ENTRY}}}', b"\0" * 4)
    assert "twice" in said(tmp_path)


@pytest.mark.parametrize("header", ["[1]", "nonsense", "{" * 5000, '{"x":' + ENTRY.replace("[1]", "[9]") + "}"])
def test_a_header_that_makes_no_sense(header: str, tmp_path: Path) -> None:
    raw_safetensors(tmp_path / "model.safetensors", header, b"\0" * 4)
    assert "model.safetensors" in said(tmp_path)


@settings(deadline=None, max_examples=80)
@given(data=st.data())
def test_one_changed_byte_is_read_or_refused_but_never_worse(data: st.DataObject, tmp_path_factory: Any) -> None:
    folder = tmp_path_factory.mktemp("flip")
    save_file({"x": torch.arange(3.0), "y": torch.arange(2)}, folder / "model.safetensors")
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    (folder / "model.safetensors").write_bytes(content)
    try:
        with TensorFiles(folder) as files:
            for name in files.stored:
                files.read(name)
    except CheckpointError as error:
        assert "model.safetensors" in str(error)


@pytest.mark.parametrize("name", ["../a.safetensors", "/etc/passwd", "sub/a.safetensors", "..", "", "a.bin"])
def test_an_index_that_names_a_file_elsewhere(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"x": torch.zeros(1)}, tmp_path / "a.safetensors")
    shards(folder, {"x": name})
    assert repr(name) in said(folder) and "inside the folder" in said(folder)


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    shards(tmp_path, {"x": "a.safetensors", "y": "b.safetensors"}, a={"x": 1.0}, b={"x": 1.0, "y": 2.0})
    assert said(tmp_path) == "tensor 'x' is in both a.safetensors and b.safetensors"


def test_an_index_that_names_a_missing_shard_or_tensor(tmp_path: Path) -> None:
    shards(tmp_path, {"x": "a.safetensors", "y": "b.safetensors"}, a={"x": 1.0})
    assert "b.safetensors does not exist" in said(tmp_path)
    shards(tmp_path, {"x": "a.safetensors", "y": "a.safetensors"}, a={"x": 1.0})
    assert "first 'y'" in said(tmp_path)


@pytest.mark.parametrize("index", [{}, {"weight_map": []}, {"weight_map": {"x": 1}}, []])
def test_an_index_without_a_map(index: object, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "index.json" in said(tmp_path)


def test_a_folder_with_pickles_only(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04")
    assert "pytorch_model.bin will not be opened" in said(tmp_path)


def test_a_folder_in_place_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").mkdir()
    assert "model.safetensors" in said(tmp_path)


def test_json_that_is_nested_without_end(tmp_path: Path) -> None:
    (tmp_path / "deep.json").write_text('{"a":' * 100_000)
    with pytest.raises(CheckpointError, match=r"deep\.json"):
        read_json(tmp_path / "deep.json")


def test_tensors_are_read_as_they_are_stored(tmp_path: Path) -> None:
    stored = {"a": torch.randn(3, 4).bfloat16(), "b": torch.arange(5)}
    save_file(stored, tmp_path / "model.safetensors")
    with TensorFiles(tmp_path) as files:
        read = {name: files.read(name).clone() for name in files.stored}
    assert all(torch.equal(read[name], value) and read[name].dtype == value.dtype for name, value in stored.items())
    assert load_file(tmp_path / "model.safetensors").keys() == read.keys()
