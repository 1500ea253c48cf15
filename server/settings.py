"""Every option of the server. Flags (`server/cli.py`), `MOEDIAL_*` variables and the docs table derive from here.

Those of models and engines are in `server/configuration/model_settings.py`.
"""

import os
from collections.abc import Iterator
from dataclasses import fields
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import SecretStr, ValidationInfo, field_validator, model_validator

from engine.environment import PREFIX
from engine.logs import Level, LogFormat
from engine.types import EngineSettings
from server.configuration.model_settings import ENGINE, ModelSettings
from server.configuration.options import (
    Origins,
    Secrets,
    Words,
    default_of,
    flag_of,
    option,
)
from server.configuration.variables import refuse_unknown
from server.json_limits import JsonLimits
from weights.folder import model_name

MIN_BROWNOUT_ITL = 1.2


class Settings(ModelSettings):
    """How to serve one model, or several. A flag wins over an environment variable, which wins over the default."""

    admin_key: SecretStr = option(
        SecretStr(""),
        "HTTP",
        "A key for loading and unloading --models: POST /admin/models/NAME/load and /unload; empty: no such routes. "
        "Prefer the variable",
    )
    host: str = option("127.0.0.1", "HTTP", "Address to listen on")
    port: int = option(8000, "HTTP", "Port to listen on; 0: any free one", ge=0, le=65535)
    api_keys: Secrets = option(
        (), "HTTP", "Accepted API keys, comma-separated; none: no authentication. Prefer the file, or the variable"
    )
    api_keys_file: str = option(
        "", "HTTP", "A TOML file of accepted API keys with names and limits, as [alice] and key = …: docs/api.md"
    )
    allowed_hosts: Words = option(
        (),
        "HTTP",
        "Names in Host headers that are answered beside local names and addresses, comma-separated, as llm.example.com "
        "or *.example.com; *: any. Empty: any, but without keys and on a loopback address local ones only",
    )
    allow_origin: Origins = option(
        (),
        "HTTP",
        "Sites whose web pages may use this server (CORS), comma-separated, as https://chat.example.com; *: any",
    )
    page: Literal["on", "off"] = option(
        "on", "HTTP", "Whether there is a web page at /, on which people ask the model and compare expert counts"
    )
    keep_alive: float = option(75.0, "HTTP", "Seconds that a connection stays open between requests", gt=0)
    ssl_certfile: str = option("", "HTTP", "Certificate chain in PEM, to serve HTTPS; its key may be in the same file")
    ssl_keyfile: str = option("", "HTTP", "Private key in PEM of --ssl-certfile, without a passphrase")
    drain_seconds: float = option(
        6.0,
        "HTTP",
        "How long running requests may finish after SIGTERM; what outlives it ends with an error. With at most 3.5 s "
        "for that, 6 fits the 10 s that Docker waits before it kills",
        ge=0,
    )
    log_level: Level = option(ENGINE.log_level, "HTTP", "Least severe log line written")
    log_format: Literal["auto", "text", "json"] = option(
        "auto", "HTTP", "How log lines look; auto: text where the standard error stream is a terminal, else json"
    )

    access_log: bool = option(
        False,
        "HTTP",
        "Write a log line for every HTTP request that has been answered, with method, path, status and seconds, beside "
        "the lines of calls and refusals; probes' lines are of level debug",
    )
    metrics_compat: Literal["none", "vllm"] = option(
        "none",
        "HTTP",
        "vllm: /metrics has the series that autoscalers, gateways and boards for vLLM read a second time, under vLLM's "
        "names",
    )
    otel: bool = option(
        False,
        "HTTP",
        "Send a trace span for each request that generates, by OTLP over HTTP; needs the extra otel. Where to, and all "
        "else, say OpenTelemetry's own variables, as OTEL_EXPORTER_OTLP_ENDPOINT",
    )

    queue_size: int = option(256, "Limits", "Sequences that may wait beside the running ones; beyond: 503", ge=0)
    max_queued_tokens: int = option(1_048_576, "Limits", "Prompt tokens held by all unfinished requests", ge=1)
    queue_timeout: float = option(
        30.0, "Limits", "Seconds that a request may wait for its first slot in the batch", gt=0
    )
    brownout: bool = option(
        False,
        "Limits",
        "While there is more work than can be done, run requests that name no expert count with fewer experts, as "
        "many as the load asks for; needs a calibration (moedial calibrate). Requests that name one are never touched",
    )
    brownout_quality: float = option(
        0.95,
        "Limits",
        "Calibrated relative quality below which --brownout never goes; 1: as good as the trained count",
        gt=0,
        le=2,
    )
    brownout_itl: float = option(
        1.5,
        "Limits",
        "Time per token, as a multiple of that of one sequence alone, which --brownout tries to keep, at least 1.2; "
        "0: it looks at the queue only",
        ge=0,
    )
    total_timeout: float = option(600.0, "Limits", "Seconds from arrival to the last token", gt=0)
    heartbeat: float = option(15.0, "Limits", "Seconds of silence before a stream sends an SSE comment", gt=0)
    max_body_bytes: int = option(8 << 20, "Limits", "Bytes of one request body", ge=1)
    max_inflight_body_bytes: int = option(
        128 << 20,
        "Limits",
        "Bytes of the bodies of all unfinished requests together; beyond: 503. The first 64 KiB of each do not count, "
        "so that short requests always find room",
        ge=1,
    )
    max_connections: int = option(
        1024,
        "Limits",
        "Open connections; beyond, 503, and a few more that are kept for /live, /health and the like",
        ge=1,
    )
    body_timeout: float = option(30.0, "Limits", "Seconds for a request body to arrive", gt=0)
    header_timeout: float = option(10.0, "Limits", "Seconds for request headers to arrive", gt=0)
    max_header_bytes: int = option(64 << 10, "Limits", "Bytes of request line and headers", ge=1024)
    max_header_fields: int = option(100, "Limits", "Header fields of one request", ge=1)
    max_json_depth: int = option(64, "Limits", "Nesting of a request body", ge=2, le=150)
    max_json_values: int = option(
        1 << 20, "Limits", "Values in a request body, or in a text that is parsed as JSON", ge=1024
    )
    max_json_objects: int = option(
        1 << 16, "Limits", "Objects, lists and keys in a request body, or in a text that is parsed as JSON", ge=256
    )
    max_body_fields: int = option(256, "Limits", "Fields at the top level of a request body, known or not", ge=64)
    max_messages: int = option(4096, "Limits", "Messages of a chat, or items of a response's input", ge=1)
    max_parts: int = option(1024, "Limits", "Parts or tool calls of one message", ge=1)
    max_prompts: int = option(64, "Limits", "Prompts of one request", ge=1)
    max_n: int = option(8, "Limits", "Answers per prompt (n)", ge=1)
    max_stop: int = option(16, "Limits", "Stop strings of one request", ge=0)
    max_stop_length: int = option(256, "Limits", "Characters of one stop string", ge=1)
    max_logprobs: int = option(20, "Limits", "Alternatives listed per token (logprobs, top_logprobs)", ge=0)
    max_tools: int = option(128, "Limits", "Tools of one request", ge=0)
    max_choices: int = option(16_384, "Limits", "Texts of which guided_choice lets an answer be one", ge=1)
    max_grammar_bytes: int = option(64 << 10, "Limits", "Bytes of a schema, regex or grammar", ge=1)
    max_logit_bias: int = option(1024, "Limits", "Entries of logit_bias", ge=0)

    @field_validator("ssl_keyfile")
    @classmethod
    def _belongs_to_a_certificate(cls, value: str, info: ValidationInfo) -> str:
        if value and not info.data.get("ssl_certfile"):
            raise ValueError("needs --ssl-certfile")
        return value

    @field_validator("admin_key")
    @classmethod
    def _opens_routes_of_several_models(cls, value: SecretStr, info: ValidationInfo) -> SecretStr:
        if value and not info.data.get("models"):
            raise ValueError("needs --models")
        return value

    @field_validator("brownout_itl")
    @classmethod
    def _is_above_an_unloaded_servers(cls, value: float) -> float:
        """A server that has nothing to do would be in brownout otherwise."""
        if 0 < value < MIN_BROWNOUT_ITL:
            raise ValueError(f"must be 0 or at least {MIN_BROWNOUT_ITL}, got {value:g}")
        return value

    @field_validator("max_inflight_body_bytes")
    @classmethod
    def _holds_one_body(cls, value: int, info: ValidationInfo) -> int:
        if value < (one := info.data.get("max_body_bytes", 0)):
            raise ValueError(f"must be at least --max-body-bytes, {one}, got {value}")
        return value

    @model_validator(mode="before")
    @classmethod
    def _check_variables(cls, values: Any) -> Any:
        """Raises BadSetting for a variable that is no setting, and for a variable of keys that is empty."""
        refuse_unknown(os.environ, cls.model_fields, ("api_keys", "api_keys_file", "admin_key"))
        return values

    @cached_property
    def name(self) -> str:
        """The model's name in the API. Of a path only the last part leaves the machine."""
        if self.served_name:
            return self.served_name
        path = Path(self.model).expanduser()
        return model_name(path.resolve()) if path.exists() else self.model

    @property
    def tokenizer_folder(self) -> Path | None:
        """The folder that --tokenizer names; None: the model's own tokenizer is used."""
        return Path(self.tokenizer).expanduser() if self.tokenizer else None

    @property
    def loaded_at_start(self) -> tuple[str, ...]:
        """The names of those of several models that are loaded at start."""
        return self.preload or tuple(self.models)[:1]

    def of_model(self, name: str) -> "Settings":
        """The settings of one of several models."""
        own = {"model": self.models[name], "served_name": name, "models": {}, "preload": (), "models_memory": 0}
        own |= {"tokenizer": self.tokenizers.get(name, ""), "tokenizers": {}}
        return self.model_copy(update={**own, "admin_key": SecretStr(""), "name": name})  # a cached `name` is another's

    @cached_property
    def terminal_columns(self) -> int:
        """The width of the terminal that shows the standard error stream; 0: it is no terminal.

        The first value is kept, since the server later puts a pipe there (`server/standard_streams.py`).
        """
        try:
            return os.get_terminal_size(2).columns or 80
        except OSError:
            return 0

    @property
    def line_format(self) -> LogFormat:
        """The format of log lines, with "auto" resolved."""
        if self.log_format == "auto":
            return "text" if self.terminal_columns else "json"
        return self.log_format

    @cached_property
    def json_limits(self) -> JsonLimits:
        return JsonLimits(self.max_json_depth, self.max_json_values, self.max_json_objects)

    def engine_settings(self, model: Path) -> EngineSettings:
        own = {
            "model": str(model),
            "tokenizer": str(self.tokenizer_folder or ""),
            "aliases": dict(self.aliases),
            "log_format": self.line_format,
        }
        names = {field.name for field in fields(EngineSettings)} - own.keys()
        shared = {name: getattr(self, name) for name in names}
        return EngineSettings(**shared | own)


def _rows() -> Iterator[str]:
    for name, field in Settings.model_fields.items():
        default = f"`{default_of(field)}`" if default_of(field) else ""
        names = f"`{flag_of(name)}` | `{PREFIX}{name.upper()}`"
        yield f"| {names} | {default} | {field.description} |"


def settings_table() -> str:
    """All options as a markdown table, for the docs."""
    return "\n".join(["| flag | variable | default | meaning |", "|---|---|---|---|", *_rows()]) + "\n"
