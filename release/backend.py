"""The build backend: setuptools, and torch while a wheel is built, whose headers the kernels are compiled against.

An editable installation asks for no torch: it compiles its kernels with the environment's own.
"""

import os
import shutil
import tomllib
from pathlib import Path
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import (
    build_editable,
    build_sdist,
    build_wheel,
    get_requires_for_build_editable,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]


def get_requires_for_build_wheel(config_settings: dict[str, Any] | None = None) -> list[str]:
    """torch at the version that the kernels will meet, where there is a compiler to use it."""
    needed: list[str] = build_meta.get_requires_for_build_wheel(config_settings)
    compiler = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("c++")
    return [*needed, *_pinned("torch"), "numpy"] if compiler else needed


def _pinned(package: str) -> list[str]:
    """The package's line among the dependencies of pyproject.toml."""
    project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
    return [line for line in project["dependencies"] if line.startswith(f"{package}==")]
