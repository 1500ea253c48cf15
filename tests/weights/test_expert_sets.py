"""Files of expert sets: written, found, checked."""

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.errors import CheckpointError, InvalidRequest
from weights.expert_sets import FOLDER, MAX_BYTES, ExpertSet, Loss, check_name, find, read, write

HASH = "c" * 64
FOUND = ExpertSet(
    format=1,
    name="stories",
    checkpoint=HASH,
    text="stories.txt",
    tokens=100,
    num_experts=5,
    experts=((0, 3), (1, 4)),
    mass=(0.5, 0.75),
    task=Loss(2.0, 2.5),
)


def test_a_set_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = write(FOUND, tmp_path)
    assert path == tmp_path / FOLDER / "stories.json" == find(tmp_path, "stories")
    assert read(path, HASH) == FOUND


@given(st.binary(max_size=300))
def test_bytes_that_are_no_set_are_refused(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.mktemp("sets") / "x.json"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="damaged"):
        read(path, HASH)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"format": 2}, "has format 2, not 1"),
        ({"checkpoint": "d" * 64}, "belongs to another checkpoint"),
        ({"experts": []}, "experts names none"),
        ({"experts": [[], []]}, "experts names none"),
        ({"experts": [[0, 3], [1]]}, "layer 1 keeps 1 experts, but layer 0 keeps 2"),
        ({"experts": [[0, 3], [4, 1]]}, "experts of layer 1 must be rising numbers from 0 to 4"),
        ({"experts": [[3, 3], [1, 4]]}, "experts of layer 0 must be rising"),
        ({"experts": [[0, 5], [1, 4]]}, "experts of layer 0 must be rising numbers from 0 to 4"),
        ({"experts": [[-1, 3], [1, 4]]}, "experts of layer 0 must be rising"),
        ({"experts": [[0, 10**30], [1, 4]]}, "experts of layer 0 must be rising"),
        ({"unknown": 1}, "damaged"),
    ],
)
def test_a_set_that_cannot_be_is_refused(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    path = write(FOUND, tmp_path)
    path.write_text(json.dumps(msgspec.to_builtins(FOUND) | changes))
    with pytest.raises(CheckpointError, match=said):
        read(path, HASH)


def test_a_file_that_is_too_large_is_refused(tmp_path: Path) -> None:
    path = write(FOUND, tmp_path)
    with path.open("ab") as file:
        file.truncate(MAX_BYTES + 1)
    with pytest.raises(CheckpointError, match=f"larger than {MAX_BYTES} bytes"):
        read(path, HASH)


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".x", "A", "x" * 65, "x\n"])
def test_a_name_that_is_no_file_name_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(InvalidRequest, match="expert set's name"):
        check_name(name)
    with pytest.raises(InvalidRequest, match="expert set's name"):
        find(tmp_path, name)


def test_a_set_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no expert set 'stories'; `moedial expert-set` makes one"):
        find(tmp_path, "stories")
