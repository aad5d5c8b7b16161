"""The manifests as `kubectl apply -k` would send them, and what stands in them."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
OVERLAYS = sorted(path.parent.name for path in DEPLOY.glob("overlays/*/kustomization.yaml"))
COMPONENTS = sorted(path.parent.relative_to(DEPLOY) for path in DEPLOY.glob("components/*/kustomization.yaml"))
APPLIED = [DEPLOY / "overlays" / name for name in OVERLAYS] + [DEPLOY / "load-test"]

Manifest = dict[str, Any]


@cache
def render(directory: Path) -> list[Manifest]:
    """The documents of a kustomization. Skips the test where there is no kustomize, unless REQUIRE_KUSTOMIZE is set."""
    if shutil.which("kubectl"):
        command = ["kubectl", "kustomize"]
    elif shutil.which("kustomize"):
        command = ["kustomize", "build"]
    elif os.environ.get("REQUIRE_KUSTOMIZE"):
        pytest.fail("neither kubectl nor kustomize is on PATH")
    else:
        pytest.skip("neither kubectl nor kustomize is on PATH")
    done = subprocess.run([*command, str(directory)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


def overlay(name: str) -> list[Manifest]:
    """The documents of an overlay."""
    return render(DEPLOY / "overlays" / name)


def of_kind(manifests: list[Manifest], kind: str) -> list[Manifest]:
    """Those of one kind."""
    return [manifest for manifest in manifests if manifest["kind"] == kind]


def pod_templates(manifests: list[Manifest]) -> Iterator[tuple[str, Manifest]]:
    """Every pod template with a name for it."""
    for manifest in manifests:
        name = f"{manifest['kind']}/{manifest['metadata']['name']}"
        if manifest["kind"] == "LeaderWorkerSet":
            for role in ("leaderTemplate", "workerTemplate"):
                yield f"{name} {role}", manifest["spec"]["leaderWorkerTemplate"][role]
        elif "template" in manifest.get("spec", {}):
            yield name, manifest["spec"]["template"]


def servers(manifests: list[Manifest]) -> Iterator[tuple[Manifest, Manifest]]:
    """Pod spec and container of every pod that runs the server."""
    for _, template in pod_templates(manifests):
        for container in template["spec"]["containers"]:
            if container["name"] == "server":
                yield template["spec"], container


def labels_of_pods(manifests: list[Manifest]) -> list[dict[str, str]]:
    """The labels that pods will have, those a controller adds included."""
    found = []
    for name, template in pod_templates(manifests):
        added = {"leaderworkerset.sigs.k8s.io/worker-index": "0"} if name.endswith("leaderTemplate") else {}
        found.append(template["metadata"]["labels"] | added)
    return found
