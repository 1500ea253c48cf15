"""The API keys that the server accepts: names, digests and limits, read from --api-keys and --api-keys-file.

An error names the file, the key's name and the field, and never shows a key.
"""

import hmac
import os
import re
import secrets
import stat
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import structlog
from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError

from server.access.quotas import KeyLimits
from server.access.sites import is_loopback
from server.configuration.variables import BadSetting, nearest

log = structlog.get_logger("server")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
MAX_KEYS = 1000  # each request is compared with every key, and each key has series of its own
MAX_FILE_BYTES = 1 << 20
MAX_KEY_BYTES = 1024


@dataclass(frozen=True, slots=True)
class ApiKey:
    """One accepted key."""

    name: str
    secret: SecretStr
    limits: KeyLimits


class Keys:
    """The accepted keys, of which only digests are kept."""

    def __init__(self, keys: Sequence[ApiKey]) -> None:
        self._salt = secrets.token_bytes(32)
        self.limits = {key.name: key.limits for key in keys}
        self._digests: list[tuple[str, bytes]] = []
        for key in keys:
            secret = key.secret.get_secret_value()
            self._digests.append((key.name, self._digest(secret.encode())))

    def __len__(self) -> int:
        return len(self._digests)

    def name_of(self, given: bytes) -> str | None:
        """The name of the key that equals `given`, if one does.

        Every key is compared, in constant time, by digests of one length, so that timing reveals nothing.
        """
        digest, found = self._digest(given), None
        for name, known in self._digests:
            if hmac.compare_digest(digest, known):
                found = name
        return found

    def _digest(self, secret: bytes) -> bytes:
        return blake2b(secret, key=self._salt, digest_size=32).digest()


def read_keys(given: Sequence[SecretStr], file: str) -> Keys:
    """All keys: those `given`, named key-1, key-2, …, and those of the file, if there is one.

    Raises:
        BadSetting: a key is empty, malformed or there twice, or the file cannot be used.
    """
    keys = [ApiKey(f"key-{index}", secret, KeyLimits()) for index, secret in enumerate(given, 1)]
    for key in keys:
        _check_secret(f"--api-keys: {key.name}", key.secret.get_secret_value())
    if file:
        keys += _keys_of(file)
    _check_distinct(keys)
    return Keys(keys)


def admin_keys(secret: SecretStr, keys: Keys) -> Keys:
    """The operator's key as the only one. `keys`: those of others.

    Raises:
        BadSetting: it is malformed, or one of the others.
    """
    text = secret.get_secret_value()
    _check_secret("--admin-key", text)
    if keys.name_of(text.encode()) is not None:
        raise BadSetting("--admin-key: the key is an API key as well")
    return Keys([ApiKey("admin", secret, KeyLimits())])


def warn_if_open(host: str, keys: Keys) -> None:
    """Log a warning where other machines may use the model without a key."""
    if not keys and not is_loopback(host):
        log.warning(
            "no API keys are set: every machine that reaches this address may use the model; "
            "set --api-keys-file or MOEDIAL_API_KEYS, or listen on 127.0.0.1",
            host=host,
        )


class _Entry(BaseModel):
    """One table of the file."""

    model_config = ConfigDict(extra="forbid", strict=True, hide_input_in_errors=True)

    key: SecretStr
    requests_per_minute: int | None = Field(None, ge=1, le=1_000_000)
    tokens_per_minute: int | None = Field(None, ge=1, le=1_000_000_000)
    share_of_places: float | None = Field(None, gt=0, le=1)


def _keys_of(file: str) -> list[ApiKey]:
    where = f"--api-keys-file {file}"
    try:
        tables = tomllib.loads(_text_of(file, where))
    except (UnicodeDecodeError, RecursionError):
        raise BadSetting(f"{where}: is not a TOML file in UTF-8") from None
    except tomllib.TOMLDecodeError as error:
        raise BadSetting(f"{where}: is not TOML: {error}") from None
    if not tables:
        raise BadSetting(f"{where}: holds no key")
    return [_key_of(where, name, table) for name, table in tables.items()]


def _text_of(file: str, where: str) -> str:
    """The text of a regular file. Opening another kind, such as a pipe, does not block."""
    try:
        with open(file, "rb", opener=lambda path, flags: os.open(path, flags | os.O_NONBLOCK)) as stream:
            status = os.fstat(stream.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise BadSetting(f"{where}: is not a regular file")
            data = stream.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise BadSetting(f"{where}: {error.strerror}") from None
    if len(data) > MAX_FILE_BYTES:
        raise BadSetting(f"{where}: has more than {MAX_FILE_BYTES} bytes")
    if status.st_mode & stat.S_IROTH:
        log.warning("every user of this machine can read the API keys; chmod 600 it", file=str(Path(file).absolute()))
    return data.decode()


def _key_of(where: str, name: str, table: Any) -> ApiKey:
    where = f"{where}: [{name[:64]}]"
    if not NAME.fullmatch(name):
        raise BadSetting(f"{where}: a name is up to 64 letters, digits, dots, dashes and underscores")
    if not isinstance(table, dict):
        raise BadSetting(f'{where}: expected a table such as [{name}] with key = "…"')
    try:
        entry = _Entry.model_validate(table)
    except ValidationError as error:
        raise BadSetting(f"{where}: {_fault(error)}") from None
    _check_secret(where, entry.key.get_secret_value())
    return ApiKey(name, entry.key, KeyLimits(**entry.model_dump(exclude={"key"})))


def _fault(error: ValidationError) -> str:
    first = error.errors(include_input=False, include_url=False)[0]
    field = str(first["loc"][0])
    if first["type"] == "extra_forbidden":
        return f"{field!r:.64} is no field of a key{nearest(field, _Entry.model_fields)}"
    return f"{field}: {first['msg']}"


def _check_secret(where: str, secret: str) -> None:
    """Refuse a key that no client could send, or that is empty.

    Raises:
        BadSetting: says what is wrong with the key.
    """
    if not secret.strip():
        raise BadSetting(f"{where}: the key is empty")
    if secret != secret.strip(" \t") or any(ord(char) < 32 or ord(char) == 127 for char in secret):
        raise BadSetting(f"{where}: the key has spaces at its ends or control characters, which no header carries")
    if len(_bytes_of(where, secret)) > MAX_KEY_BYTES:
        raise BadSetting(f"{where}: the key has more than {MAX_KEY_BYTES} bytes")


def _bytes_of(where: str, secret: str) -> bytes:
    try:
        return secret.encode()
    except UnicodeEncodeError:
        raise BadSetting(f"{where}: the key is not UTF-8") from None


def _check_distinct(keys: Sequence[ApiKey]) -> None:
    if len(keys) > MAX_KEYS:
        raise BadSetting(f"there are {len(keys)} API keys; at most {MAX_KEYS} are accepted")
    names: dict[str, str] = {}  # by key
    for key in keys:
        if key.name in names.values():
            raise BadSetting(f"API keys: two keys have the name {key.name}")
        known = names.setdefault(key.secret.get_secret_value(), key.name)
        if known != key.name:
            raise BadSetting(f"API keys: {known} and {key.name} are the same key")
    if names.keys() & set(names.values()):
        raise BadSetting("API keys: a key is also a name, and names are written to logs")
