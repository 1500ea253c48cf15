"""The files of `deploy/` agree with the server and with each other: times to stop, probes, users, names.

`check_files.py` has them judged by the tools that their users have.
"""

import re
from typing import Any

import pytest
import yaml

from server.access.sites import hosts_of
from server.http.middleware import PROBES
from server.settings import Settings
from tests.deploy.manifests import BASE, COMPOSE, DEPLOY, ROOT, config, deployment, manifest, unit, unit_environment
from tests.deploy.test_monitoring import known_series

AFTER_DRAIN = 4  # seconds that the server takes at most once the time for running requests is over (docs/operating.md)
POD = deployment()["spec"]["template"]["spec"]
[CONTAINER] = POD["containers"]
OVERLAYS = DEPLOY / "kubernetes" / "overlays"
SETTINGS = {f"MOEDIAL_{name.upper()}" for name in Settings.model_fields}


def seconds(text: str) -> int:
    return int(text.removesuffix("s"))


def test_a_pod_has_time_to_leave_its_service_and_to_drain() -> None:
    [_, sleep] = CONTAINER["lifecycle"]["preStop"]["exec"]["command"]
    needed = int(sleep) + int(config()["MOEDIAL_DRAIN_SECONDS"]) + AFTER_DRAIN
    assert POD["terminationGracePeriodSeconds"] > needed


def test_compose_and_systemd_wait_for_the_drain() -> None:
    server = COMPOSE["x-server"]
    drain = int(server["environment"]["MOEDIAL_DRAIN_SECONDS"])
    assert seconds(server["stop_grace_period"]) > drain + AFTER_DRAIN
    drain = int(unit_environment()["MOEDIAL_DRAIN_SECONDS"])
    assert int(unit()["TimeoutStopSec"][0]) > drain + AFTER_DRAIN


def test_a_drain_is_not_an_illness() -> None:
    """/ready is 503 in a drain, /health while the engine is started again: neither may end the pod."""
    paths = {name: CONTAINER[f"{name}Probe"]["httpGet"]["path"] for name in ("startup", "readiness", "liveness")}
    assert paths == {"startup": "/ready", "readiness": "/ready", "liveness": "/live"}
    assert set(paths.values()) <= PROBES
    startup = CONTAINER["startupProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] >= Settings.model_fields["load_timeout"].default


def test_a_container_may_little() -> None:
    user = POD["securityContext"]["runAsUser"]
    assert f"\nUSER {user}:{user}\n" in (ROOT / "Dockerfile").read_text()
    assert POD["securityContext"]["runAsNonRoot"] and not POD["automountServiceAccountToken"]
    allowed = CONTAINER["securityContext"]
    assert allowed["readOnlyRootFilesystem"] and allowed["capabilities"] == {"drop": ["ALL"]}
    server = COMPOSE["x-server"]
    assert server["read_only"] and server["cap_drop"] == ["ALL"]


def test_variables_are_settings() -> None:
    of_compose = COMPOSE["x-server"]["environment"]
    of_unit = {name for name in unit_environment() if name.startswith("MOEDIAL_")}
    text = "".join(path.read_text() for path in (DEPLOY / "kubernetes").rglob("*.yaml"))
    assert set(of_compose) | of_unit | set(re.findall(r"\bMOEDIAL_[A-Z_]+\b", text)) <= SETTINGS


@pytest.mark.parametrize("name", ["pod-disruption-budget.yaml", "network-policy.yaml"])
def test_a_selector_names_the_servers_and_no_other_pods(name: str) -> None:
    """An empty one would be of every pod of the namespace; kustomize adds nothing to it."""
    spec = manifest(BASE / name)["spec"]
    [pairs] = [entry["pairs"] for entry in manifest(BASE / "kustomization.yaml")["labels"]]
    assert (spec.get("selector") or spec.get("podSelector"))["matchLabels"] == pairs


@pytest.mark.parametrize(
    ("path", "pattern"),
    [
        ("hpa/prometheus-adapter.yaml", r"moedial:\w+"),
        ("keda/scaled-object.yaml", r"moedial:\w+"),
    ],
)
def test_autoscalers_read_series_that_there_are(path: str, pattern: str) -> None:
    found = set(re.findall(pattern, (OVERLAYS / path).read_text()))
    assert found and found <= known_series()


def test_the_autoscaler_reads_what_the_adapter_offers_and_sets_the_number_alone() -> None:
    [metric] = manifest(OVERLAYS / "hpa" / "autoscaler.yaml")["spec"]["metrics"]
    [rule] = manifest(OVERLAYS / "hpa" / "prometheus-adapter.yaml")["rules"]["custom"]
    assert metric["pods"]["metric"]["name"] == rule["name"]["as"]
    for name in ("hpa", "keda"):
        [patch] = manifest(OVERLAYS / name / "kustomization.yaml")["patches"]
        assert yaml.safe_load(patch["patch"]) == [{"op": "remove", "path": "/spec/replicas"}]


def services() -> dict[str, Any]:
    found: dict[str, Any] = COMPOSE["services"]
    return found


def test_compose_mounts_files_that_there_are_and_publishes_to_this_machine_only() -> None:
    for name, service in services().items():
        for mount in service.get("volumes", ()):
            source = mount.partition(":")[0]
            if source.startswith("./"):
                assert (DEPLOY / source).exists(), f"{name} mounts {source}"
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ())), name


def test_the_profiles() -> None:
    found: dict[str, set[str]] = {}
    for name, service in services().items():
        for profile in service.get("profiles", ("",)):
            found.setdefault(profile, set()).add(name)
    assert found == {
        "": {"moedial"},
        "lanes": {"moedial-low", "moedial-full", "haproxy"},
        "monitoring": {"prometheus", "grafana"},
        "ui": {"open-webui"},
    }


def test_compose_answers_to_local_names_only() -> None:
    default = re.fullmatch(r"\$\{ALLOWED_HOSTS:-(.+)\}", COMPOSE["x-server"]["environment"]["MOEDIAL_ALLOWED_HOSTS"])
    assert default
    hosts = hosts_of(default[1].split(","), "0.0.0.0", keys=False)
    local = ("localhost", "127.0.0.1", *COMPOSE["services"])
    assert all(map(hosts.allow, local)) and not hosts.allow("rebound.example.com")


def test_haproxy_and_prometheus_name_services_of_compose() -> None:
    text = (DEPLOY / "haproxy" / "haproxy.cfg").read_text()
    assert set(re.findall(r"(moedial[\w-]*):8000", text)) <= set(services())
    assert "bind :8001" in text and services()["haproxy"]["ports"] == ["127.0.0.1:8001:8001"]
    [job] = manifest(DEPLOY / "prometheus" / "prometheus.yml")["scrape_configs"]
    assert set(job["dns_sd_configs"][0]["names"]) <= set(services())
    source = manifest(DEPLOY / "grafana" / "provisioning" / "datasources" / "prometheus.yaml")
    assert [entry["url"] for entry in source["datasources"]] == ["http://prometheus:9090"]


def test_every_yaml_file_is_one() -> None:
    for path in [*DEPLOY.rglob("*.yaml"), *DEPLOY.rglob("*.yml")]:
        assert list(yaml.safe_load_all(path.read_text())), path
