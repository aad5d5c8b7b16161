"""What the sources may not do: run foreign code, unpickle, go out for a request, measure by the wall clock."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted([*(ROOT / "dspark_server").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")])
# What a request passes through.
SERVING = [path for path in SOURCES if path.parent.name in ("api", "engine", "speculation", "runtime", "models")]
# Run before anything is served: `pull` and the first start download a model the operator named.
DOWNLOADS = {"dspark_server/models/hub.py"}

UNPICKLING = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
FOREIGN_CODE = {"eval", "exec", "compile", "__import__"}
OUTBOUND = {
    "httpx",
    "requests",
    "urllib.request",
    "urllib3",
    "aiohttp",
    "http.client",
    "ftplib",
    "smtplib",
    "socketserver",
}


def names(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imported(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


@pytest.mark.parametrize("path", SOURCES, ids=names)
def test_nothing_is_unpickled_and_no_foreign_code_is_run(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert not {name.partition(".")[0] for name in imported(tree)} & UNPICKLING
    assert "importlib.import_module" not in set(imported(tree))
    for name, call in calls(tree):
        assert name not in FOREIGN_CODE, f"{name} in line {call.lineno}"
        assert not name.endswith("import_module"), f"{name} in line {call.lineno}"
        words = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        if name == "torch.load":
            assert words.get("weights_only") == "True", f"torch.load in line {call.lineno}"
        assert words.get("allow_pickle", "False") == "False", f"allow_pickle in line {call.lineno}"
        assert words.get("trust_remote_code", "False") == "False", f"trust_remote_code in line {call.lineno}"
        assert words.get("shell", "False") == "False", f"shell in line {call.lineno}"
        assert name not in ("os.system", "os.popen", "yaml.unsafe_load"), f"{name} in line {call.lineno}"


@pytest.mark.parametrize("path", SERVING, ids=names)
def test_what_a_request_passes_has_no_way_out(path: Path) -> None:
    tree = ast.parse(path.read_text())
    if names(path) not in DOWNLOADS:
        assert not set(imported(tree)) & OUTBOUND
    for name, call in calls(tree):
        assert not re.search(r"create_connection|open_connection|\.connect$|urlopen", name), (
            f"{name}, line {call.lineno}"
        )


@pytest.mark.parametrize("path", SERVING, ids=names)
def test_no_duration_is_taken_from_the_wall_clock(path: Path) -> None:
    """Only dates for people come from it (`created`, a template's strftime_now): a clock that jumps changes nothing."""
    for line in path.read_text().splitlines():
        if re.search(r"\btime\.time\(\)|(?<![\w.])time\(\)|utcnow|datetime\.now", line):
            assert "created" in line or "strftime(form)" in line, line


def test_failpoints_cannot_be_armed_by_a_request() -> None:
    for path in SERVING:
        assert not re.search(r"failpoints\.(arm|armed|disarm)", path.read_text()), names(path)


def test_the_checks_see_what_they_look_for() -> None:
    tree = ast.parse("import pickle.x\nfrom urllib import request\neval(a)\ntorch.load(b)\nsocket.create_connection(c)")
    assert {"pickle.x", "urllib.request"} <= set(imported(tree))
    assert [name for name, _ in calls(tree)] == ["eval", "torch.load", "socket.create_connection"]
