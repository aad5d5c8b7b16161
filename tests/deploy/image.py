"""`make check-image`: the Dockerfile built by buildah and run by podman. Needs root, debootstrap, buildah and podman.

The base is debootstrap's minimal bookworm, which stands for `debian:bookworm-slim`, with what a closed network needs
put into it (`--file`, `--env`); `--base` takes an image instead. The built image is run on a root that it cannot write
to: as its own user, and as an id without an account with the arguments of the Kubernetes base, under a short load test.
Each time its own HEALTHCHECK must pass, a request be answered, and SIGTERM end it with status 0.
"""

import argparse
import http.client
import json
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]
SUITE = "bookworm"
BASE, IMAGE, NAME, VOLUME = (
    "localhost/dspark-check-base",
    "localhost/dspark-server:check",
    "dspark-check",
    "dspark-check",
)
START_TIMEOUT = 600.0  # seconds: model, kernels and costs are made at the first start
LARGEST = 1.7e9  # bytes of the image for CPUs, of a torch without CUDA


def run(*command: str | Path, quiet: bool = False) -> None:
    """Run a command and wait. Raises CalledProcessError."""
    print("+", shlex.join(map(str, command)), flush=True)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL if quiet else None)


def said(*command: str) -> str:
    """What a command prints. Raises CalledProcessError."""
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


def make_base(work: Path, mirror: str | None, files: Sequence[str], variables: Sequence[str]) -> None:
    """Make the image BASE of a minimal Debian; each of `files` is PATH or PATH:SEEN."""
    root = work / "base"
    run("debootstrap", "--variant=minbase", SUITE, root, *([mirror] if mirror else []), quiet=True)
    for path in ("usr/share/doc", "usr/share/locale", "usr/share/man", "var/cache/apt", "var/lib/apt/lists"):
        shutil.rmtree(root / path, ignore_errors=True)  # as in Debian's own slim image
        (root / path).mkdir(parents=True)
    (root / "etc/dpkg/dpkg.cfg.d/docker").write_text(
        "".join(f"path-exclude /usr/share/{each}/*\n" for each in ("doc", "locale", "man"))
    )
    container = said("buildah", "from", "scratch")
    run("buildah", "copy", container, root, "/", quiet=True)
    for text in files:
        path, _, seen = text.partition(":")
        run("buildah", "copy", container, path, seen or path, quiet=True)
    for variable in variables:
        run("buildah", "config", "--env", variable, container)
    run("buildah", "commit", "--quiet", "--rm", container, BASE, quiet=True)


def build(base: str, options: Sequence[str]) -> None:
    """Build IMAGE as the Dockerfile says."""
    # Docker's format: OCI's has no HEALTHCHECK. In a chroot: RUN steps then need no runtime for containers.
    fixed = ["--format", "docker", "--isolation", "chroot", "--network", "host", "--build-arg", f"BASE={base}"]
    run("buildah", "bud", *fixed, *options, "--tag", IMAGE, ROOT)


class Podman:
    """podman with the options that this machine needs: `common` of every command, `of_run` of `run`."""

    def __init__(self, common: str, of_run: str) -> None:
        self._program = ["podman", *shlex.split(common)]
        self._of_run = shlex.split(of_run)

    def __call__(self, *arguments: str) -> str:
        """What `podman ARGUMENTS` prints. Raises CalledProcessError."""
        return said(*self._program, *arguments)

    def start(self, port: int, user: str | None, arguments: Sequence[str]) -> None:
        """Run IMAGE in the background as container NAME, on a root that cannot be written to."""
        options = ["--read-only", "--tmpfs", "/tmp", "--volume", f"{VOLUME}:/cache", "--network", "host"]
        options += ["--env", f"DSPARK_PORT={port}", *(["--user", user] if user else [])]
        self("run", "--detach", "--name", NAME, *options, *self._of_run, IMAGE, *arguments)

    def healthy(self) -> bool:
        """Whether the image's own check passes now."""
        command = [*self._program, "healthcheck", "run", NAME]
        return subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode == 0

    def state(self, field: str) -> str:
        """A field of the container's state."""
        return self("inspect", "--format", f"{{{{.State.{field}}}}}", NAME)

    def remove(self) -> None:
        """Remove container and volume, if they are there."""
        subprocess.run([*self._program, "rm", "--force", NAME], capture_output=True)
        subprocess.run([*self._program, "volume", "rm", "--force", VOLUME], capture_output=True)


