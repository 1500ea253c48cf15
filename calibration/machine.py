"""What this machine is, in words, for the file: figures of speed hold for it alone."""

import platform
from pathlib import Path

from model.resources import available_cores

CPUINFO = Path("/proc/cpuinfo")


def processor() -> str:
    """The processor's name, and how many cores may be used."""
    return f"{_name()}, {available_cores().value:g} cores"


def _name() -> str:
    lines = CPUINFO.read_text().splitlines() if CPUINFO.exists() else []
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip()
    return platform.machine()
