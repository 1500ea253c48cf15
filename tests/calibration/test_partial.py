"""Partial results outlive their process, and are used for nothing else than they were made for."""

import logging
from pathlib import Path

import pytest

from calibration.partial import Partial

KEY = {"checkpoint": "a", "text": "b"}


def test_values_are_there_for_the_next_run(tmp_path: Path) -> None:
    first = Partial(tmp_path / "partial.json", KEY)
    first.put("k2", {"loss": 1.5})
    first.flush()
    second = Partial(tmp_path / "partial.json", KEY)
    assert second.resumed and second.get("k2") == {"loss": 1.5}
    assert second.get("k4") is None


def test_those_of_another_checkpoint_are_not_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = Partial(tmp_path / "partial.json", KEY)
    first.put("k2", 1.0)
    first.flush()
    with caplog.at_level(logging.WARNING):
        second = Partial(tmp_path / "partial.json", KEY | {"checkpoint": "other"})
    assert not second.resumed and second.get("k2") is None
    assert "of another checkpoint: the calibration starts again" in caplog.text


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"key": {}, "values": 3}', b"\xff\xfe"])
def test_after_a_damaged_file_it_starts_again_with_a_warning(
    tmp_path: Path, damage: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "partial.json"
    path.write_bytes(damage)
    with caplog.at_level(logging.WARNING):
        partial = Partial(path, KEY)
    assert not partial.resumed
    assert f"{path} is damaged" in caplog.text


def test_nothing_is_left_when_it_is_forgotten(tmp_path: Path) -> None:
    partial = Partial(tmp_path / "partial.json", KEY)
    partial.put("k2", 1.0)
    partial.flush()
    partial.forget()
    assert list(tmp_path.iterdir()) == []
