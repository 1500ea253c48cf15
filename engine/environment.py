"""The environment variables of child processes."""

import os
from pathlib import Path

PREFIX = "MOEDIAL_"
# All that code below the server reads.
HANDED_ON = frozenset({"MOEDIAL_KERNELS", "MOEDIAL_KERNELS_EMULATE", "MOEDIAL_KERNELS_SANITIZE", "MOEDIAL_NODES"})


def child_environment() -> dict[str, str]:
    """This process's environment, with the variables that must be set before torch is imported, and without the
    server's settings: they include API keys, and `/proc` shows the environment of a running process."""
    environment = {name: value for name, value in os.environ.items() if _handed_on(name)}
    # A waiting OpenMP thread spins; beside a busy process that costs two thirds of the throughput.
    environment.setdefault("GOMP_SPINCOUNT", "2000")
    # The child must run the code that the parent runs, wherever the command was started.
    paths = [str(Path(__file__).resolve().parent.parent), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    environment["PYTHONSAFEPATH"] = "1"  # `-m` would look in the working directory first
    return environment


def _handed_on(name: str) -> bool:
    """Whether a child gets a variable. Settings are read in upper and lower case, so both are withheld."""
    return name in HANDED_ON or not name.upper().startswith(PREFIX)
