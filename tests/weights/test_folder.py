"""Where a model is found: bundled, in a folder, or in the hub's cache without any network."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from model.errors import CheckpointError
from tests.weights.checkpoints import OLMOE, write
from weights import folder as place
from weights.folder import bundled_models, read_card, resolve_model

SHA = "0123456789abcdef0123456789abcdef01234567"


def test_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_model(str(tmp_path)) == tmp_path
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve_model("org/name") == Path("org/name")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_model("~/org") == tmp_path / "org"


def test_a_bundled_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "tiny-stories", OLMOE)
    (tmp_path / "unfinished").mkdir()
    monkeypatch.setattr(place, "BUNDLED", tmp_path)
    assert bundled_models() == ["tiny-stories"]
    assert resolve_model("tiny-stories") == tmp_path / "tiny-stories"


@pytest.mark.parametrize("name", ["no-such-model", "./org/name", "../x", "/nowhere/model", "a/b/c", "-x/y", "o/na me"])
def test_what_is_neither_says_so(name: str) -> None:
    with pytest.raises(CheckpointError, match="neither a bundled model"):
        resolve_model(name)


def test_a_gguf_file_that_is_not_there_is_not_looked_for_on_the_hub(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"^the file models/x\.gguf does not exist$"):
        resolve_model("models/x.gguf")
    (tmp_path / "X.GGUF").touch()
    with pytest.raises(CheckpointError, match=r"X\.GGUF must end in \.gguf, in small letters$"):
        resolve_model(str(tmp_path / "X.GGUF"))


def test_a_hub_repository_of_gguf_files_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **_: str(tmp_path))
    with pytest.raises(CheckpointError, match=r"'org/some-GGUF' has no config\.json .* download one of them"):
        resolve_model("org/some-GGUF")


def hub_cache(root: Path) -> Path:
    """The hub's cache as its own client lays it out: blobs, and a snapshot of links to them."""
    repository = root / "models--org--tiny"
    snapshot = repository / "snapshots" / SHA
    for folder in (snapshot, repository / "refs", repository / "blobs"):
        folder.mkdir(parents=True)
    (repository / "refs" / "main").write_text(SHA)
    write(root / "source", OLMOE)
    for name in ("config.json", "model.safetensors"):
        (root / "source" / name).rename(repository / "blobs" / name)
        (snapshot / name).symlink_to(Path("../../blobs") / name)
    return snapshot


def offline(cache: Path, code: str) -> str:
    """What a fresh process without network prints; the hub's client reads its settings once."""
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(cache), "HF_HOME": str(cache)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_hub_id_is_found_in_the_offline_cache_and_loads(tmp_path: Path) -> None:
    snapshot = hub_cache(tmp_path)
    code = """
from weights.folder import resolve_model
from weights.load import load_model
folder = resolve_model("org/tiny")
load_model(folder)
print(folder)
"""
    assert offline(tmp_path, code) == str(snapshot)


def test_a_hub_id_that_is_not_cached_says_so(tmp_path: Path) -> None:
    code = """
from weights.folder import resolve_model
from model.errors import CheckpointError
try:
    resolve_model("org/absent")
except CheckpointError as error:
    print(error)
"""
    assert "'org/absent' is not a folder here" in offline(tmp_path, code)


def test_finding_a_model_needs_no_torch(tmp_path: Path) -> None:
    code = "import sys, weights.folder, weights.tokenizer, weights.chat; print('torch' in sys.modules)"
    assert offline(tmp_path, code) == "False"


def test_a_card(tmp_path: Path) -> None:
    assert read_card(tmp_path) == {}
    (tmp_path / "card.json").write_text(json.dumps({"quality": [1]}))
    assert read_card(tmp_path) == {"quality": [1]}


@pytest.mark.parametrize("text", ["{", "[1]", "[" * 100_000])
def test_a_damaged_card(text: str, tmp_path: Path) -> None:
    (tmp_path / "card.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"card\.json"):
        read_card(tmp_path)
