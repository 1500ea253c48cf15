"""A model's small files, by the names that they have in a folder: from a folder, or from a GGUF file's metadata.

Only `small_files` distinguishes the two. Torch-free, so that the HTTP process may use it. It reads no
tensors.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from model.errors import CheckpointError
from weights.folder import is_gguf, read_json, read_text
from weights.gguf.families import raw_config
from weights.gguf.reader import GgufFile, part_paths
from weights.gguf.tokenizer import added_tokens, generation_config, tokenizer_config, tokenizer_json
from weights.gguf.vocabulary import PREFIX, WAY_OUT, Vocabulary

CONFIG, TOKENIZER = "config.json", "tokenizer.json"
TOKENIZER_CONFIG, GENERATION = "tokenizer_config.json", "generation_config.json"
MADE = {TOKENIZER: tokenizer_json, TOKENIZER_CONFIG: tokenizer_config, GENERATION: generation_config}
TEMPLATE, TEMPLATES = "chat_template.jinja", "additional_chat_templates"
COPIED = (TOKENIZER, TOKENIZER_CONFIG, "special_tokens_map.json", GENERATION, "chat_template.json")
MAX_TEMPLATE = 1 << 20  # bytes of a template's file


class SmallFiles(ABC):
    """The small files of the model at `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @abstractmethod
    def has(self, name: str) -> bool:
        """Whether the model has this file."""

    @abstractmethod
    def json(self, name: str) -> dict[str, Any]:
        """The JSON object in a file.

        Raises:
            CheckpointError: it is missing or damaged.
        """

    @abstractmethod
    def text(self, name: str) -> str:
        """A file's text.

        Raises:
            CheckpointError: it is missing or damaged.
        """

    @property
    @abstractmethod
    def templates(self) -> dict[str, str]:
        """The chat templates that have files of their own, by name."""

    @property
    @abstractmethod
    def weight_files(self) -> list[Path]:
        """The files with the tensors."""

    @property
    @abstractmethod
    def config_bytes(self) -> bytes:
        """The bytes of the config, as far as they are in no weight file."""

    @property
    def added_tokens(self) -> list[dict[str, Any]]:
        """`added_tokens` of tokenizer.json; none where the model has no tokenizer."""
        found: list[dict[str, Any]] = self.optional(TOKENIZER).get("added_tokens", [])
        return found

    def optional(self, name: str) -> dict[str, Any]:
        """The JSON object in a file, an empty one where the model has no such file."""
        return self.json(name) if self.has(name) else {}


class FolderFiles(SmallFiles):
    """The files of a folder."""

    def has(self, name: str) -> bool:
        return (self.path / name).exists()

    def json(self, name: str) -> dict[str, Any]:
        return read_json(self.path / name)

    def text(self, name: str) -> str:
        path = self.path / name
        try:
            return read_text(path)
        except FileNotFoundError:
            raise CheckpointError(f"{path} does not exist") from None
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from None

    @property
    def templates(self) -> dict[str, str]:
        own = self.path / TEMPLATE
        files = {path.stem: path for path in sorted((self.path / TEMPLATES).glob("*.jinja"))}
        files |= {"default": own} if own.exists() else {}
        return {name: read_text(path, MAX_TEMPLATE) for name, path in files.items()}

    @property
    def weight_files(self) -> list[Path]:
        return sorted(self.path.glob("*.safetensors"))

    @property
    def config_bytes(self) -> bytes:
        return (self.path / CONFIG).read_bytes()


class GgufFiles(SmallFiles):
    """The files that a GGUF file's metadata stands for."""

    def has(self, name: str) -> bool:
        return name == CONFIG or (name in MADE and self._metadata.get(f"{PREFIX}model", "none") != "none")

    def json(self, name: str) -> dict[str, Any]:
        if name == CONFIG:
            with GgufFile(self.path) as file:
                return raw_config(file)
        if not self.has(name):
            hint = f", which has no {PREFIX}model; {WAY_OUT}" if name in MADE else ""
            raise CheckpointError(f"no {name} follows from {self.path}{hint}")
        try:
            return MADE[name](self._vocabulary)
        except CheckpointError as error:
            raise CheckpointError(f"{self.path.name}: {error}") from None

    def text(self, name: str) -> str:
        return json.dumps(self.json(name))

    @property
    def templates(self) -> dict[str, str]:
        return {}

    @property
    def weight_files(self) -> list[Path]:
        return part_paths(self.path)

    @property
    def config_bytes(self) -> bytes:
        return b""

    @property
    def added_tokens(self) -> list[dict[str, Any]]:
        """Without what else a tokenizer.json holds: making merges takes longer than all the rest."""
        return added_tokens(self._vocabulary) if self.has(TOKENIZER) else []

    @cached_property
    def _metadata(self) -> Mapping[str, Any]:
        with GgufFile(self.path) as file:
            return file.metadata

    @cached_property
    def _vocabulary(self) -> Vocabulary:
        return Vocabulary.read(self._metadata)


class OtherTokenizer(SmallFiles):
    """A model whose tokenizer and chat template are those of a folder, and so is its generation_config.json where that
    folder has one."""

    def __init__(self, model: SmallFiles, folder: SmallFiles) -> None:
        super().__init__(model.path)
        self._model, self._folder = model, folder

    def has(self, name: str) -> bool:
        return self._of(name).has(name)

    def json(self, name: str) -> dict[str, Any]:
        return self._of(name).json(name)

    def text(self, name: str) -> str:
        return self._of(name).text(name)

    @property
    def added_tokens(self) -> list[dict[str, Any]]:
        return self._folder.added_tokens

    @property
    def templates(self) -> dict[str, str]:
        return self._folder.templates

    @property
    def weight_files(self) -> list[Path]:
        return self._model.weight_files

    @property
    def config_bytes(self) -> bytes:
        return self._model.config_bytes

    def _of(self, name: str) -> SmallFiles:
        if name == CONFIG or (name == GENERATION and not self._folder.has(name)):
            return self._model
        return self._folder


def small_files(path: Path, tokenizer: Path | None = None) -> SmallFiles:
    """The small files of the model at a path, a folder or a GGUF file. `tokenizer`: a folder whose tokenizer it has
    instead of its own."""
    own = GgufFiles(path) if is_gguf(path) else FolderFiles(path)
    return own if tokenizer is None else OtherTokenizer(own, FolderFiles(tokenizer))


def texts_of(model: Path, tokenizer: Path | None = None) -> dict[str, str]:
    """What a model has of a tokenizer, its settings and its chat templates, by their places in a folder. `tokenizer` is
    that of `small_files`.

    Raises:
        CheckpointError: one of them is damaged, or `tokenizer` has none.
    """
    files = small_files(model, tokenizer)
    if tokenizer is not None and not files.has(TOKENIZER):
        raise CheckpointError(f"{tokenizer} has no {TOKENIZER}")
    found = {name: files.text(name) for name in COPIED if files.has(name)}
    try:
        templates = files.templates
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{model}: a chat template cannot be read: {error}") from None
    named = {TEMPLATE if name == "default" else f"{TEMPLATES}/{name}.jinja": text for name, text in templates.items()}
    return found | named


def write_texts(texts: Mapping[str, str], out: Path) -> None:
    """Write them to a folder."""
    for name, text in texts.items():
        path = out / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
