"""Which calibration a server uses: its checkpoint's own; for any other it has a reason that clients may read."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from engine.types import EngineInfo
from server.experts.calibration import ServedCalibration, load_calibration
from server.experts.calibration_card import source
from tests.server.calibrations import calibration
from tests.server.fakes import INFO
from weights.calibration import FILE, cache_folder, checkpoint_hash, write


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint of a few bytes."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    checkpoint = tmp_path / "secret" / "tiny"
    checkpoint.mkdir(parents=True)
    (checkpoint / "config.json").write_text("{}")
    (checkpoint / "model.safetensors").write_bytes(b"weights")
    return checkpoint


@pytest.mark.parametrize("cached", [False, True])
def test_the_checkpoints_own_is_used_from_beside_it_or_from_the_cache(folder: Path, cached: bool) -> None:
    own = calibration(checkpoint_hash(folder))
    write(own, cache_folder(folder) if cached else folder)
    found = load_calibration(folder, "tiny")
    assert found.calibration == own and found.reason == ""


def test_without_one_the_reason_names_the_command(folder: Path) -> None:
    found = load_calibration(folder, "tiny")
    assert found.calibration is None and "`moedial calibrate tiny`" in found.reason


@pytest.mark.parametrize("fault", ["foreign", "damaged", "format"])
def test_one_that_does_not_belong_is_not_used_and_the_reason_shows_no_path(folder: Path, fault: str) -> None:
    own = calibration(checkpoint_hash(folder))
    write(msgspec.structs.replace(own, format=99) if fault == "format" else own, folder)
    if fault == "foreign":
        (folder / "model.safetensors").write_bytes(b"other weights")
    if fault == "damaged":
        (folder / FILE).write_text('{"format": 1, "options": [')
    found = load_calibration(folder, "tiny")
    assert found.calibration is None
    expected = {"foreign": "another checkpoint", "damaged": "damaged", "format": "format 99, not 1"}[fault]
    assert expected in found.reason and FILE in found.reason and "moedial calibrate" in found.reason
    assert "secret" not in found.reason


@pytest.mark.parametrize(
    ("measured", "served", "differences"),
    [
        ({"quantize": "none"}, {}, ""),
        ({}, {"quantize": "int8 experts"}, ""),  # measured by a program that did not say
        (
            {"quantize": "none"},
            {"quantize": "int8 experts", "kv_cache_dtype": "int8"},
            "quantize was none, now int8 experts; kv_cache_dtype was auto, now int8",
        ),
        (
            {"dtype": "bfloat16", "kv_cache_dtype": "int8"},
            {"kv_cache_dtype": "int8"},
            "dtype was bfloat16, now float32",
        ),
        ({"quantize": "none"}, {"quantize": "int8 experts", "backend": ""}, ""),  # not loaded yet
    ],
)
def test_settings_that_differ_from_those_it_was_measured_with_are_named(
    measured: dict[str, Any], served: dict[str, Any], differences: str
) -> None:
    found = ServedCalibration(msgspec.structs.replace(calibration(), **measured), "")
    info: EngineInfo = replace(INFO, **served)
    assert found.differences(info) == source(found, info).get("differences", "") == differences
