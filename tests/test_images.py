"""Both container images are made alike, and differ in nothing but what a GPU needs."""

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
    assert found.index("RUN useradd --create-home --uid 10001 moedial") < found.index("USER moedial")
    assert sum(line.startswith("FROM python:3.11-slim") for line in found) == 2
    assert any(line.startswith("HEALTHCHECK") for line in found)
