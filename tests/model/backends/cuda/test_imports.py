"""A machine without a GPU imports nothing that is for one."""

import subprocess
import sys

SCRIPT = """
import sys
import engine.build, weights.load, model.backends.choose
print([name for name in sys.modules if name == "triton" or name.startswith("model.backends.cuda")])
"""


def test_an_engine_imports_neither_triton_nor_kernels_for_gpus() -> None:
    found = subprocess.run([sys.executable, "-c", SCRIPT], check=True, capture_output=True, text=True, timeout=120)
    assert found.stdout.strip() == "[]"
