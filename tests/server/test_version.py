"""Where the version is written, and what `moedial version` says of an installation."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

from model.backends.cpu.kernels.library import load
from server import version

ROOT = Path(__file__).parents[2]


def test_the_version_is_written_in_one_place() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "version" in project["project"]["dynamic"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "server.version.VERSION"}
    assert re.fullmatch(r"\d+\.\d+\.\d+", version.VERSION)


def test_the_command_prints_a_report() -> None:
    command = [sys.executable, "-c", "from server.cli import main; main()", "version"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    lines = dict(line.split(maxsplit=1) for line in printed.splitlines())
    assert list(lines) == ["moedial", "build", "python", "torch", "kernels"]
    assert lines["moedial"] == version.VERSION and lines["torch"] == torch.__version__
    assert lines["kernels"] == f"{load().name}, {load().origin or load().reason}"


def test_a_build_says_its_commit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(version, "COMMIT", tmp_path / "commit.txt")
    monkeypatch.setattr(version, "CHECKOUT", tmp_path)
    assert version.build_of() == "unknown"
    (tmp_path / "commit.txt").write_text("0123456789ab\n")
    assert version.build_of() == "0123456789ab"


def test_what_cannot_be_found_out_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    assert version.report().splitlines()[3:] == ["torch    cannot be loaded", "kernels  unknown"]
