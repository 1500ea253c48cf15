"""What a start imports, by name, and imports without the garbage collector."""

import gc
import subprocess
import sys

import pytest

from engine.imports import uncollected

# An engine of a model that needs neither is started without them: a second of processor time for some, and on a machine
# without a GPU nothing is imported that is for one.
UNUSED_BY_ENGINES = (
    *("calibration", "server", "training", "benchmarks", "fastapi", "pydantic", "httpx", "jinja2", "huggingface_hub"),
    *("triton", "model.backends.cuda", "torch._dynamo", "torch._inductor", "torch._export.serde", "torch.onnx"),
    *("torch.distributed.tensor", "sympy", "networkx", "transformers", "matplotlib", "scipy"),
)
UNUSED_BY_SERVERS = (
    *("torch", "numpy", "safetensors", "sympy", "transformers", "huggingface_hub", "matplotlib", "triton"),
    *("httpx", "psutil", "openai", "opentelemetry.sdk", "calibration.calibrate", "engine.build", "training"),
)
ENGINE = """
from engine.build import build_engine
from engine.types import EngineSettings
build_engine(EngineSettings(model="mu-stories", device="cpu", step_ms=0))
"""
SERVER = "import server.cli, server.serve"


@pytest.mark.parametrize(("start", "unused"), [(ENGINE, UNUSED_BY_ENGINES), (SERVER, UNUSED_BY_SERVERS)])
def test_a_start_imports_what_it_uses(start: str, unused: tuple[str, ...]) -> None:
    told = f"{start}\nimport sys\nprint(*(name for name in {unused} if name in sys.modules))"
    found = subprocess.run([sys.executable, "-c", told], check=True, capture_output=True, text=True, timeout=120)
    assert found.stdout.split() == []


def test_imports_are_left_out_of_later_collections() -> None:
    frozen = gc.get_freeze_count()
    with pytest.raises(ImportError), uncollected():
        assert not gc.isenabled()
        kept: list[list[int]] = [[] for _ in range(1000)]
        raise ImportError
    assert gc.isenabled() and gc.get_freeze_count() >= frozen + len(kept)
