"""`make check-deploy`, the heavy part: every overlay through other people's validators. Runs in build/deploy-venv.

Kubernetes' own kinds strictly against its schemas, custom resources against schemas/, all YAML through yamllint, the
Dockerfile through hadolint, both through checkov. Prints what each found; the exit status is 1 if anything was wrong.
"""

import argparse
import copy
import functools
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import yaml

ROOT = Path(__file__).parents[2]
SCHEMAS = {path.stem: json.loads(path.read_text()) for path in Path(__file__).with_name("schemas").glob("*.json")}
KUBERNETES = ("1.30", "1.37")  # the oldest with preStop.sleep on by default, and the newest that there are schemas of
BIN = Path(sys.executable).parent

# checkov's checks that do not apply, and why.
SKIPPED = {
    "CKV_K8S_43": "an image by digest: which one is for whoever builds it to say, in `images` of the overlay",
    "CKV_K8S_15": "imagePullPolicy Always: tags are versions; pulling gigabytes again at each start only costs time",
}


# Mistakes that must be found, or the checks are worth nothing: a kind, where in it, and what is put there.
PLANTED = (
    ("Deployment", "spec.template.spec.enableServiceLink", False),
    ("Deployment", "spec.template.spec.containers.0.livenessProbe.httpGet.port", None),
    ("PodDisruptionBudget", "spec.minAvailble", 1),
    ("LeaderWorkerSet", "spec.leaderWorkerTemplate.workerTemplate.spec.containers.0.volumeMount", []),
    ("LeaderWorkerSet", "spec.leaderWorkerTemplate.sizes", 2),
    ("ScaledObject", "spec.triggers.0.metadata.threshold", 4),
    ("InferencePool", "spec.endpointPickerRef.portNumber", 9002),
    ("PrometheusRule", "spec.groups.0.rules.0.for", "2 minutes"),
)


def main() -> int:
    """Run every check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--no-checkov", action="store_true", help="leave out the slowest part")
    options = parser.parse_args()
    failed = False
    for mistake in overlooked():
        print(f"a planted mistake was not found: {mistake}")
        failed = True
    with tempfile.TemporaryDirectory() as rendered:
        documents = 0
        for directory in kustomizations():
            try:
                manifests = render(directory)
            except subprocess.CalledProcessError as error:
                print(f"{directory.relative_to(ROOT)}: does not render: {error.stderr.strip()}")
                failed = True
                continue
            documents += len(manifests)
            for manifest in manifests:
                for problem in problems(manifest):
                    name = f"{manifest.get('kind')}/{manifest.get('metadata', {}).get('name')}"
                    print(f"{directory.relative_to(ROOT)}: {name}: {problem}")
                    failed = True
            Path(rendered, f"{directory.name}.yaml").write_text(yaml.safe_dump_all(manifests))
        print(f"schemas: {documents} documents of {len(kustomizations())} kustomizations checked")
        failed |= run("yamllint", "--strict", "--config-file", str(ROOT / "deploy" / ".yamllint.yaml"),
                      *(str(ROOT / place) for place in ("deploy", "configs")))  # fmt: skip
        failed |= run("hadolint", "--no-color", str(ROOT / "Dockerfile"))
        if promtool := shutil.which("promtool"):
            failed |= run(promtool, "test", "rules", str(ROOT / "deploy" / "prometheus" / "alerts_test.yaml"))
        else:
            print("promtool: not on PATH, so nothing shows when alerts fire (Debian's package prometheus has it)")
        if not options.no_checkov:
            skip = ["--skip-check", ",".join(SKIPPED), "--quiet", "--compact", "--skip-download"]
            failed |= run("checkov", "--framework", "kubernetes", "--directory", rendered, *skip)
            failed |= run("checkov", "--framework", "dockerfile", "--file", str(ROOT / "Dockerfile"), *skip)
    print("check-deploy: " + ("FAILED" if failed else "all passed"))
    return int(failed)


def overlooked() -> Iterator[str]:
    """Planted mistakes that `problems` does not see."""
    manifests = render(ROOT / "deploy/overlays/replicas") + render(ROOT / "deploy/overlays/multi-node")
    for kind, path, value in PLANTED:
        wrong: Any = copy.deepcopy(next(manifest for manifest in manifests if manifest["kind"] == kind))
        *way, last = (int(step) if step.isdecimal() else step for step in path.split("."))
        place = functools.reduce(lambda inner, step: inner[step], way, wrong)
        place[last] = value
        if not list(problems(wrong)):
            yield f"{kind} with {path}: {value!r}"


def kustomizations() -> list[Path]:
    """What can be applied, and the base with each component, so that none goes unchecked."""
    deploy = ROOT / "deploy"
    made = ROOT / "build" / "check-deploy"
    found = [path.parent for path in sorted(deploy.glob("overlays/*/kustomization.yaml"))] + [deploy / "load-test"]
    for component in sorted(path.parent for path in deploy.glob("components/*/kustomization.yaml")):
        directory = made / f"base-with-{component.name}"
        directory.mkdir(parents=True, exist_ok=True)
        up = "../../../deploy"
        written = {
            "namespace": "dspark",
            "resources": [f"{up}/base"],
            "components": [f"{up}/components/{component.name}"],
            "images": [{"name": "dspark-server", "newTag": "0"}],
        }
        (directory / "kustomization.yaml").write_text(yaml.safe_dump(written))
        found.append(directory)
    return found


def render(directory: Path) -> list[dict[str, Any]]:
    """The documents of a kustomization. Raises CalledProcessError; ends the program where there is no kustomize."""
    if shutil.which("kubectl"):
        command = ["kubectl", "kustomize"]
    elif shutil.which("kustomize"):
        command = ["kustomize", "build"]
    else:
        sys.exit("make check-deploy needs kubectl or kustomize on PATH to render the overlays.")
    done = subprocess.run([*command, str(directory)], capture_output=True, text=True, check=True, timeout=120)
    return list(yaml.safe_load_all(done.stdout))


def problems(manifest: dict[str, Any]) -> Iterator[str]:
    """What is wrong with a document. A kind that nothing here knows is wrong too."""
    if schema := SCHEMAS.get(manifest["kind"]):
        for error in jsonschema.Draft202012Validator(schema).iter_errors(manifest):
            yield f"{error.json_path}: {error.message}"
        for role in ("leaderTemplate", "workerTemplate"):
            if template := manifest["spec"].get("leaderWorkerTemplate", {}).get(role):
                wrapped = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "x"}, "template": template}
                yield from (f"{role}: {problem}" for problem in problems(wrapped))
        return
    for version in KUBERNETES:
        try:
            kubernetes_validate.validate(manifest, version, strict=True)
        except kubernetes_validate.ValidationError as error:
            yield f"Kubernetes {version}: {'.'.join(map(str, error.path))}: {error.message}"
        except (kubernetes_validate.SchemaNotFoundError, kubernetes_validate.InvalidSchemaError) as error:
            yield f"Kubernetes {version}: no schema: {error}"


def run(program: str, *arguments: str) -> bool:
    """Run a validator of this environment, or one given by its path; whether it complained."""
    done = subprocess.run([str(BIN / program), *arguments], capture_output=True, text=True)
    print(f"{Path(program).name}: {'passed' if done.returncode == 0 else 'FAILED'}", flush=True)
    if done.returncode:
        print(done.stdout + done.stderr)
    return done.returncode != 0


if __name__ == "__main__":
    sys.exit(main())