def try_out(podman: Podman, user: str | None, arguments: Sequence[str], *, load: bool) -> None:
    """Start it, wait until its own health check passes, ask it something, stop it as a container runtime does."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    started = time.monotonic()
    podman.remove()
    try:
        podman.start(port, user, arguments)
        while not podman.healthy():
            assert podman.state("Running") == "true", f"it ended while starting:\n{podman('logs', NAME)}"
            assert time.monotonic() - started < START_TIMEOUT, "not healthy in time"
            time.sleep(2)
        print(f"healthy as {user or 'its own user'} after {time.monotonic() - started:.0f} s", flush=True)
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        body = json.dumps({"prompt": "The capital of France is", "max_tokens": 2, "temperature": 0})
        connection.request("POST", "/v1/completions", body, {"content-type": "application/json"})
        answer = json.loads(connection.getresponse().read())
        assert answer["choices"][0]["text"] == " Paris.", answer
        connection.request("GET", "/version")
        print(f"answered; {connection.getresponse().read().decode()}", flush=True)
        connection.close()
        if load:
            program = ["python", "/opt/dspark-server/loadtest/run.py", "--url", f"http://127.0.0.1:{port}"]
            options = ["--concurrency", "4", "--out", "/tmp/results"]
            print(podman("exec", "--env", "MPLCONFIGDIR=/tmp/matplotlib", NAME, *program, *options), flush=True)
        podman("stop", "--time", "60", NAME)
        assert podman.state("ExitCode") == "0", f"ended with {podman.state('ExitCode')} after SIGTERM"
    finally:
        podman.remove()


def kubernetes_arguments() -> list[str]:
    """Those of deploy/base."""
    deployment = yaml.safe_load((ROOT / "deploy" / "base" / "deployment.yaml").read_text())
    return list(deployment["spec"]["template"]["spec"]["containers"][0]["args"])


def main() -> None:
    """Build, then try out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", help="an image to build on, instead of a Debian made here")
    parser.add_argument("--mirror", help="Debian mirror for debootstrap; default: its own")
    parser.add_argument(
        "--file", action="append", default=[], metavar="PATH[:SEEN]", help="a file of the Debian made here"
    )
    parser.add_argument("--env", action="append", default=[], metavar="NAME=VALUE", help="a variable of it")
    parser.add_argument("--build", default="", metavar="ARGS", help="more arguments of buildah bud")
    parser.add_argument("--podman", default="", metavar="ARGS", help="arguments of every podman command")
    parser.add_argument("--run", default="", metavar="ARGS", help="more arguments of podman run")
    options = parser.parse_args()
    if missing := [each for each in ("debootstrap", "buildah", "podman") if shutil.which(each) is None]:
        sys.exit(f"{', '.join(missing)}: not installed; Debian has packages of these names.")
    if options.base is None:
        with tempfile.TemporaryDirectory() as work:
            make_base(Path(work), options.mirror, options.file, options.env)
    build(options.base or BASE, shlex.split(options.build))
    podman = Podman(options.podman, options.run)
    size = int(podman("image", "inspect", "--format", "{{.Size}}", IMAGE))
    print(f"image: {size / 1e9:.2f} GB", flush=True)
    try_out(podman, None, [], load=False)
    try_out(podman, "12345:0", kubernetes_arguments(), load=True)  # as OpenShift would
    assert options.base or size <= LARGEST, f"the image is larger than {LARGEST / 1e9} GB"
    print("check-image: passed")


if __name__ == "__main__":
    main()
