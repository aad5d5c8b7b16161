"""Building the native kernels, and what happens where they cannot be built."""

import sys
from pathlib import Path

import dspark_kernels
import pytest
from dspark_kernels import KernelBuildError
from dspark_kernels.cpu import build as build_module
from dspark_kernels.cpu.native import NativeKernels

BROKEN = [[sys.executable, "-c", "raise SystemExit('no such instruction')"]]


def test_a_build_is_kept_and_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSPARK_CACHE_DIR", str(tmp_path))
    first = build_module.build(extra_flags=["-O0"])
    assert first.is_relative_to(tmp_path / "kernels")
    written = first.stat().st_mtime_ns
    assert build_module.build(extra_flags=["-O0"]) == first
    assert first.stat().st_mtime_ns == written
    assert [path.name for path in first.parent.iterdir()] == ["kernels.so"]  # nothing half-built is left behind


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
