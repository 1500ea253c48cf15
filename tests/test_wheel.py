"""A wheel, built and installed into a folder of its own, runs without the repository and without a compiler."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from release.check_wheel import missing
from server.version import VERSION
from tests.e2e.live import Live, ready_url

pytestmark = [pytest.mark.slow, pytest.mark.redundant, pytest.mark.timeout(600)]  # it compiles every kernel
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the source archive with the environment's own torch, as `make wheel` does."""
    folder = tmp_path_factory.mktemp("wheel")
    code = f"import backend; print(backend.build_sdist({str(folder)!r}))"
    environment = os.environ | {"PYTHONPATH": str(ROOT / "release")}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    (archive,) = folder.glob("*.tar.gz")
    pip("wheel", str(archive), "--no-build-isolation", "--no-deps", "--wheel-dir", str(folder))
    (found,) = folder.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel in it; its dependencies are those of the tests."""
    folder = tmp_path_factory.mktemp("installed")
    pip("install", str(wheel), "--no-deps", "--target", str(folder))
    return folder


def pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr[-3000:]


def started(installed: Path, home: Path, *arguments: str, path: str = "/nowhere") -> "subprocess.Popen[str]":
    """`moedial` from the folder; unless `path` says so, with no compiler on the path."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MOEDIAL_", "XDG_", "CXX"))}
    environment = kept | {"PYTHONPATH": str(installed), "PATH": path, "HOME": str(home)}
    command = [sys.executable, "-P", str(installed / "bin" / "moedial"), *arguments]
    return subprocess.Popen(
        command, cwd="/", env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


@contextmanager
def serving(installed: Path, home: Path, path: str = "/nowhere") -> Iterator[Live]:
    flags = ("--port", "0", "--threads", "1", "--log-level", "warning")
    process = started(installed, home, "serve", *flags, path=path)
    try:
        yield Live(ready_url(process, seconds=500), process)
    finally:
        process.terminate()
        process.communicate()


def kernels_of(live: Live) -> dict[str, str]:
    execution: dict[str, str] = httpx.get(f"{live.url}/v1/models").json()["data"][0]["meta"]["execution"]
    return execution


def test_it_has_all_that_is_needed(wheel: Path) -> None:
    assert missing(wheel) == []
    assert wheel.name.startswith(f"moedial-{VERSION}-py3-none-linux_")


def test_it_says_what_it_is(installed: Path, tmp_path: Path) -> None:
    printed, errors = started(installed, tmp_path, "version").communicate()
    lines = dict(line.split(maxsplit=1) for line in printed.splitlines())
    assert lines["moedial"] == VERSION, errors
    assert lines["kernels"].endswith(", prebuilt") and "checked out" not in lines["build"]


def test_it_answers_on_its_own_kernels(installed: Path, tmp_path: Path) -> None:
    with serving(installed, tmp_path) as live:
        assert kernels_of(live)["kernels"] != "torch"
        for count in (1, 8):
            answer = live.client.completions.create(
                model="infinity-stories", prompt="Once upon a time", max_tokens=4, extra_body={"num_experts": count}
            )
            assert answer.usage is not None and answer.usage.model_extra is not None
            assert answer.usage.model_extra["num_experts"] == count
    assert not any(tmp_path.iterdir())  # nothing was compiled


@pytest.fixture
def bare(installed: Path) -> Iterator[Path]:
    """The same folder without its kernels."""
    kernels = installed / "model" / "backends" / "cpu" / "kernels"
    (kernels / "prebuilt").rename(kernels / "aside")
    yield installed
    (kernels / "aside").rename(kernels / "prebuilt")


def test_without_kernels_and_compiler_it_answers_on_torch(bare: Path, tmp_path: Path) -> None:
    with serving(bare, tmp_path) as live:
        assert kernels_of(live)["kernels"] == "torch" and "are not built" in kernels_of(live)["reason"]


def test_without_kernels_it_compiles_those_of_the_machine_once(bare: Path, tmp_path: Path) -> None:
    for _ in range(2):
        with serving(bare, tmp_path, os.environ["PATH"]) as live:
            assert kernels_of(live)["kernels"] != "torch"
    (library,) = (tmp_path / ".cache" / "moedial" / "kernels").iterdir()
    assert library.suffix == ".so"
