"""A checkpoint's generation settings: its sampling defaults and its end-of-sequence ids.

It checks no ranges and knows no requests.
"""

from typing import Any

from model.errors import CheckpointError
from weights.small_files import CONFIG, GENERATION, SmallFiles

MAX_EOS_IDS = 256  # end-of-sequence ids
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def sampling_defaults(files: SmallFiles) -> dict[str, Any]:
    """The values of `generation_config.json` that requests use as defaults, by the names of request fields."""
    config = files.optional(GENERATION)
    return {name: config[name] for name in SAMPLING if config.get(name) is not None}


def read_eos_ids(files: SmallFiles, generation_config: bool = True) -> tuple[int, ...]:
    """`eos_token_id` of generation_config.json (unless it is to be ignored), else of config.json: any number of ids.

    Raises:
        CheckpointError: a file is damaged, or names what is no id.
    """
    for name in (GENERATION, CONFIG)[not generation_config :]:
        value = files.optional(name).get("eos_token_id")
        if value is not None:
            ids = value if isinstance(value, list) else [value]
            if not all(type(id) is int and 0 <= id < 1 << 31 for id in ids):
                raise CheckpointError(
                    f"{files.path / name}: eos_token_id {value!r:.64} is neither an id nor a list of ids"
                )
            if len(ids) > MAX_EOS_IDS:
                raise CheckpointError(
                    f"{files.path / name}: eos_token_id has {len(ids)} ids; at most {MAX_EOS_IDS} can be"
                )
            return tuple(ids)
    return ()
