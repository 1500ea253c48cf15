"""The engine's options are declared once: the server's settings have their types and defaults and pass them all on."""

from dataclasses import MISSING, fields
from pathlib import Path
from typing import get_type_hints

from engine.types import EngineSettings
from server.settings import Settings

OWN = {"model", "aliases", "log_format", "terminal_columns"}  # what the server makes of its options for the engine
OTHER_DEFAULT = {"speculate"}  # tests and benchmarks that build an engine themselves want none unless they say so


def test_types_and_defaults_are_the_engines() -> None:
    types = get_type_hints(EngineSettings)
    for field in fields(EngineSettings):
        if field.name in OWN:
            continue
        option = Settings.model_fields[field.name]
        assert option.annotation == types[field.name], field.name
        assert field.default is not MISSING
        assert (option.default == field.default) != (field.name in OTHER_DEFAULT), field.name


def test_every_field_is_passed_on() -> None:
    """Each at another value than its default, so that one that is left out shows."""
    given = {
        "tokenizer": "/models/other",
        "dtype": "bfloat16",
        "allow_extrapolated_experts": True,
        "device": "cuda:1",
        "quantize": "int8",
        "quantize_layers": "all",
        "ranks": 2,
        "rank_address": "10.0.0.1:29500",
        "rank_seconds": 2.5,
        "threads": 3,
        "block_size": 32,
        "kv_cache_dtype": "int8",
        "kv_cache_bytes": 5,
        "kv_cache_fraction": 0.5,
        "max_model_len": 7,
        "max_running": 8,
        "max_step_tokens": 9,
        "step_ms": 10,
        "stream_interval_ms": 11,
        "prefix_cache": False,
        "prefix_snapshots": 6,
        "prefix_snapshot_tokens": 512,
        "speculate": "ngram",
        "generation_config": "none",
        "default_num_experts": 2,
        "log_level": "warning",
    }
    made = Settings(**given, aliases={"fast": 1}, log_format="json").engine_settings(Path("/models/tiny"))  # type: ignore[arg-type]
    assert given.keys() | OWN == {field.name for field in fields(EngineSettings)}
    assert all(getattr(made, name) == value for name, value in given.items())
    assert (made.model, made.aliases, made.log_format) == ("/models/tiny", {"fast": 1}, "json")
