"""The file of repair statistics: what is written is read again, and no file stops the server."""

import hashlib
import logging
import re
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from model.decoder import Decoder, Layer
from model.errors import CheckpointError
from tests.server.calibrations import calibration
from tests.weights.checkpoints import OLMOE, write
from weights.calibration import REPAIR_FILE, checkpoint_hash
from weights.calibration import write as write_calibration
from weights.load import load_model
from weights.repair import load_repair, read_tables, write_tables

LAYERS, TRAINED, MAXIMUM, WIDTH = 2, 2, 5, 16


def tables(counts: int = TRAINED + 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = {name: torch.randn(LAYERS, counts, WIDTH, generator=generator) for name in ("scale", "shift")}
    made["scale"][:, TRAINED], made["shift"][:, TRAINED] = 1, 0
    return made


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint with a calibration and its statistics."""
    write(tmp_path, OLMOE)
    digest = write_tables(tmp_path / REPAIR_FILE, tables()["scale"], tables()["shift"])
    calibrate(tmp_path, digest)
    return tmp_path


def calibrate(folder: Path, digest: str) -> None:
    fitting = msgspec.structs.replace(calibration(checkpoint_hash(folder)), repair_hash=digest, repaired=(1,))
    write_calibration(fitting, folder)


def layers(model: Decoder) -> list[Layer]:
    return [layer for layer in model.layers if isinstance(layer, Layer)]


def test_what_is_written_reaches_the_layers(folder: Path) -> None:
    model, _ = load_model(folder)
    found = load_repair(model, folder)
    assert (found.repaired, found.reason) == ((1,), "")
    for number, layer in enumerate(layers(model)):
        assert layer.repair is not None
        for table, name, neutral in ((layer.repair.scale_KD, "scale", 1.0), (layer.repair.shift_KD, "shift", 0.0)):
            assert table.shape == (MAXIMUM + 1, WIDTH) and table.dtype == torch.float32
            assert torch.equal(table[: TRAINED + 1], tables()[name][number])
            assert (table[TRAINED + 1 :] == neutral).all(), "counts without a row change nothing"


def test_a_checkpoint_without_a_calibration_has_no_repair_and_no_reason(tmp_path: Path) -> None:
    write(tmp_path, OLMOE)
    model, _ = load_model(tmp_path)
    assert load_repair(model, tmp_path).reason == "" and layers(model)[0].repair is None


def foreign(folder: Path) -> None:
    (folder / "config.json").write_text((folder / "config.json").read_text() + " ")


def cut(folder: Path) -> None:
    (folder / REPAIR_FILE).write_bytes((folder / REPAIR_FILE).read_bytes()[:-4])


def damaged(folder: Path) -> None:
    (folder / "calibration.json").write_text("{")


def huge(folder: Path) -> None:
    with (folder / REPAIR_FILE).open("ab") as file:
        file.truncate(1 << 30)


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (foreign, "belongs to another checkpoint"),
        (damaged, "is damaged"),
        (cut, "is not the file that was written with the calibration"),
        (huge, "larger than"),
        (lambda folder: (folder / REPAIR_FILE).unlink(), "is damaged: .*No such file"),
    ],
)
def test_a_calibration_that_does_not_fit_is_named_and_not_used(
    folder: Path, harm: Callable[[Path], object], said: str, caplog: pytest.LogCaptureFixture
) -> None:
    harm(folder)
    model, _ = load_model(folder)
    with caplog.at_level(logging.WARNING):
        found = load_repair(model, folder)
    assert found.repaired == () and all(layer.repair is None for layer in layers(model))
    assert re.search(said, found.reason) and "the calibration is not used" in caplog.text


@pytest.mark.parametrize(
    ("made", "said"),
    [
        ({"scale": tables()["scale"]}, "must hold the tensors scale and shift, not scale"),
        (tables() | {"more": torch.ones(1)}, "must hold the tensors scale and shift"),
        (tables() | {"shift": tables()["shift"].double()}, "'shift' must be float32 of 2 layers, 3 to 6 counts"),
        (tables(TRAINED + 5), r"not torch.float32 \(2, 7, 16\)"),
        (tables() | {"scale": torch.ones(LAYERS, TRAINED + 1, 3)}, "width 16"),
        (tables() | {"scale": tables()["scale"].index_fill(1, torch.tensor([1]), float("nan"))}, "not finite"),
        (tables() | {"shift": tables()["shift"] + 1}, "'shift' is not 0 at the trained count"),
    ],
)
def test_statistics_of_another_model_are_refused_by_name(folder: Path, made: dict[str, Tensor], said: str) -> None:
    path = folder / REPAIR_FILE
    save_file(made, path)
    model, _ = load_model(folder)
    with pytest.raises(CheckpointError, match=said):
        read_tables(path, model.config, hashlib.sha256(path.read_bytes()).hexdigest())


def test_all_counts_up_to_the_largest_may_have_rows(folder: Path) -> None:
    whole = tables(MAXIMUM + 1)
    digest = write_tables(folder / REPAIR_FILE, whole["scale"], whole["shift"])
    model, _ = load_model(folder)
    scale_LKD, shift_LKD = read_tables(folder / REPAIR_FILE, model.config, digest)
    assert torch.equal(scale_LKD, whole["scale"]) and torch.equal(shift_LKD, whole["shift"])
