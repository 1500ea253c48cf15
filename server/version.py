"""The version, what an issue should say of an installation, and the fingerprint of answers."""

import hashlib
import platform
import subprocess
import sys
from pathlib import Path

from engine.environment import child_environment
from engine.types import EngineInfo

VERSION = "0.2.0"  # the only place: pyproject.toml reads it here
CHECKOUT = Path(__file__).parent.parent
COMMIT = Path(__file__).parent / "commit.txt"  # written when a wheel or a source archive is built
REPORT_SECONDS = 60  # torch is loaded from a cold disk


def fingerprint_of(name: str, info: EngineInfo, default_count: int) -> str:
    """OpenAI's `system_fingerprint`: the same while equal requests get equal answers, across restarts."""
    model = (name, info.family, info.parameters, info.vocabulary, info.max_model_len, info.experts, default_count)
    parts = (VERSION, *model, info.dtype, info.quantize, info.kernels, info.device)
    return "fp_" + hashlib.sha256(repr(parts).encode()).hexdigest()[:10]


def report() -> str:
    """What an issue should say of an installation: version, build, Python, torch and kernels, a line each."""
    backends = _output([sys.executable, "-m", "model.backends"])  # this process never loads torch
    torch, _, kernels = backends.partition("\n")
    python = f"{platform.python_version()}, {platform.system()} {platform.machine()}"
    lines = {
        "moedial": VERSION,
        "build": build_of(),
        "python": python,
        "torch": torch or "cannot be loaded",
        "kernels": kernels or "unknown",
    }
    return "\n".join(f"{name:8} {value}" for name, value in lines.items())


def build_of() -> str:
    """The commit that was built, or that is checked out."""
    if COMMIT.exists():
        return COMMIT.read_text().strip()
    commit = _output(["git", "-C", str(CHECKOUT), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"])
    if (CHECKOUT / ".git").exists() and commit:
        return f"{commit}, checked out in {CHECKOUT}"
    return "unknown"


def _output(command: list[str]) -> str:
    """What a command prints; empty where it fails."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=REPORT_SECONDS, env=child_environment(), check=True
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()
