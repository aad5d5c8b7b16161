"""The rendered manifests against the server's own flags, defaults and behaviour, and against each other."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from dspark_server import __version__
from dspark_server.api.server import LAST_WORDS_TIMEOUT
from dspark_server.cli import app
from tests.api.support import Running

from .checkpoints import DEEPSEEK, TARGETS
from .dockerfile import environment, stage
from .manifests import (
    APPLIED,
    COMPONENTS,
    OVERLAYS,
    ROOT,
    labels_of_pods,
    of_kind,
    overlay,
    pod_templates,
    render,
    servers,
)

IMAGE = environment("server")
ENGINE_STOP = 10  # seconds beyond all drain times for the engine to stop

PODS = {
    "tensor-parallel": 1,
    "multi-node": 2,
    "deepseek-v4-flash": 1,
    "deepseek-v4-pro": 2,
}  # of one server, each with several ranks


def on_this_machine(text: str, tmp_path: Path) -> str:
    """A path inside the container as one here: configuration files, and secrets with something in them."""
    if text.startswith("/opt/dspark-server/configs/"):
        return str(ROOT / "configs" / "serve" / Path(text).name)
    if text.startswith("/run/secrets/"):
        secret = tmp_path / "secret"
        secret.write_text("key\n")
        return str(secret)
    return text


def settings(container: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *extra: str) -> dict[str, Any]:
    """The settings that `dspark-server config` makes of a container's arguments and environment, by flag.

    Fails with the server's own message if it would not start.
    """
    for name in [name for name in os.environ if name.startswith("DSPARK_")]:
        monkeypatch.delenv(name)
    given = {each["name"]: each["value"] for each in container.get("env", ()) if "value" in each}
    for name, value in (IMAGE | given).items():
        if name.startswith("DSPARK_"):
            monkeypatch.setenv(name, on_this_machine(value, tmp_path))
    command, *arguments = container["args"]
    assert command == "serve"
    arguments = [on_this_machine(argument, tmp_path) for argument in arguments]
    result = CliRunner().invoke(app, ["config", *arguments, *extra, "--json"])
    assert result.exit_code == 0, result.output
    return {name: entry["value"] for name, entry in json.loads(result.output).items()}


@pytest.mark.parametrize("name", OVERLAYS)
def test_the_server_starts_with_these_arguments(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for _, container in servers(overlay(name)):
        found = settings(container, tmp_path, monkeypatch)
        assert found["host"] == "0.0.0.0"
        if "ports" in container:  # a worker of a group answers nobody
            assert {port["containerPort"] for port in container["ports"]} == {found["port"]}


@pytest.mark.parametrize("name", OVERLAYS)
def test_the_grace_period_covers_every_drain_time(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for pod, container in servers(overlay(name)):
        found = settings(container, tmp_path, monkeypatch)
        sleep = container.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
        needed = sleep + found["shutdown-timeout"] + LAST_WORDS_TIMEOUT + ENGINE_STOP
        assert needed <= pod["terminationGracePeriodSeconds"] <= needed + 30
        assert "ports" not in container or sleep > 0, "balancers need time to learn that the pod is going"


@pytest.mark.parametrize("name", OVERLAYS)
def test_probes_ask_the_server_for_what_it_answers(name: str, shared_server: Running) -> None:
    for _, container in servers(overlay(name)):
        if "ports" not in container:  # a worker of a group answers nobody
            continue
        paths = {}
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            paths[probe] = container[probe]["httpGet"]["path"]
            assert container[probe]["httpGet"]["port"] in {port["name"] for port in container["ports"]}
            assert container[probe]["timeoutSeconds"] <= container[probe]["periodSeconds"]
            assert shared_server.http.get(paths[probe]).status_code == 200
        # A draining server is not ready, but must not be killed for it.
        shared_server.engine.state = "draining"
        try:
            assert shared_server.http.get(paths["readinessProbe"]).status_code == 503
            assert shared_server.http.get(paths["livenessProbe"]).status_code == 200
        finally:
            shared_server.engine.state = "ready"


def test_a_rollout_is_more_patient_than_the_startup_probe() -> None:
    [deployment] = of_kind(overlay("cpu"), "Deployment")
    [(_, container)] = servers(overlay("cpu"))
    probe = container["startupProbe"]
    assert probe["periodSeconds"] * probe["failureThreshold"] < deployment["spec"]["progressDeadlineSeconds"]


@pytest.mark.parametrize("directory", APPLIED, ids=lambda path: path.name)
def test_pods_are_confined(directory: Path) -> None:
    for name, template in pod_templates(render(directory)):
        pod = template["spec"]
        assert pod["securityContext"]["runAsNonRoot"] is True, name
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["enableServiceLinks"] is False
        mounted = {volume["name"] for volume in pod["volumes"]}
        for container in pod["containers"]:
            confined = container["securityContext"]
            assert confined["allowPrivilegeEscalation"] is False
            assert confined["readOnlyRootFilesystem"] is True
            assert confined["capabilities"] == {"drop": ["ALL"]}
            assert container["resources"]["limits"]["memory"] == container["resources"]["requests"]["memory"] or (
                container["name"] == "epp"
            )
            assert {mount["name"] for mount in container["volumeMounts"]} <= mounted


@pytest.mark.parametrize("name", OVERLAYS)
def test_the_server_writes_only_where_it_may(name: str) -> None:
    [user] = [each.value for each in stage("server") if each.word == "USER"]
    for pod, container in servers(overlay(name)):
        assert pod["securityContext"]["runAsUser"] == int(user.split(":")[0])
        assert pod["automountServiceAccountToken"] is False
        places = [mount["mountPath"] for mount in container["volumeMounts"] if not mount.get("readOnly")]
        for variable in ("DSPARK_CACHE_DIR", "HF_HOME", "TRITON_CACHE_DIR"):
            assert any(Path(IMAGE[variable]).is_relative_to(place) for place in places)
        assert "/tmp" in places
        assert {"name": "shm", "mountPath": "/dev/shm"} in container["volumeMounts"]
        [shm] = [volume for volume in pod["volumes"] if volume["name"] == "shm"]
        assert shm["emptyDir"]["medium"] == "Memory"


@pytest.mark.parametrize("name", OVERLAYS)
def test_gpus_are_requested_as_they_are_limited(name: str) -> None:
    gpus = set()
    for _, container in servers(overlay(name)):
        requests, limits = container["resources"]["requests"], container["resources"]["limits"]
        assert requests.get("nvidia.com/gpu") == limits.get("nvidia.com/gpu")
        gpus.add(int(limits.get("nvidia.com/gpu", 0)))
        is_gpu_config = "-gpu.yaml" in container["args"][container["args"].index("--config") + 1]
        assert is_gpu_config == (gpus != {0})
    few = {"cpu": 0, "single-gpu": 1, "replicas": 1, "tensor-parallel": 4, "multi-node": 4}
    assert gpus == {(few | {"deepseek-v4-flash": 8, "deepseek-v4-pro": 8})[name]}


@pytest.mark.parametrize("name", PODS)
def test_tensor_parallel_size_is_the_number_of_gpus_and_divides_the_heads(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifests = overlay(name)
    pods = PODS[name]
    if pods > 1:
        assert of_kind(manifests, "LeaderWorkerSet")[0]["spec"]["leaderWorkerTemplate"]["size"] == pods
    for _, container in servers(manifests):
        found = settings(container, tmp_path, monkeypatch)
        size = found["tensor-parallel-size"]
        assert size == pods * int(container["resources"]["limits"]["nvidia.com/gpu"])
        target = (TARGETS | DEEPSEEK)[found["model"]]
        shared = "o_groups" if found["model"] in DEEPSEEK else "num_key_value_heads"
        assert target["num_attention_heads"] % size == target[shared] % size == 0
        environment = {each["name"]: each.get("value") for each in container.get("env", ())}
        assert "OMP_NUM_THREADS" not in environment  # threads follow limits.cpu, also when it changes in place
        if pods > 1:  # how each pod's server knows which ranks are its own
            assert {"MASTER_ADDR", "MASTER_PORT", "NNODES", "NODE_RANK"} <= environment.keys()


@pytest.mark.parametrize("name", OVERLAYS)
def test_selectors_find_pods_and_ports(name: str) -> None:
    manifests = overlay(name)
    pods = labels_of_pods(manifests)

    def found(selector: dict[str, str]) -> bool:
        return any(selector.items() <= labels.items() for labels in pods)

    ports = {port["name"]: port["containerPort"] for _, template in pod_templates(manifests)
             for container in template["spec"]["containers"] for port in container.get("ports", ())}  # fmt: skip
    for service in of_kind(manifests, "Service"):
        assert found(service["spec"]["selector"])
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= ports.keys()
    for kind in ("NetworkPolicy", "PodDisruptionBudget", "Deployment"):
        for manifest in of_kind(manifests, kind):
            selector = manifest["spec"].get("podSelector") or manifest["spec"]["selector"]
            assert found(selector["matchLabels"])
            for rule in manifest["spec"].get("ingress", ()):
                assert {port["port"] for port in rule.get("ports", ())} <= ports.keys()
    for monitor in of_kind(manifests, "ServiceMonitor"):
        wanted = monitor["spec"]["selector"]["matchLabels"].items()
        [service] = [each for each in of_kind(manifests, "Service") if wanted <= each["metadata"]["labels"].items()]
        assert {each["port"] for each in monitor["spec"]["endpoints"]} <= {p["name"] for p in service["spec"]["ports"]}
        assert monitor["spec"]["jobLabel"] in service["metadata"]["labels"]
        assert service["metadata"]["labels"][monitor["spec"]["jobLabel"]] == "dspark-server"  # job of the alerts
    for pool in of_kind(manifests, "InferencePool"):
        assert found(pool["spec"]["selector"]["matchLabels"])
        assert [port["number"] for port in pool["spec"]["targetPorts"]] == [ports["http"]]
        picker = pool["spec"]["endpointPickerRef"]
        [service] = [each for each in of_kind(manifests, "Service") if each["metadata"]["name"] == picker["name"]]
        assert picker["port"]["number"] in {port["port"] for port in service["spec"]["ports"]}


@pytest.mark.parametrize("name", OVERLAYS)
def test_what_is_referred_to_is_there(name: str) -> None:
    manifests = overlay(name)
    names = {(each["kind"], each["metadata"]["name"]) for each in manifests}
    assert {each["metadata"].get("namespace", "dspark") for each in manifests} == {"dspark"}
    assert ("Namespace", "dspark") in names
    readme = (ROOT / "deploy" / "README.md").read_text()
    for _, template in pod_templates(manifests):
        assert ("ServiceAccount", template["spec"]["serviceAccountName"]) in names
        for volume in template["spec"]["volumes"]:
            if "persistentVolumeClaim" in volume:
                assert ("PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"]) in names
            if "configMap" in volume:
                assert ("ConfigMap", volume["configMap"]["name"]) in names
            if "secret" in volume:  # made by hand: no manifest holds one
                assert f"create secret generic {volume['secret']['secretName']}" in readme
    for route in of_kind(manifests, "HTTPRoute"):
        for rule in route["spec"]["rules"]:
            assert {(ref["kind"], ref["name"]) for ref in rule["backendRefs"]} <= names
    for kind in ("ScaledObject", "HorizontalPodAutoscaler"):
        for scaler in of_kind(manifests, kind):
            assert ("Deployment", scaler["spec"]["scaleTargetRef"]["name"]) in names
            [deployment] = [d for d in of_kind(manifests, "Deployment") if d["metadata"]["name"] == "dspark-server"]
            assert "replicas" not in deployment["spec"]  # every apply would undo what the scaler decided


@pytest.mark.parametrize("directory", APPLIED, ids=lambda path: path.name)
def test_images_are_of_this_version(directory: Path) -> None:
    for _, template in pod_templates(render(directory)):
        for container in template["spec"]["containers"]:
            name, _, tag = container["image"].rpartition(":")
            if name.endswith("/dspark-server"):
                uses_gpu = "nvidia.com/gpu" in container["resources"]["limits"]
                assert tag == (f"{__version__}-cuda" if uses_gpu else __version__)
            else:
                assert tag.startswith("v"), "a version, not what happens to be the latest"


def test_every_component_is_in_an_overlay_or_renders_alone(tmp_path: Path) -> None:
    used = set()
    for name in OVERLAYS:
        written = yaml.safe_load((ROOT / "deploy" / "overlays" / name / "kustomization.yaml").read_text())
        used |= {Path(component).name for component in written.get("components", ())}
    assert {path.name for path in COMPONENTS} - used == {"hpa"}
    assert of_kind(with_component("hpa", tmp_path), "HorizontalPodAutoscaler")


def with_component(name: str, tmp_path: Path) -> list[dict[str, Any]]:
    """The base with one component."""
    deploy = Path(os.path.relpath(ROOT / "deploy", tmp_path.resolve()))
    written = {"resources": [str(deploy / "base")], "components": [str(deploy / "components" / name)]}
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(written))
    return render(tmp_path.resolve())
