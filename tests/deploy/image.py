"""`make check-image`: the Dockerfile's steps in a bare Debian, without a container daemon. Needs root and debootstrap.

Each stage is a directory: debootstrap's minimal bookworm stands for `debian:bookworm-slim`, a copy of its parent for
any other. ENV, ARG, WORKDIR, USER, COPY and RUN are carried out with chroot as they stand in the Dockerfile; then the
image's entrypoint serves on a root that it cannot write to: as the image's user, and as an id without an account with
the arguments of the Kubernetes base, under a short load test. What this leaves open is in deploy/README.md.
"""

import argparse
import contextlib
import fnmatch
import http.client
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from string import Template

import yaml

sys.path.append(str(Path(__file__).resolve().parents[2]))  # for `python tests/deploy/image.py`

from tests.deploy.dockerfile import Instruction, arguments, exec_form, instructions

ROOT = Path(__file__).resolve().parents[2]
SUITE = "bookworm"
START_TIMEOUT = 600.0  # seconds: model, kernels and costs are made at the first start


@dataclass
class Stage:
    """A root directory, and what ENV, WORKDIR and USER have set so far."""

    root: Path
    environment: dict[str, str] = field(default_factory=lambda: {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"})
    directory: str = "/"
    user: str = "0:0"


class Builder:
    """Carries instructions out. `binds`: paths of this machine and where steps see them; `shown`: variables for RUN."""

    def __init__(self, work: Path, mirror: str | None, binds: dict[Path, Path], shown: dict[str, str]) -> None:
        self._work = work
        self._mirror = mirror
        self._binds = binds
        self._shown = shown
        self._stages: dict[str, Stage] = {}
        self._arguments = arguments() | {"TARGET": "cpu"}

    def build(self) -> Stage:
        """The last stage. Raises CalledProcessError for the step that failed."""
        stage: Stage | None = None
        for each in instructions():
            if each.word == "FROM":
                stage = self._begin(each.value)
            elif stage is not None and stage.root != Path():
                print(f"--> {each.word} {each.value[:150]}", flush=True)
                self._carry_out(stage, each)
        assert stage is not None
        return stage

    def _begin(self, value: str) -> Stage:
        source, _, name = value.partition(" AS ")
        source = Template(source).substitute(self._arguments)
        print(f"==> FROM {source} AS {name}", flush=True)
        root = self._work / name
        if source.startswith("debian:"):
            command = ["debootstrap", "--variant=minbase", SUITE, str(root), *([self._mirror] if self._mirror else [])]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            stage = Stage(root)
        elif source in self._stages:
            parent = self._stages[source]
            subprocess.run(["cp", "--archive", "--reflink=auto", parent.root, root], check=True)
            stage = Stage(root, dict(parent.environment), parent.directory, parent.user)
        else:
            stage = Stage(Path())  # the CUDA base: not to be had here
        self._stages[name] = stage
        return stage

    def _carry_out(self, stage: Stage, each: Instruction) -> None:
        known = self._arguments | stage.environment
        if each.word == "RUN":
            self.run(stage, ["/bin/sh", "-eu", "-c", each.value], self._arguments | self._shown)
        elif each.word == "ENV":
            for pair in shlex.split(each.value):
                name, _, text = pair.partition("=")
                stage.environment[name] = Template(text).safe_substitute(known)
        elif each.word == "WORKDIR":
            stage.directory = each.value
            (stage.root / each.value.lstrip("/")).mkdir(parents=True, exist_ok=True)
        elif each.word == "USER":
            stage.user = each.value
        elif each.word == "COPY":
            self._copy(stage, each.value.split())
        else:
            assert each.word in ("ARG", "SHELL", "LABEL", "VOLUME", "EXPOSE", "HEALTHCHECK", "ENTRYPOINT", "CMD"), each

    def _copy(self, stage: Stage, words: list[str]) -> None:
        origin = ROOT
        if words[0].startswith("--from="):
            origin = self._stages[words.pop(0).removeprefix("--from=")].root
        *sources, to = words
        target = stage.root / os.path.normpath(os.path.join(stage.directory, to)).lstrip("/")
        for source in sources:
            path = origin / source.lstrip("/")
            if path.is_dir():
                shutil.copytree(path, target, symlinks=True, dirs_exist_ok=True, ignore=_ignored(origin))
            else:
                shutil.copy2(path, target / path.name if to.endswith("/") else target)

    def command(self, stage: Stage, words: list[str], extra: dict[str, str], *, read_only: bool = False) -> list[str]:
        """The command line that runs `words` in a stage, in namespaces of its own."""
        root = shlex.quote(str(stage.root))
        steps = [f"mount --rbind {root} {root}", f"mount -t proc proc {root}/proc", f"mount --rbind /dev {root}/dev"]
        for path, seen in self._binds.items():
            place = stage.root / str(seen).lstrip("/")
            (place if path.is_dir() else place.parent).mkdir(parents=True, exist_ok=True)
            if not path.is_dir():
                place.touch()
            steps.append(f"mount --bind {shlex.quote(str(path))} {shlex.quote(str(place))}")
        if read_only:
            for writable in ("cache", "tmp"):
                steps.append(f"mount --bind {root}/{writable} {root}/{writable}")
            steps.append(f"mount -o remount,ro,bind {root}")
        variables = [f"{name}={value}" for name, value in (stage.environment | extra).items()]
        inside = ["/bin/sh", "-c", 'cd "$1" && shift && exec "$@"', "sh", stage.directory, *words]
        chroot = ["chroot", f"--userspec={stage.user}", str(stage.root), "/usr/bin/env", "-i", *variables, *inside]
        steps.append("exec " + shlex.join(chroot))
        return ["unshare", "--mount", "--pid", "--fork", "--kill-child=TERM", "/bin/sh", "-euc", "; ".join(steps)]

    def run(self, stage: Stage, words: list[str], extra: dict[str, str]) -> None:
        """Run `words` in a stage and wait; what they print goes into the log. Raises CalledProcessError."""
        with (self._work / "log").open("ab") as log:
            subprocess.run(self.command(stage, words, extra), check=True, stdout=log, stderr=log)


def _ignored(origin: Path):
    """What .dockerignore leaves out of a folder that is let in; nothing of another stage's."""
    lines = (ROOT / ".dockerignore").read_text().splitlines() if origin == ROOT else []
    patterns = [line.removeprefix("**/") for line in lines if line.startswith("**/")]
    return lambda _, names: [name for name in names if any(fnmatch.fnmatch(name, each) for each in patterns)]


@contextlib.contextmanager
def serving(builder: Builder, stage: Stage, port: int, arguments: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    """The image's entrypoint on a read-only root."""
    words = exec_form("server", "ENTRYPOINT") + arguments
    process = subprocess.Popen(builder.command(stage, words, {"DSPARK_PORT": str(port)}, read_only=True))
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def children(pid: int) -> list[int]:
    """Processes whose parent is `pid`."""
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def try_out(builder: Builder, stage: Stage, arguments: list[str], *, load: bool) -> None:
    """Start it, wait until its own health check passes, ask it something, stop it as a container runtime does."""
    port = free_port()
    check = exec_form("server", "HEALTHCHECK")
    started = time.monotonic()
    with serving(builder, stage, port, arguments) as process:
        while subprocess.run(
            builder.command(stage, check, {"DSPARK_PORT": str(port)}), stderr=subprocess.DEVNULL
        ).returncode:
            assert process.poll() is None, "the server ended while starting"
            assert time.monotonic() - started < START_TIMEOUT, "not healthy in time"
            time.sleep(2)
        print(f"healthy as {stage.user} after {time.monotonic() - started:.0f} s", flush=True)
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        body = json.dumps({"prompt": "The capital of France is", "max_tokens": 2, "temperature": 0})
        connection.request("POST", "/v1/completions", body, {"content-type": "application/json"})
        answer = json.loads(connection.getresponse().read())
        assert answer["choices"][0]["text"] == " Paris.", answer
        connection.request("GET", "/version")
        print(f"answered; {connection.getresponse().read().decode()}", flush=True)
        connection.close()
        if load:
            options = ["--url", f"http://127.0.0.1:{port}", "--concurrency", "4", "--out", "/tmp/results"]
            program = ["python", "/opt/dspark-server/loadtest/run.py", *options]
            variables = {"MPLCONFIGDIR": "/tmp/matplotlib"}
            subprocess.run(builder.command(stage, program, variables, read_only=True), check=True)
        [server] = children(process.pid)  # unshare's child became the server
        os.kill(server, signal.SIGTERM)
        assert process.wait(60) == 0, f"ended with {process.returncode} after SIGTERM"


def kubernetes_arguments() -> list[str]:
    """Those of deploy/base."""
    deployment = yaml.safe_load((ROOT / "deploy" / "base" / "deployment.yaml").read_text())
    return list(deployment["spec"]["template"]["spec"]["containers"][0]["args"])


def main() -> None:
    """Build, then try out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "image", help="where stages go; must not exist")
    parser.add_argument("--mirror", help="Debian mirror for debootstrap; default: its own")
    parser.add_argument("--bind", action="append", default=[], metavar="PATH[:SEEN]", help="a path that steps may see")
    parser.add_argument("--env", action="append", default=[], metavar="NAME=VALUE", help="a variable of the RUN steps")
    options = parser.parse_args()
    options.work.mkdir(parents=True)
    binds = {}
    for text in ("/etc/resolv.conf", "/etc/hosts", *options.bind):
        path, _, seen = text.partition(":")
        binds[Path(path)] = Path(seen or path)
    builder = Builder(options.work, options.mirror, binds, dict(pair.split("=", 1) for pair in options.env))
    stage = builder.build()
    size = subprocess.run(["du", "--summarize", "--human-readable", stage.root], capture_output=True, text=True)
    print(f"image: {size.stdout.split()[0]}")
    try_out(builder, stage, exec_form("server", "CMD"), load=False)
    for made in (stage.root / "cache").iterdir():  # another id gets another volume
        shutil.rmtree(made)
    stage.user = "12345:0"  # as OpenShift would
    try_out(builder, stage, kubernetes_arguments(), load=True)
    print("check-image: passed")


if __name__ == "__main__":
    main()
