"""Damaged GGUF files are read or refused; `make fuzz-gguf` tries many more."""

from pathlib import Path

from tests import fuzz_gguf


def test_the_undamaged_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(fuzz_gguf.sample())
    fuzz_gguf.read_everything(path)


def test_damaged_files_are_read_or_refused() -> None:
    assert 50 < fuzz_gguf.run(100, seed=0) < 100
