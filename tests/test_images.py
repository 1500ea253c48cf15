"""Both container images are made alike, and differ in nothing but what a GPU needs."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOR_GPUS = (  # what Dockerfile.cuda has beside the instructions of Dockerfile
    "RUN /opt/venv/bin/python -c 'import torch, triton; assert torch.version.cuda, "
    '"this is a build of torch without CUDA"\'',
    "RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*",
    "RUN mkdir /home/moedial/.triton",
    "ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility",
)


def instructions(name: str) -> list[str]:
    """The instructions of a file, without comments, each in one line."""
    lines = (line for line in (ROOT / name).read_text().splitlines() if line and not line.startswith("#"))
    return [" ".join(part.split()) for part in "\n".join(lines).replace("\\\n", " ").splitlines()]


def test_the_image_for_gpus_has_every_instruction_of_the_other_and_few_more() -> None:
    plain, cuda = instructions("Dockerfile"), instructions("Dockerfile.cuda")
    assert [line for line in cuda if line not in FOR_GPUS] == plain
    assert [line for line in cuda if line in FOR_GPUS] == list(FOR_GPUS)


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.cuda"])
def test_an_image_has_all_packages_and_an_ordinary_user(name: str) -> None:
    found = instructions(name)
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"benchmarks", "docs", "tests"}
    assert {f"COPY {package} {package}" for package in packages} <= {*found}
    assert found.index("RUN useradd --create-home --uid 10001 moedial") < found.index("USER 10001:10001")
    assert found[0] == "ARG BASE=python:3.11-slim"
    assert [line.split()[1] for line in found if line.startswith("FROM ")] == ["${BASE}", "${BASE}"]


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.cuda"])
def test_health_is_whether_the_server_is_ready_and_needs_no_shell(name: str) -> None:
    [line] = [line for line in instructions(name) if line.startswith("HEALTHCHECK")]
    command = json.loads(line.partition(" CMD ")[2])
    assert command[:2] == ["python", "-c"] and "/ready" in command[2]
    compile(command[2], name, "exec")
