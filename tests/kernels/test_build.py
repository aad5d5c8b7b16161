"""Building the native kernels, and what happens where they cannot be built."""

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import dspark_kernels
import pytest
from dspark_kernels import KernelBuildError
from dspark_kernels.cpu import build as build_module
from dspark_kernels.cpu.native import NativeKernels

BROKEN = [[sys.executable, "-c", "raise SystemExit('no such instruction')"]]


@pytest.fixture
def one_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty cache, and one source that is built quickly."""
    monkeypatch.setenv("DSPARK_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(build_module, "SOURCES", [path for path in build_module.SOURCES if path.name == "norms.c"])


@pytest.mark.usefixtures("one_source")
def test_a_build_is_kept_and_found_again(tmp_path: Path) -> None:
    first = build_module.build(extra_flags=["-O0"])
    assert first.is_relative_to(tmp_path / "kernels")
    written = first.stat().st_mtime_ns
    assert build_module.build(extra_flags=["-O0"]) == first
    assert first.stat().st_mtime_ns == written
    assert [path.name for path in first.parent.iterdir()] == ["kernels.so"]  # nothing half-built is left behind


@pytest.mark.usefixtures("one_source")
def test_of_several_that_start_at_once_one_builds(monkeypatch: pytest.MonkeyPatch) -> None:
    built, compile_once = [], build_module._compile

    def counted(command: list[str], library: Path) -> None:
        built.append(library)
        compile_once(command, library)

    monkeypatch.setattr(build_module, "_compile", counted)
    with ThreadPoolExecutor(3) as pool:  # a lock of a file is held by whoever opened it, threads and processes alike
        results = list(pool.map(lambda _: build_module.build(extra_flags=["-O0"]), range(3)))
    assert len(built) == len(set(results)) == 1


def test_a_compiler_that_fails_is_followed_by_the_next() -> None:
    working = next(build_module.find_compilers())
    assert build_module.build(compilers=[*BROKEN, working]) == build_module.build(compilers=[working])


def test_what_was_tried_is_told() -> None:
    with pytest.raises(KernelBuildError, match="no such instruction"):
        build_module.build(compilers=BROKEN)
    with pytest.raises(KernelBuildError, match="pip install ziglang"):
        build_module.build(compilers=[])


def test_without_a_compiler_the_slow_path_is_loud(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(build_module, "find_compilers", lambda: iter(BROKEN))
    monkeypatch.delenv("DSPARK_KERNELS", raising=False)
    with pytest.warns(RuntimeWarning, match="SLOW"):
        assert dspark_kernels.load().name == "reference"
    assert "SLOW" in capsys.readouterr().err
    with pytest.raises(KernelBuildError):
        dspark_kernels.load("native")
    monkeypatch.setenv("DSPARK_KERNELS", "native")
    with pytest.raises(KernelBuildError):
        dspark_kernels.load()


def test_the_environment_decides_what_auto_means(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSPARK_KERNELS", "reference")
    assert dspark_kernels.load().name == "reference"
    assert isinstance(dspark_kernels.load("native"), NativeKernels)
    monkeypatch.setenv("DSPARK_KERNELS", "fastest")
    with pytest.raises(ValueError, match="fastest"):
        dspark_kernels.load()
