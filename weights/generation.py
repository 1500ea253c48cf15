"""A checkpoint's generation settings: its sampling defaults and its end-of-sequence ids.

It checks no ranges and knows no requests.
"""

from pathlib import Path
from typing import Any

from model.errors import CheckpointError
from weights.folder import read_json

MAX_EOS_IDS = 256  # end-of-sequence ids
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def sampling_defaults(folder: Path) -> dict[str, Any]:
    """The values of `generation_config.json` that requests use as defaults, by the names of request fields."""
    config = _config(folder / "generation_config.json")
    return {name: config[name] for name in SAMPLING if config.get(name) is not None}


def read_eos_ids(folder: Path, generation_config: bool = True) -> tuple[int, ...]:
    """`eos_token_id` of generation_config.json (unless it is to be ignored), else of config.json: any number of ids.

    Raises:
        CheckpointError: a file is damaged, or names what is no id.
    """
    for name in ("generation_config.json", "config.json")[not generation_config :]:
        value = _config(folder / name).get("eos_token_id")
        if value is not None:
            ids = value if isinstance(value, list) else [value]
            if not all(type(id) is int and 0 <= id < 1 << 31 for id in ids):
                raise CheckpointError(f"{folder / name}: eos_token_id {value!r:.64} is neither an id nor a list of ids")
            if len(ids) > MAX_EOS_IDS:
                raise CheckpointError(f"{folder / name}: eos_token_id has {len(ids)} ids; at most {MAX_EOS_IDS} can be")
            return tuple(ids)
    return ()


def _config(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}
