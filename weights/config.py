"""Reads config.json: which family a checkpoint is of, and the decoder that the family's file makes of it.

Torch-free, so that the HTTP process may use it. It reads no weights.
"""

import importlib
import re
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from model.config_reader import ConfigReader, check_numbers
from model.errors import CheckpointError
from model.shapes.decoder import DecoderConfig
from weights.small_files import CONFIG, small_files


def read_config(model: Path) -> tuple[DecoderConfig, dict[str, Any]]:
    """The decoder's shape and the raw config.json; the one that a GGUF file's metadata stands for.

    Raises:
        CheckpointError: see `decoder_config`.
    """
    raw = small_files(model).json(CONFIG)
    return decoder_config(raw), raw


def decoder_config(raw: Mapping[str, Any]) -> DecoderConfig:
    """The decoder that a config.json describes.

    Raises:
        CheckpointError: unknown family, remote code asked for, a field that is missing, unknown or cannot be served.
    """
    if "auto_map" in raw:
        raise CheckpointError(
            "config.json asks for remote code (auto_map); moedial runs none. If you trust that its own code for this"
            " model_type is what you want, take auto_map out of the file"
        )
    name = raw.get("model_type")
    if not isinstance(name, str) or not re.fullmatch(r"[a-z0-9_-]{1,64}", name):
        raise CheckpointError(f"config.json: model_type is {name!r:.80}, not the name of a family")
    name = name.replace("-", "_")  # nllb-moe
    if name not in families():
        nearest = get_close_matches(name, families(), n=8, cutoff=0.0)
        others = len(families()) - len(nearest)
        raise CheckpointError(
            f"config.json: family {name!r} is not supported; known: {', '.join(nearest)}, and {others} others"
        )
    family = importlib.import_module(f"model.families.{name}")
    try:
        check_numbers(raw)
        config: DecoderConfig = family.decoder_config(ConfigReader(raw))
        return config
    except KeyError as error:
        raise CheckpointError(f"config.json: field {error.args[0]!r} is missing for {name}") from None
    except (ValueError, TypeError, AttributeError, ArithmeticError) as error:
        raise CheckpointError(f"config.json: {error}") from None


def families() -> list[str]:
    """The `model_type`s that can be loaded: the files of model/families."""
    import model.families

    names = {path.stem for root in model.families.__path__ for path in Path(root).glob("*.py")}
    return sorted(names - {"__init__"})
