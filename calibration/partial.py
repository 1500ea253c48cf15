"""The partial results of a calibration that is under way, in a file, so that an interrupted one goes on later.

A store of named JSON values, bound to a key (checkpoint, text, settings). It does not know what the values mean.
"""

import json
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

FILE = ".calibration.partial.json"
SECONDS = 2.0  # between two writes: what a killed run loses
MAX_BYTES = 1 << 30


class Partial:
    """Named values. `put` writes them to the file from time to time, `flush` at once."""

    def __init__(self, path: Path, key: Mapping[str, str]) -> None:
        self.path = path
        self._key = dict(key)
        self._values = _read(path, self._key)
        self._written = time.monotonic()
        self.resumed = bool(self._values)

    def get(self, name: str) -> Any:
        """The value with this name; None: there is none."""
        return self._values.get(name)

    def put(self, name: str, value: Any) -> None:
        """Keep a value of JSON's types other than null."""
        self._values[name] = value
        if time.monotonic() - self._written > SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write all values, if there are any, whole or not at all."""
        if not self._values:
            return
        part = self.path.with_name(self.path.name + ".part")
        part.write_text(json.dumps({"key": self._key, "values": self._values}))
        part.replace(self.path)
        self._written = time.monotonic()

    def forget(self) -> None:
        """Remove the file: the calibration is complete."""
        self.path.unlink(missing_ok=True)


def _read(path: Path, key: dict[str, str]) -> dict[str, Any]:
    """The values in a file; none, with a warning, where it is damaged or belongs to another calibration."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"larger than {MAX_BYTES} bytes")
        found = json.loads(path.read_bytes())
        if not isinstance(found, dict) or not isinstance(found.get("values"), dict):
            raise ValueError("not an object with values")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        log.warning("%s is damaged (%s): the calibration starts again", path, error)
        return {}
    if found.get("key") != key:
        differs = sorted(name for name in key if found.get("key", {}).get(name) != key[name])
        log.warning("%s is of another %s: the calibration starts again", path, ", ".join(differs) or "calibration")
        return {}
    return dict(found["values"])
