"""Finds a model: a folder, a GGUF file, the name of a bundled model, or a hub id. Also reads its card and other files.

Torch-free, so that the HTTP process may use it. It does not read weights.
"""

import json
import os
import re
import stat
from pathlib import Path
from typing import Any, BinaryIO

from model.errors import CheckpointError

BUNDLED = Path(__file__).parent / "bundled"
DEFAULT = "infinity-stories"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
GGUF = ".gguf"
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
PACKED = "packed.json"  # makes a folder a packed model (see `weights/packed.py`)
PART = re.compile(r"-\d{5}-of-\d{5}$")  # of a file in parts, before .gguf
LATER_PART = re.compile(r".*-(?!00001)\d{5}-of-\d{5}\.gguf")
CARD = "card.json"
MAX_JSON = 100 * 1024 * 1024
_WANTED = ["*.json", "*.safetensors", "*.jinja"]


def bundled_models() -> list[str]:
    """Names of the models that ship with moedial."""
    return sorted(path.parent.name for path in BUNDLED.glob("*/config.json"))


def compared_models() -> list[str]:
    """Of the bundled models those with a calibration, which the docs compare; the others show kinds of mixtures."""
    return [name for name in bundled_models() if (BUNDLED / name / "calibration.json").exists()]


def resolve_model(name: str) -> Path:
    """The folder or the GGUF file of a model, given as a bundled name, a path, or a hub id `owner/name`.

    A hub id is looked up in the local cache first when `HF_HUB_OFFLINE` is set, and when the hub cannot be reached.

    Raises:
        CheckpointError: says what was tried.
    """
    if name in bundled_models():
        return BUNDLED / name
    path = Path(os.path.expanduser(name))
    if path.is_dir():
        return _gguf_inside(path) or path
    if path.is_file() and path.suffix == GGUF:
        return path
    if path.suffix.lower() == GGUF:  # else models/x.gguf would be looked for on the hub
        wrong = f"must end in {GGUF}, in small letters" if path.exists() else "does not exist"
        raise CheckpointError(f"the file {path} {wrong}")
    if _HUB_ID.fullmatch(name) and not name.startswith(("./", "../", "~")):
        return _download(name)
    known = ", ".join(bundled_models()) or "none"
    raise CheckpointError(
        f"model {name!r} is neither a bundled model ({known}), nor a folder, nor a {GGUF} file, nor a hub id"
    )


def _gguf_inside(folder: Path) -> Path | None:
    """The one GGUF file of a folder that has no config.json; of a file in parts the first.

    Raises:
        CheckpointError: there are several.
    """
    if (folder / "config.json").exists():
        return None
    paths = sorted(path for path in folder.glob(f"*{GGUF}") if not LATER_PART.fullmatch(path.name))
    if len(paths) > 1:
        names = ", ".join(path.name for path in paths[:8])
        raise CheckpointError(f"{folder} has {len(paths)} GGUF files ({names}); name the one to load")
    return paths[0] if paths else None


def is_gguf(model: Path) -> bool:
    """Whether a model is a GGUF file, not a folder."""
    return model.suffix == GGUF and not model.is_dir()


def beside(model: Path) -> Path:
    """The folder of what was measured of a model: its own, or for a GGUF file NAME.gguf the folder NAME.moedial."""
    return model.with_suffix(".moedial") if is_gguf(model) else model


def model_name(model: Path) -> str:
    """What a model is called by its path: the folder's name, or the file's without .gguf and without its part."""
    return PART.sub("", model.stem) if is_gguf(model) else model.name


def _download(name: str) -> Path:
    """The hub's snapshot of a model: safetensors and JSON only, never code or pickles."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise CheckpointError(f"{name!r} looks like a hub id; install huggingface-hub to load from a hub") from None
    try:
        found = Path(snapshot_download(name, allow_patterns=_WANTED))
    except Exception as first:
        try:
            found = Path(snapshot_download(name, allow_patterns=_WANTED, local_files_only=True))
        except Exception:
            raise CheckpointError(f"{name!r} is not a folder here, and the hub has no answer: {first}") from None
    if not (found / "config.json").exists():
        raise CheckpointError(
            f"{name!r} has no config.json on the hub; if it holds {GGUF} files, download one of them and give its path"
        )
    return found


def weight_map(folder: Path) -> dict[str, str]:
    """By tensor the file that a checkpoint's index names, inside the folder. (A symlink may lead out: that is how the
    hub's cache stores files.)

    Raises:
        CheckpointError: the index is damaged, or names something else.
    """
    found = read_json(folder / INDEX).get("weight_map")
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found.values()):
        raise CheckpointError(f"{INDEX}: weight_map must map tensor names to file names")
    for name in set(found.values()):
        if Path(name).name != name or name in {"", ".", ".."} or not name.endswith(".safetensors"):
            raise CheckpointError(f"{INDEX} names {name!r}, which is not a safetensors file inside the folder")
    return found


def read_card(model: Path) -> dict[str, Any]:
    """The measured quality of a checkpoint (`card.json`), or an empty card."""
    path = beside(model) / CARD
    return read_json(path) if path.exists() else {}


def open_regular(path: Path) -> BinaryIO:
    """A file, open for reading. A pipe or a device would wait, never end, or act when it is opened.

    Raises:
        CheckpointError: it is, or leads to, something else than a regular file.
        OSError: it cannot be opened.
    """
    if stat.S_ISREG(path.stat().st_mode):
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        file = os.fdopen(descriptor, "rb")
        if stat.S_ISREG(os.fstat(file.fileno()).st_mode):  # still, or another one by now
            return file
        file.close()
    raise CheckpointError(f"{path} is not a regular file")


def read_text(path: Path, most: int = MAX_JSON) -> str:
    """A file of at most `most` bytes of UTF-8.

    Raises:
        CheckpointError: it is larger, or no regular file.
        OSError, UnicodeDecodeError: it cannot be read.
    """
    with open_regular(path) as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise CheckpointError(f"{path.name} is larger than {most} bytes")
    return data.decode()


def read_json(path: Path) -> dict[str, Any]:
    """One JSON object from a file of at most 100 MiB. Raises CheckpointError that names the file."""
    try:
        value = json.loads(read_text(path))
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object")
    return value
