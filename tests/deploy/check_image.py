"""The image of `Dockerfile`, built without a daemon and run: `make test-image`. It needs root and buildah.

BASE, TORCH_INDEX and TORCH_FIND_LINKS are arguments of the build; IMAGE names an image that is already built;
BUILDAH_ARGS are further arguments of `buildah bud`.
"""

import json
import os
import shlex
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

ROOT = Path(__file__).parent.parent.parent
CHROOT = ("--isolation", "chroot")  # works without a daemon, user namespaces or new control groups
BUILD_ARGUMENTS = ("BASE", "TORCH_INDEX", "TORCH_FIND_LINKS")
USER = 10001
READY_SECONDS, STOP_SECONDS = 300, 30
WRITABLE = ("/tmp/", "/proc/", "/dev/", "/sys/", "/run/")  # a container with a read-only root still has these


def buildah(*arguments: str) -> str:
    return subprocess.run(("buildah", *arguments), check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


@pytest.fixture(scope="module")
def image() -> str:
    if name := os.environ.get("IMAGE"):
        return name
    given = [f"--build-arg={name}={os.environ[name]}" for name in BUILD_ARGUMENTS if os.environ.get(name)]
    more = shlex.split(os.environ.get("BUILDAH_ARGS", ""))
    options = (*CHROOT, "--layers", "--format", "docker", *given, *more, "--tag", "localhost/moedial")
    subprocess.run(("buildah", "bud", *options, str(ROOT)), check=True)
    return "localhost/moedial"


@pytest.fixture(scope="module")
def config(image: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(buildah("inspect", "--type", "image", image))["Docker"]["config"]
    return found


@pytest.fixture(scope="module")
def container(image: str) -> Iterator[str]:
    name = buildah("from", image)
    yield name
    buildah("rm", name)


def server_below(process: subprocess.Popen[bytes]) -> psutil.Process:
    """The server's own process; what buildah puts around it has the same user and arguments, but is no Python."""
    for child in psutil.Process(process.pid).children(recursive=True):
        command = child.cmdline()
        if command[-1:] == ["serve"] and "python" in Path(command[0]).name:
            assert child.uids().real == USER
            return child
    raise AssertionError("no server runs")


def wait_ready(url: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline:
        assert process.poll() is None, "the server ended"
        try:
            if httpx.get(f"{url}/ready").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    raise AssertionError(f"not ready within {READY_SECONDS} s")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@pytest.mark.timeout(3600)
def test_what_the_image_declares(config: dict[str, Any]) -> None:
    assert config["User"] == f"{USER}:{USER}" and config["StopSignal"] == "SIGTERM"
    assert config["Entrypoint"] == ["moedial"] and config["Cmd"] == ["serve"]
    check = config["Healthcheck"]["Test"]
    assert check[0] == "CMD" and "/ready" in check[-1]


@pytest.mark.timeout(600)
def test_a_container_answers_writes_nothing_and_stops_with_status_0(
    config: dict[str, Any], container: str, tmp_path: Path
) -> None:
    marker = tmp_path / "marker"
    marker.touch()
    port = free_port()
    environment = (f"MOEDIAL_PORT={port}", "MOEDIAL_HOST=127.0.0.1", "MOEDIAL_THREADS=1")
    variables = [f"--env={variable}" for variable in environment]
    command = ["buildah", "run", *CHROOT, *variables, container, "--", *config["Entrypoint"], *config["Cmd"]]
    process = subprocess.Popen(command)
    url = f"http://127.0.0.1:{port}"
    try:
        wait_ready(url, process)
        server = server_below(process)
        body = {"prompt": "Once upon a time", "max_tokens": 8, "num_experts": 2, "temperature": 0}
        answer = httpx.post(f"{url}/v1/completions", json=body, timeout=60)
        assert answer.status_code == 200 and answer.json()["usage"]["num_experts"] == 2
        check = config["Healthcheck"]["Test"][1:]
        assert buildah("run", *CHROOT, *variables, container, "--", *check) == ""
        server.send_signal(signal.SIGTERM)
        assert process.wait(STOP_SECONDS) == 0
    finally:
        process.kill()
    assert written_since(marker, container) == []


def written_since(marker: Path, container: str) -> list[str]:
    """Files of a container that are newer than `marker`, but for what is writable in every container."""
    root = buildah("mount", container)
    command = ("find", root, "-xdev", "-type", "f", "-newer", str(marker))
    found = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()
    buildah("umount", container)
    inside = ["/" + str(Path(name).relative_to(root)) for name in found]
    return [name for name in inside if not name.startswith(WRITABLE)]
