"""A bad checkpoint ends the command: one clear error, a non-zero exit, and nothing hangs."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.weights.checkpoints import OLMOE, write
from tests.weights.words import write_tokenizer

pytestmark = pytest.mark.slow
Spoil = Callable[[Path], object]
MODEL = OLMOE | {"vocab_size": 330}


def weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """The same checkpoint with changed tensors."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def index(folder: Path, file: str) -> None:
    """An index that sends every tensor to `file`."""
    names = load_file(folder / "model.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(names, file)}))


def config(folder: Path, **changes: object) -> None:
    (folder / "config.json").write_text(json.dumps(MODEL | changes))


def pipe(path: Path) -> None:
    """In the place of a file, a pipe that nothing writes to."""
    path.unlink()
    os.mkfifo(path)


def cut(folder: Path, keep: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])


CASES: dict[str, tuple[Spoil, str]] = {
    "truncated": (lambda f: cut(f, -64), "model.safetensors is damaged"),
    "header larger than the file": (lambda f: cut(f, 20), "does not fit a file of 20"),
    "wrong shape": (lambda f: config(f, intermediate_size=13), "not (13, 16)"),
    "missing": (lambda f: weights(f, lambda t: t.pop("model.norm.weight")), "missing model.norm.weight"),
    "extra": (lambda f: weights(f, lambda t: t.update(more=torch.ones(1))), "extra more"),
    "outside": (lambda f: index(f, "../model.safetensors"), "not a safetensors file inside the folder"),
    "pickle only": (lambda f: (f / "model.safetensors").rename(f / "model.bin"), "only safetensors is"),
    "remote code": (lambda f: config(f, auto_map={"AutoModel": "x.Y"}), "asks for remote code"),
    "not finite": (lambda f: weights(f, lambda t: t["model.norm.weight"].fill_(torch.nan)), "are not finite"),
    "a pipe": (lambda f: pipe(f / "config.json"), "config.json is not a regular file"),
    "too many layers": (lambda f: config(f, num_hidden_layers=10**9), "num_hidden_layers must be at most"),
    "an end that is no token": (lambda f: config(f, eos_token_id=4000), "eos_token_id 4000"),
    "no token can be computed": (
        lambda f: weights(f, lambda t: t["lm_head.weight"].fill_(3e38)),
        "the model cannot compute a token",
    ),
    "unknown field": (lambda f: config(f, warp=2), "may change what it computes: warp"),
}


# The others are the same way out of the process; what they say is in tests/weights/test_load.py and test_hostile.py.
ALWAYS = {"truncated", "no token can be computed"}
cases = [pytest.param(name, marks=() if name in ALWAYS else pytest.mark.redundant) for name in CASES]


@pytest.mark.parametrize("name", cases)
def test_one_clear_error(name: str, tmp_path: Path) -> None:
    spoil, words = CASES[name]
    write_tokenizer(tmp_path)
    write(tmp_path, MODEL)  # its config.json is the one that counts
    spoil(tmp_path)
    arguments = ["serve", "--port", "0", "--model", str(tmp_path), "--load-timeout", "60"]
    command = [sys.executable, "-c", "from server.cli import main; main()", *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)
    assert ended.returncode == 1 and words in ended.stderr, ended.stderr
    assert sum(words in line for line in ended.stderr.splitlines()) <= 2  # the engine's log line, and the server's
