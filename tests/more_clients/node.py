"""Where packages of npm are and how a script runs that needs them. It knows no client and no server."""

import os
import shutil
import subprocess

import pytest

from tests.clients.running import ROOT

FOLDER = ROOT / ".more-clients"  # with node_modules, which a script finds from where it is run


def missing() -> str:
    """Why no script can run here; empty where one can."""
    if shutil.which("node") is None:
        return "node is not installed"
    return "" if (FOLDER / "node_modules" / "ai").is_dir() else "npm was not installed when .more-clients was built"


needs_node = pytest.mark.skipif(bool(missing()), reason=missing())


def run_script(code: str, **environment: str) -> str:
    """What a script prints; one that fails fails the test."""
    command = ["node", "--input-type=module", "-"]
    settings = os.environ | environment | {"AI_SDK_LOG_WARNINGS": "false"}
    done = subprocess.run(command, input=code, cwd=FOLDER, env=settings, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
