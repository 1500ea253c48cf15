"""The files of `deploy/` judged by the tools that their users have: `make test-deploy`.

A tool that is not installed is skipped, with its name. Each is also given a file with a mistake, to see it found.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.deploy.manifests import DEPLOY, ROOT

KUBERNETES = DEPLOY / "kubernetes"
TARGETS = ("base", "overlays/hpa", "overlays/keda", "overlays/lanes")
WITHOUT_SCHEMA = ("ScaledObject",)  # kinds that a cluster has only once KEDA is installed
MAX_EXPOSED = 1.5  # of 10, as systemd-analyze counts
UNIT = DEPLOY / "systemd" / "moedial.service"
# Versions of apt packages are the distribution's to choose; `cd` is one of two commands that belong together; torch has
# a layer of its own, which later builds find again.
HADOLINT_IGNORES = ("DL3003", "DL3008", "DL3059")


def run(*command: str | Path, text: str | None = None) -> subprocess.CompletedProcess[str]:
    if shutil.which(str(command[0])) is None:
        pytest.skip(f"{command[0]} is not installed")
    return subprocess.run(list(map(str, command)), input=text, capture_output=True, text=True)


def kustomized(folder: Path) -> str:
    done = run("kubectl", "kustomize", folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


def validate(manifests: str, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    file = tmp_path / "manifests.yaml"
    file.write_text(manifests)
    return run("kubernetes-validate", "--strict", file)


@pytest.mark.parametrize("target", TARGETS)
def test_kubernetes_accepts_what_kustomize_makes(target: str, tmp_path: Path) -> None:
    done = validate(kustomized(KUBERNETES / target), tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    missing = [line for line in (done.stdout + done.stderr).splitlines() if "Couldn't find schema" in line]
    assert all(kind in line for line in missing for kind in WITHOUT_SCHEMA)


def test_components_fit_an_overlay(tmp_path: Path) -> None:
    folder = tmp_path / "own"
    folder.mkdir()
    lines = ["apiVersion: kustomize.config.k8s.io/v1beta1", "kind: Kustomization"]
    lines.append(f"resources: [{os.path.relpath(KUBERNETES / 'overlays' / 'hpa', folder)}]")
    components = [os.path.relpath(path, folder) for path in sorted((KUBERNETES / "components").iterdir())]
    lines.append(f"components: [{', '.join(components)}]")
    (folder / "kustomization.yaml").write_text("\n".join(lines) + "\n")
    made = kustomized(folder)
    assert "claimName: moedial-models" in made and "secretName: moedial-keys" in made
    assert validate(made, tmp_path).returncode == 0


def test_a_misspelt_field_of_a_pod_is_found(tmp_path: Path) -> None:
    made = kustomized(KUBERNETES / "base")
    assert validate(made.replace("terminationGracePeriodSeconds", "terminationGracePeriod"), tmp_path).returncode != 0


def test_lanes_have_selectors_of_their_own() -> None:
    made = kustomized(KUBERNETES / "overlays" / "lanes").split("\n---\n")
    for kind in ("Deployment", "Service", "PodDisruptionBudget", "NetworkPolicy"):
        for lane in ("low", "full"):
            [found] = [text for text in made if f"kind: {kind}\n" in text and f"  name: moedial-{lane}\n" in text]
            selector = found.partition("elector:")[2]
            assert f"moedial/lane: {lane}" in selector and "app.kubernetes.io/name: moedial" in selector


def test_the_compose_file_fits_its_schema(tmp_path: Path) -> None:
    check = ("check-jsonschema", "--builtin-schema", "vendor.compose-spec")
    done = run(*check, DEPLOY / "compose.yaml")
    assert done.returncode == 0, done.stdout
    wrong = tmp_path / "compose.yaml"
    wrong.write_text((DEPLOY / "compose.yaml").read_text().replace("stop_grace_period", "stop_grace_periode"))
    assert run(*check, wrong).returncode != 0


def test_compose_itself_accepts_the_file_with_every_profile() -> None:
    if run("docker", "compose", "version").returncode:
        pytest.skip("docker compose is not installed")
    done = run("docker", "compose", "--file", DEPLOY / "compose.yaml", "--profile", "*", "config", "--quiet")
    assert done.returncode == 0, done.stderr


def test_systemd_accepts_the_unit_and_finds_it_closed(tmp_path: Path) -> None:
    here = tmp_path / UNIT.name  # the server is not installed under /opt here
    here.write_text(UNIT.read_text().replace("/opt/moedial/bin/moedial", "/bin/true"))
    done = run("systemd-analyze", "verify", here)
    assert done.returncode == 0 and not done.stderr, done.stderr
    threshold = str(round(MAX_EXPOSED * 10))
    done = run("systemd-analyze", "security", "--offline=true", f"--threshold={threshold}", "--no-pager", UNIT)
    assert done.returncode == 0, done.stdout[-300:]


def test_haproxy_accepts_its_configuration() -> None:
    done = run("haproxy", "-c", "-f", DEPLOY / "haproxy" / "haproxy.cfg")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.cuda"])
def test_hadolint_finds_nothing(name: str) -> None:
    done = run("hadolint", *(f"--ignore={rule}" for rule in HADOLINT_IGNORES), ROOT / name)
    assert done.returncode == 0, done.stdout


def test_the_shell_accepts_the_script() -> None:
    assert run("sh", "-n", DEPLOY / "image" / "base.sh").returncode == 0
